"""Backends by name: those of this package, and those of the entry-point group ``hamerspace.backends``."""

from __future__ import annotations

import importlib
import importlib.metadata
from enum import StrEnum
from functools import cache
from typing import Final

from hamerspace.backends.base import BaseBackend, Candidate, Verdict
from hamerspace.exceptions import BackendUnavailableError, ConstraintError, first_line
from hamerspace.models.info import ModelInfo

GROUP: Final = "hamerspace.backends"


class Backend(StrEnum):
    """The backends of this package."""

    PYTORCH = "pytorch"
    TENSORFLOW = "tensorflow"
    ONNX = "onnx"
    ONNX_RUNTIME = "onnx_runtime"
    OPENVINO = "openvino"
    TVM = "tvm"
    OPTIMUM = "optimum"
    BITSANDBYTES = "bitsandbytes"


_CLASSES: Final = {
    Backend.PYTORCH: ("hamerspace.backends.pytorch", "PyTorchBackend"),
    Backend.TENSORFLOW: ("hamerspace.backends.tensorflow", "TensorFlowBackend"),
    Backend.ONNX: ("hamerspace.backends.onnx", "ONNXBackend"),
    Backend.ONNX_RUNTIME: ("hamerspace.backends.onnx_runtime", "ONNXRuntimeBackend"),
    Backend.OPENVINO: ("hamerspace.backends.openvino", "OpenVINOBackend"),
    Backend.TVM: ("hamerspace.backends.tvm", "TVMBackend"),
    Backend.OPTIMUM: ("hamerspace.backends.optimum", "OptimumBackend"),
    Backend.BITSANDBYTES: ("hamerspace.backends.bitsandbytes", "BitsAndBytesBackend"),
}


@cache
def _offered() -> dict[str, importlib.metadata.EntryPoint]:
    points = importlib.metadata.entry_points(group=GROUP)
    return {point.name: point for point in points if point.name not in {one.value for one in Backend}}


def backend_names() -> list[str]:
    """Names of all backends, this package's first."""
    return [*(one.value for one in Backend), *sorted(_offered())]


@cache
def get_backend(name: str | Backend) -> BaseBackend:
    """Return a backend by name.

    Raises:
        ConstraintError: there is none of this name.
        BackendUnavailableError: another package offers it, and it cannot be loaded.
    """
    key = name.value if isinstance(name, Backend) else name
    if key in {one.value for one in Backend}:
        module, attribute = _CLASSES[Backend(key)]
        return getattr(importlib.import_module(module), attribute)()
    point = _offered().get(key)
    if point is None:
        raise ConstraintError(f"there is no backend {key!r}; there are {', '.join(backend_names())}")
    try:
        found = point.load()
        if not (isinstance(found, type) and issubclass(found, BaseBackend)):
            raise TypeError(f"{point.value} is no BaseBackend")
        return found()
    except Exception as error:
        raise BackendUnavailableError(f"backend {key} cannot be loaded: {first_line(error)}") from error


def availability(name: str) -> Verdict:
    """Whether a backend can be used here, and why not; one of another package that fails cannot."""
    try:
        return get_backend(name).is_available()
    except Exception as error:  # noqa: BLE001 - what other packages do wrong concerns them alone
        return Verdict(False, first_line(error))


def offers(name: str, model_info: ModelInfo, hardware: str = "cpu") -> tuple[list[Candidate], str]:
    """Return what a backend can try on a model; where that is nothing, the reason comes with it."""
    verdict = availability(name)
    try:
        backend = get_backend(name) if verdict else None
        if backend is None or not (verdict := backend.supports_model(model_info)):
            return [], verdict.reason
        found = backend.candidates(model_info, hardware=hardware)
        return found, "" if found else f"it has nothing for {hardware}"
    except Exception as error:  # noqa: BLE001 - see above
        return [], f"backend {name} fails: {type(error).__name__}: {first_line(error)}"


def backend_class(name: str, module: str) -> type[BaseBackend]:
    """Return a backend's class by the class's name, for `hamerspace.backends` itself."""
    for place, attribute in _CLASSES.values():
        if attribute == name:
            return getattr(importlib.import_module(place), attribute)
    raise AttributeError(f"module {module!r} has no attribute {name!r}")
