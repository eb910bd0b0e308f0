"""ONNX models with half the bytes: weights of 16 bits, and calculation in 32 or in 16."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np

from hamerspace._imports import need
from hamerspace.exceptions import BackendError

_FEWEST = 64
"""Elements of a tensor for which a node of its own pays."""


def with_half_weights(model: Any) -> Any:
    """Store weights in float16 and calculate in float32; the runtime widens them when it opens the model.

    Tensors with numbers past the range of float16 stay as they are.

    Raises:
        BackendError: there are no such weights.
    """
    onnx = need("onnx")
    graph = model.graph
    wide = onnx.TensorProto.FLOAT
    casts: list[Any] = []
    for tensor in graph.initializer:
        if tensor.data_type != wide:
            continue
        array = onnx.numpy_helper.to_array(tensor)
        if array.size < _FEWEST or np.abs(array).max() > np.finfo(np.float16).max:
            continue
        name = tensor.name
        tensor.CopyFrom(onnx.numpy_helper.from_array(array.astype(np.float16), f"{name}_half"))
        casts.append(onnx.helper.make_node("Cast", [f"{name}_half"], [name], name=f"{name}_cast", to=wide))
    if not casts:
        raise BackendError("the model has no weights of float32 that float16 can hold")
    nodes = [*casts, *graph.node]
    copies = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del graph.node[:]
    graph.node.extend(copies)
    return model


def in_half(model: Any) -> Any:
    """Return a model that calculates in float16; inputs and outputs keep their dtypes."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        half = need("onnxruntime.transformers.float16").convert_float_to_float16(model, keep_io_types=True)
        # It appends the casts of inputs and outputs, and the standard wants nodes in order.
        held = need("onnxruntime.transformers.onnx_model").OnnxModel(half)
        held.topological_sort()
        return held.model
