"""What runs a model: one module a runtime, each loaded when first used."""

from hamerspace.runtimes.base import Runner
from hamerspace.runtimes.callable import LoadedModel

__all__ = ["LoadedModel", "Runner"]
