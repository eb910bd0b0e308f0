"""Graph optimisation by onnxscript: constants folded, and fusions for ONNX Runtime."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np

from hamerspace._imports import need
from hamerspace.backends._onnx_files import (
    compact,
    converted,
    replace_nodes,
    run_once,
    with_domain,
)
from hamerspace.backends.base import BuildContext
from hamerspace.models import onnx

_TOLERANCE = 1e-3
"""How far a fused model may be from the plain one, as a share of the largest magnitude: float32 summed in
another order, through many layers.
"""


def folded(model: Any) -> Any:
    """Return a model with constants folded and shapes inferred, in operators of the standard alone."""
    ir = need("onnx_ir")
    optimizer = need("onnxscript.optimizer")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        held = ir.from_proto(model)
        optimizer.optimize(held)
        return compact(ir.to_proto(held))


def fused(context: BuildContext) -> Any:
    """Return the context's model with attention, GELU and normalisation as single operators of ONNX Runtime.

    Where the fused model cannot be run or differs from the plain one, the plain one is returned. Attention is
    recognised where lengths are fixed; with free ones the exporter writes it in operators that are not.
    """
    path = context.once("fused.onnx", lambda target: _make(context, target))
    return onnx.open_model(path)


def _make(context: BuildContext, target: Path) -> None:
    plain = folded(converted(context))
    try:
        candidate = _fuse(plain)
        same = _agree(run_once(plain, context), run_once(candidate, context))
    except Exception:  # noqa: BLE001 - rewriting other people's graphs; without it the model still runs
        same, candidate = False, plain
    onnx.save(candidate if same else plain, target)


def _fuse(model: Any) -> Any:
    ir = need("onnx_ir")
    fusions = need("onnxscript.rewriter.ort_fusions")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        held, _ = fusions.optimize_for_ort(ir.from_proto(model), clear_metadata=True)
        # Attention's weights, which the fusion leaves for the runtime to join.
        need("onnxscript.optimizer").fold_constants(held, should_fold=_joins_weights)
        return compact(ir.to_proto(held))


def _joins_weights(node: Any) -> bool | None:
    """Return True for what makes one weight of several that nothing else uses; None leaves it to size."""
    joins = node.op_type == "Concat" and all(len(value.consumers()) == 1 for value in node.inputs)
    return joins or None


def _agree(one: Any, other: Any) -> bool:
    return all(
        np.allclose(
            other[name], array, rtol=0, atol=_TOLERANCE * max(1e-6, float(np.abs(array).max(initial=0)))
        )
        for name, array in one.items()
    )


def attention_unpacked(model: Any) -> Any:
    """Take the projections out of ``Attention``, so that they can be quantised with all 8 bits of weights.

    One product gives queries, keys and values, is split, and goes into ``MultiHeadAttention``, which is the
    same computation.
    """
    helper = need("onnx").helper
    dims = {tensor.name: list(tensor.dims) for tensor in model.graph.initializer}

    def change(node: Any) -> list[Any] | None:
        given = [*node.input, *[""] * (7 - len(node.input))]
        attributes = {one.name: helper.get_attribute_value(one) for one in node.attribute}
        sizes = attributes.pop("qkv_hidden_sizes", None)
        plain = set(attributes) <= {"num_heads", "scale"} and not (given[3] or given[4] or given[6])
        if node.op_type != "Attention" or node.domain != "com.microsoft" or not plain:
            return None
        if given[1] not in dims or dims[given[1]][1] % 3 or len(set(sizes or [])) > 1:
            return None
        name = node.output[0]
        parts = [f"{name}_{part}" for part in ("query", "key", "value")]
        return [
            helper.make_node("MatMul", given[:2], [f"{name}_packed"], name=f"{name}_packed"),
            helper.make_node("Split", [f"{name}_packed"], parts, axis=-1, num_outputs=3),
            helper.make_node(
                "MultiHeadAttention",
                [*parts, given[2], "", given[5]],
                list(node.output[:1]),
                domain="com.microsoft",
                **attributes,
            ),
        ]

    if replace_nodes(model.graph, change):
        with_domain(model)
    return model
