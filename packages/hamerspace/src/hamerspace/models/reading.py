"""Tells what a path holds and has the framework's module read it."""

from __future__ import annotations

import importlib
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from hamerspace.exceptions import ModelError, ModelNotFoundError
from hamerspace.models.info import ModelInfo
from hamerspace.models.source import ModelSource

TORCH_ENDINGS: Final = (".pt", ".pth", ".pt2", ".bin", ".ts", ".jit")
KERAS_ENDINGS: Final = (".keras", ".h5", ".hdf5")
EXAMPLE_BATCH: Final = 2
"""Samples that a model is read with, where it takes any number: exporters take 1 for a fixed one."""
EXAMPLE_LENGTH: Final = 16
"""Of other axes of any length, when a model is read."""


def check_exists(path: Path) -> None:
    """Raise unless there is such a file or folder.

    Raises:
        ModelNotFoundError: there is none.
    """
    if not path.exists():
        raise ModelNotFoundError(f"there is no model at {path}")
    if path.is_file() and path.stat().st_size == 0:
        raise ModelError(f"{path} is empty")


def framework_of(path: Path) -> str:
    """Say by its ending, or by what a folder holds, whose model a path is.

    Raises:
        ModelNotFoundError: there is nothing.
        ModelError: it is no model that is known.
    """
    check_exists(path)
    if path.is_dir():
        if (path / "saved_model.pb").is_file():
            return "tensorflow"
        if (path / "config.json").is_file():
            return "pytorch"
        raise ModelError(
            f"{path} is neither a SavedModel (saved_model.pb) nor a Hugging Face model (config.json)"
        )
    ending = path.suffix.lower()
    if ending == ".onnx":
        return "onnx"
    if ending in KERAS_ENDINGS:
        return "tensorflow"
    if ending in TORCH_ENDINGS:
        return "pytorch"
    raise ModelError(
        f"{path} has the ending {ending!r}; models have {', '.join((*TORCH_ENDINGS, *KERAS_ENDINGS))} or "
        ".onnx, or are folders of a SavedModel or of transformers"
    )


def read_path(path: Path, **options: Any) -> ModelSource:
    """Read a model of any framework; ``options`` are those of the framework's ``read``."""
    return importlib.import_module(f"hamerspace.models.{framework_of(path)}").read(path, **options)


def read_as(model: Any, info: ModelInfo, **options: Any) -> ModelSource:
    """Read a model for the inputs that are known of it.

    Args:
        model: a path, or a live model.
        info: of the model, or of the one that it is to be.
        options: those of the framework's ``read``.

    Raises:
        ModelNotFoundError: there is no such file.
        ModelError: it is no model, of another framework, or takes other inputs.
        ConstraintError: it takes other shapes.
    """
    if isinstance(model, (str, Path)) and (framework := framework_of(Path(model))) != info.framework:
        raise ModelError(f"{model} is of {framework}, and a model of {info.framework} is wanted")
    options["input_shape"] = {spec.name: list(spec.shape) for spec in info.inputs}
    if info.framework == "pytorch" and info.form != "exported":
        short = tuple(
            replace(spec, shape=tuple(example_length(n, axis) for axis, n in enumerate(spec.shape)))
            for spec in info.inputs
        )
        options["example_inputs"] = replace(info, inputs=short).draw(1)
    found = importlib.import_module(f"hamerspace.models.{info.framework}").read(model, **options)
    return replace(found, info=replace(found.info, inputs=info.inputs))


def example_length(length: int | str, axis: int) -> int:
    """Return the length of an axis when a model is read, for one that may have any."""
    return length if isinstance(length, int) else EXAMPLE_LENGTH if axis else EXAMPLE_BATCH
