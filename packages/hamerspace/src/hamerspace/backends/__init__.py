"""The backends: eight of this package, and those that other packages offer through entry points."""

from hamerspace.artifact import Manifest
from hamerspace.backends.base import Artifact, BaseBackend, BuildContext, Built, Candidate, Verdict
from hamerspace.backends.registry import Backend, backend_names, get_backend

__all__ = [
    "Artifact",
    "Backend",
    "BaseBackend",
    "BuildContext",
    "Built",
    "Candidate",
    "Manifest",
    "Verdict",
    "backend_names",
    "get_backend",
]


def __getattr__(name: str) -> type[BaseBackend]:
    from hamerspace.backends.registry import backend_class

    return backend_class(name, __name__)
