"""Tells what a path holds and has the framework's module read it."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any, Final

from hamerspace.exceptions import ModelError, ModelNotFoundError
from hamerspace.models.source import ModelSource

TORCH_ENDINGS: Final = (".pt", ".pth", ".pt2", ".bin", ".ts", ".jit")
KERAS_ENDINGS: Final = (".keras", ".h5", ".hdf5")


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
