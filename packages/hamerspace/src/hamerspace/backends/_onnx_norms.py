"""Layer normalisation in operators that ONNX Runtime's CPU kernels vectorise, where that is faster.

Its kernels of ``LayerNormalization`` and ``SkipLayerNormalization`` add one number after the other: 128 us
for 64 rows of 384 on one thread (1.31), a fifth of a sentence encoder in int8, and 34 us as eleven operators.
Large batches, which leave the cache between operators, may be faster in one: both are timed.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any, Final

import numpy as np

from hamerspace._imports import need
from hamerspace.backends._onnx_files import replace_nodes
from hamerspace.backends.base import BuildContext
from hamerspace.models import onnx
from hamerspace.runtimes.base import RunOptions
from hamerspace.runtimes.onnxruntime import open_session

_NORMS: Final = {
    ("", "LayerNormalization"): 1e-5,
    ("com.microsoft", "SkipLayerNormalization"): 1e-12,
}
"""Operators, by domain, with their default of epsilon."""
_AXES_ARE_INPUTS: Final = 18
"""Version of the standard operators from which on a reduction takes its axes as an input."""
_ROUNDS: Final = 7
_ROUND_S: Final = 0.02


def with_faster_norms(context: BuildContext, model: Any, plain: Any) -> Any:
    """Return the faster of a model and the same with its layer normalisations taken apart; CPUs alone.

    Args:
        context: of the build.
        model: as it is to be, perhaps quantised, which makes much of differences in the last bit.
        plain: the same in float32, on which the two forms have to agree.
    """
    if context.device != "cpu" or model.ByteSize() >= onnx.SINGLE_FILE_LIMIT:
        return model
    forms = [plain, _apart(plain), model, _apart(model)]
    if forms[1] is None or forms[3] is None:
        return model
    feeds, options = context.example(), RunOptions(threads=context.threads)
    calls = [_call(one, feeds, options) for one in forms]
    if not all(_near(a, b) for a, b in zip(calls[0](), calls[1](), strict=True)):
        return model
    whole_s, apart_s = _side_by_side(calls[2:])
    return forms[3] if apart_s < whole_s else model


def _apart(model: Any) -> Any:
    made = type(model)()
    made.CopyFrom(model)
    return made if take_apart(made) else None


def _near(array: Any, other: Any) -> bool:
    return np.allclose(array, other, rtol=1e-3, atol=1e-4 * float(np.abs(array).max(initial=0)))


def take_apart(model: Any) -> int:
    """Write layer normalisations over the last axis, in float32, as single steps; return how many there were.

    No optimiser of ONNX Runtime knows them again, as squares are products here.
    """
    helper, arrays = need("onnx").helper, need("onnx").numpy_helper
    graph = model.graph
    floats = {one.name for one in graph.initializer if one.data_type == onnx.element_types().FLOAT}
    version = next((one.version for one in model.opset_import if one.domain in ("", "ai.onnx")), 0)
    used = {name for node in graph.node for name in node.input} | {value.name for value in graph.output}
    shared: dict[str, Any] = {}

    def held(name: str, value: Any) -> str:
        shared[name] = arrays.from_array(np.asarray(value), name)
        return name

    def change(node: Any) -> list[Any] | None:
        default = _NORMS.get((node.domain, node.op_type))
        attributes = {one.name: helper.get_attribute_value(one) for one in node.attribute}
        if default is None or attributes.get("axis", -1) != -1 or attributes.get("stash_type", 1) != 1:
            return None
        skips = node.op_type != "LayerNormalization"
        given = [*node.input, *[""] * 5]
        terms = [given[0], given[1], given[4]] if skips else [given[0]]
        gamma, beta = given[2:4] if skips else given[1:3]
        results = [name if name in used else "" for name in node.output] + [""] * 4
        if gamma not in floats or any(results[1:3]):
            return None
        made: list[Any] = []
        base = node.output[0]

        def step(kind: str, inputs: list[str], name: str) -> str:
            made.append(helper.make_node(kind, inputs, [name]))
            return name

        def mean(of: str, name: str) -> str:
            if version >= _AXES_ARE_INPUTS:
                return step("ReduceMean", [of, held("norm_axis", np.array([-1], np.int64))], name)
            made.append(helper.make_node("ReduceMean", [of], [name], axes=[-1]))
            return name

        total = terms[0]
        for place, term in enumerate(filter(None, terms[1:])):
            total = step("Add", [total, term], f"{base}_sum{place}")
        if results[3]:
            step("Identity", [total], results[3])
        centred = step("Sub", [total, mean(total, f"{base}_mean")], f"{base}_centred")
        squares = step("Mul", [centred, centred], f"{base}_squares")
        epsilon = np.float32(attributes.get("epsilon", default))
        variance = step(
            "Add",
            [mean(squares, f"{base}_variance"), held(f"norm_epsilon_{epsilon}", epsilon)],
            f"{base}_shifted",
        )
        unit = step("Div", [centred, step("Sqrt", [variance], f"{base}_deviation")], f"{base}_unit")
        if beta:
            step("Add", [step("Mul", [unit, gamma], f"{base}_scaled"), beta], base)
        else:
            step("Mul", [unit, gamma], base)
        return made

    changed = replace_nodes(graph, change)
    graph.initializer.extend(shared.values())
    return changed


def _call(model: Any, feeds: Any, options: RunOptions) -> Callable[[], Any]:
    session = open_session(model.SerializeToString(), options)
    return lambda: session.run(None, dict(feeds))


def _side_by_side(calls: list[Callable[[], Any]]) -> list[float]:
    """Median CPU seconds of calls that are made in turn."""
    start = time.perf_counter()
    calls[0]()
    count = max(1, int(_ROUND_S / max(time.perf_counter() - start, 1e-6)))
    taken: list[list[float]] = [[] for _ in calls]
    for _ in range(_ROUNDS):
        for place, call in enumerate(calls):
            begun = time.process_time()
            for _ in range(count):
                call()
            taken[place].append((time.process_time() - begun) / count)
    return [statistics.median(one) for one in taken]
