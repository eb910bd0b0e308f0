"""ONNX from Keras models and SavedModels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hamerspace._imports import need
from hamerspace.exceptions import BackendError
from hamerspace.models import onnx
from hamerspace.models._tensorflow_graph import first_line, frozen
from hamerspace.models.source import ModelSource
from hamerspace.models.tensorflow import traced_of
from hamerspace.runtimes._tensorflow_library import quiet

_OPSET = 18
"""The newest that tf2onnx writes."""


def export(source: ModelSource, target: Path) -> None:
    """Write an ONNX file of a model of TensorFlow; images stay in the order of axes that the model has.

    Raises:
        BackendError: the model has operations that tf2onnx does not know, or is too large for it.
        ModelError: the model does not take inputs of its info's shapes.
    """
    traced = traced_of(source)
    function = frozen(traced.function)
    given = [tensor.name for tensor in function.inputs]
    # A function flattens a dictionary in the order of its keys, whatever order they were put in.
    order = sorted(traced.function.structured_outputs)
    results = {name: tensor.name for name, tensor in zip(order, function.outputs, strict=True)}
    names = [spec.name for spec in source.info.outputs or traced.outputs]
    try:
        with quiet(native=True):
            model, _ = need("tf2onnx.convert").from_graph_def(
                function.graph.as_graph_def(),
                name=source.info.name,
                input_names=given,
                output_names=[results[name] for name in names],
                opset=_OPSET,
                tensors_to_rename={
                    **{tensor: spec.name for tensor, spec in zip(given, source.info.inputs, strict=True)},
                    **{results[name]: name for name in names},
                },
            )
    except Exception as error:
        raise BackendError(
            f"tf2onnx cannot convert {source.info.name} to ONNX: {first_line(error)}"
        ) from error
    for value in (*model.graph.input, *model.graph.output):
        _name_axes(value, source)
    onnx.save(model, target)


def _name_axes(value: Any, source: ModelSource) -> None:
    """Give axes of any length the names that the info has for them, in place of tf2onnx's."""
    specs = {spec.name: spec for spec in (*source.info.inputs, *source.info.outputs)}
    axes = value.type.tensor_type.shape.dim
    for axis, length in zip(axes, specs[value.name].shape, strict=False):
        if isinstance(length, str):
            axis.dim_param = length
