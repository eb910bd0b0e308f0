"""ONNX from modules, exported programs and TorchScript."""

from __future__ import annotations

import warnings
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

from hamerspace._arrays import flatten_outputs
from hamerspace._imports import need
from hamerspace.exceptions import BackendError
from hamerspace.models.info import ModelInfo
from hamerspace.models.pytorch import call, evaluating
from hamerspace.models.source import ModelSource


def export(source: ModelSource, target: Path, *, seed: int = 0) -> None:
    """Write an ONNX file of a model of torch.

    Modules and exported programs go through torch.export, with axes of any length where the model can be
    traced so, else with the lengths of examples. TorchScript goes through the older exporter, which alone
    reads it.

    Raises:
        BackendError: the model cannot be exported.
    """
    torch = need("torch")
    need("onnxscript")
    model, info = source.load(), source.info
    # A batch of 1 would be taken for a constant where it is to be free.
    feeds = {name: torch.from_numpy(array) for name, array in info.draw(2, seed).items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            if info.form == "torchscript":
                _export_script(model, info, feeds, target)
            else:
                _export_traced(model, info, feeds, target)
        except torch.onnx.OnnxExporterError as error:
            cause = error.__cause__ or error
            raise BackendError(f"torch cannot export {info.name} to ONNX: {_brief(cause)}") from error


def _export_traced(model: Any, info: ModelInfo, feeds: dict[str, Any], target: Path) -> None:
    torch = need("torch")
    common = need("onnx_ir.passes.common")
    names = list(feeds)
    exported = info.form == "exported"
    body = model.module() if exported else model

    class Flat(torch.nn.Module):
        """The model with tensors by position in and a tuple of tensors out."""

        def forward(self, *tensors: Any) -> tuple[Any, ...]:
            if exported:
                given = flat.body(*tensors)
            else:
                given = call(flat.body, info.form, names, dict(zip(names, tensors, strict=True)))
            return tuple(flatten_outputs(given)[1].values())

    free = tuple(
        {axis: length for axis, length in enumerate(spec.shape) if isinstance(length, str)}
        for spec in info.inputs
    )
    flat: Any = Flat()
    flat.body = body
    options: dict[str, Any] = {
        "dynamo": True,
        "input_names": names,
        "output_names": [spec.name for spec in info.outputs] or None,
        "verbose": False,
    }
    flat.training = False
    # An exported program has its mode built in, and refuses to be told one.
    mode = nullcontext() if exported else evaluating(body)
    with mode, torch.no_grad():
        program = None
        if any(free):
            with suppress(torch.onnx.OnnxExporterError):
                program = torch.onnx.export(
                    flat, tuple(feeds.values()), dynamic_shapes={"tensors": free}, **options
                )
        # A length that the model fixes either fails above or comes back as an axis with another name.
        if program is None or not _has_axes(program, info):
            # The first attempt has marked its tensors as ones of any length.
            fresh = tuple(tensor.clone() for tensor in feeds.values())
            program = torch.onnx.export(flat, fresh, **options)
    # Stack traces of the exporter's, which can be larger than a small model's weights.
    common.ClearMetadataAndDocStringPass()(program.model)
    program.save(str(target))


def _has_axes(program: Any, info: ModelInfo) -> bool:
    """Whether inputs have the lengths and the names of axes that they were asked to have."""
    return all(
        [axis if isinstance(axis, int) else axis.value for axis in given.shape] == list(spec.shape)
        for given, spec in zip(program.model.graph.inputs, info.inputs, strict=True)
    )


def _export_script(model: Any, info: ModelInfo, feeds: dict[str, Any], target: Path) -> None:
    torch = need("torch")
    axes = info.dynamic_axes
    for spec in info.outputs:
        free = {axis: length for axis, length in enumerate(spec.shape) if isinstance(length, str)}
        if free:
            axes[spec.name] = free
    torch.onnx.export(
        model,
        tuple(feeds.values()),
        str(target),
        dynamo=False,
        input_names=list(feeds),
        output_names=[spec.name for spec in info.outputs] or None,
        dynamic_axes=axes,
    )


def _brief(error: BaseException) -> str:
    return f"{type(error).__name__}: {next(iter(str(error).strip().splitlines()), '')}"
