"""ONNX from a model of any framework: what ONNX Runtime, OpenVINO and TVM start from."""

from __future__ import annotations

from pathlib import Path

from hamerspace.backends.base import BuildContext
from hamerspace.exceptions import BackendError, ModelError
from hamerspace.models import onnx


def onnx_path(context: BuildContext) -> Path:
    """Return an ONNX file of the context's model; it is made once a run, and is not to be changed.

    Inputs and outputs have the names and the order of ``context.info``. Axes that have a name there are of
    any length where the exporter can do that, else of the length of ``TensorSpec.example_shape``: the file
    says which. Weights that a file of 2 GB cannot hold lie beside it, and so may those of a model that came
    as ONNX.

    Raises:
        BackendError: the model cannot be exported.
        ImportError: what the export needs is not installed.
    """
    if context.info.framework == "onnx" and context.source.path is not None:
        return context.source.path
    return context.once("onnx", lambda folder: _export(context, folder)) / "model.onnx"


def _export(context: BuildContext, folder: Path) -> None:
    folder.mkdir()
    target = folder / "model.onnx"
    if context.info.framework == "pytorch":
        from hamerspace.models import _torch_to_onnx

        _torch_to_onnx.export(context.source, target, seed=context.seed)
    elif context.info.framework == "tensorflow":
        from hamerspace.models import _tensorflow_to_onnx

        _tensorflow_to_onnx.export(context.source, target)
    else:
        onnx.save(context.source.load(), target)
    try:
        onnx.check(target)
    except ModelError as error:
        raise BackendError(f"the exporter wrote an ONNX file that is not valid: {error}") from error
