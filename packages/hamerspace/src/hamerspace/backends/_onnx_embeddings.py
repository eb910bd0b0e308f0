"""Embedding tables of ONNX models in 8 bits, each row with a scale of its own."""

from __future__ import annotations

from typing import Any

import numpy as np

from hamerspace._imports import need

_FEWEST = 1024
"""Elements of a table for which the nodes that widen its rows pay."""
_TOP = 127


def quantize_embeddings(model: Any) -> int:
    """Store tables that rows are gathered from as int8 with a scale a row, and return how many there were.

    Only the rows that are looked up are widened, so the table stays small in memory too. One that is used
    otherwise as well, such as by a tied output layer, is left alone.
    """
    onnx = need("onnx")
    helper, arrays = onnx.helper, onnx.numpy_helper
    graph = model.graph
    lookups = {
        node.output[0]: node.input[0]
        for node in graph.node
        if node.op_type == "Gather" and not any(one.name == "axis" and one.i for one in node.attribute)
    }
    elsewhere = {
        name
        for node in graph.node
        for place, name in enumerate(node.input)
        if node.output[0] not in lookups or place
    }
    scales: dict[str, str] = {}
    for tensor in list(graph.initializer):
        name = tensor.name
        if name in elsewhere or tensor.data_type != onnx.TensorProto.FLOAT or len(tensor.dims) != 2:
            continue
        table = arrays.to_array(tensor)
        if table.size < _FEWEST or name not in lookups.values():
            continue
        scale = np.maximum(np.abs(table).max(axis=1, keepdims=True) / _TOP, np.finfo(np.float32).tiny)
        rows = np.clip(np.rint(table / scale), -_TOP, _TOP).astype(np.int8)
        tensor.CopyFrom(arrays.from_array(rows, name))
        scales[name] = f"{name}_scales_by_row"
        graph.initializer.append(arrays.from_array(scale.astype(np.float32), scales[name]))
    if not scales:
        return 0
    nodes: list[Any] = []
    for node in graph.node:
        if lookups.get(node.output[0]) not in scales:
            nodes.append(onnx.NodeProto.FromString(node.SerializeToString()))
            continue
        out, (table_name, index) = node.output[0], node.input
        # The tools that come after call what they add after a tensor, and then ``_scale`` or ``_quantized``.
        parts = [f"{out}_{part}" for part in ("narrow_rows", "wide_rows", "scales_of_rows")]
        nodes += [
            helper.make_node("Gather", [table_name, index], parts[:1], name=parts[0]),
            helper.make_node("Cast", parts[:1], parts[1:2], name=parts[1], to=onnx.TensorProto.FLOAT),
            helper.make_node("Gather", [scales[table_name], index], parts[2:], name=parts[2]),
            helper.make_node("Mul", parts[1:], [out], name=f"{out}_widened"),
        ]
    del graph.node[:]
    graph.node.extend(nodes)
    return len(scales)
