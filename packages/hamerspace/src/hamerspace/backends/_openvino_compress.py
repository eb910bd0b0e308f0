"""NNCF on graphs of OpenVINO: post-training quantisation, with accuracy control, and weights alone.

Quantising torch modules would need a C++ extension that NNCF compiles when it is first used; graphs do not.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from hamerspace.backends._openvino_quiet import load_nncf, quiet
from hamerspace.models.info import Feeds

_GROUP_SIZE = 128
_PASSES_ON = frozenset({"Reshape", "Convert", "Squeeze", "Unsqueeze"})


def quantize(graph: Any, batches: Sequence[Feeds]) -> Any:
    """Return a graph with int8 weights, embeddings too, and int8 activations."""
    nncf = load_nncf()
    with quiet():
        return nncf.quantize(
            graph, nncf.Dataset(_fed(graph, batches)), subset_size=len(batches), **_options(graph)
        )


def quantize_with_control(
    graph: Any,
    batches: Sequence[Feeds],
    evaluate: Callable[[Any], float],
    *,
    max_drop: float,
    max_iterations: int,
) -> Any:
    """Quantise as `quantize` does, and put back what costs accuracy.

    Args:
        graph: an ``openvino.Model``.
        batches: to calibrate with.
        evaluate: accuracy of an ``openvino.CompiledModel``; higher is better.
        max_drop: of the accuracy, as a difference.
        max_iterations: how many groups of quantisers are taken out at most, each after a new evaluation.
    """
    nncf = load_nncf()
    data = nncf.Dataset(_fed(graph, batches))

    def validate(compiled: Any, _: Any) -> float:
        # NNCF would score each operation on a few of its samples; the caller's metric needs its own data.
        return float(evaluate(compiled))

    advanced = nncf.AdvancedAccuracyRestorerParameters(max_num_iterations=max_iterations)
    with quiet():
        return nncf.quantize_with_accuracy_control(
            graph,
            data,
            data,
            validate,
            max_drop=max_drop,
            drop_type=nncf.DropType.ABSOLUTE,
            subset_size=len(batches),
            advanced_accuracy_restorer_parameters=advanced,
            **_options(graph),
        )


def compress_to_int8(graph: Any) -> Any:
    """Return a graph with int8 weights, a scale and a zero point a channel; activations stay as they are."""
    nncf = load_nncf()
    with quiet():
        return nncf.compress_weights(graph, mode=nncf.CompressWeightsMode.INT8_ASYM)


def compress_to_int4(graph: Any, batches: Sequence[Feeds] | None, group_size: int = _GROUP_SIZE) -> Any:
    """Return a graph whose matrices have 4 bits, with a scale and a zero point a group.

    Embeddings, the last layer and convolutions have 8 bits. Where rows do not divide into groups, the largest
    smaller group that fits is taken. Scales are fitted to outputs of the layers where there are batches.
    """
    nncf = load_nncf()
    advanced = nncf.AdvancedCompressionParameters(group_size_fallback_mode=nncf.GroupSizeFallbackMode.ADJUST)
    with quiet():
        data = None if batches is None else nncf.Dataset(_fed(graph, batches))
        return nncf.compress_weights(
            graph,
            mode=nncf.CompressWeightsMode.INT4_ASYM,
            group_size=group_size,
            dataset=data,
            scale_estimation=None if data is None else True,
            advanced_parameters=advanced,
        )


def has_attention(graph: Any) -> bool:
    """Whether a softmax's result is multiplied by a matrix, as in a transformer."""
    for node in graph.get_ops():
        if node.get_type_name() == "ScaledDotProductAttention":
            return True
        if node.get_type_name() in ("Softmax", "SoftMax") and _feeds_matrix(node):
            return True
    return False


def _feeds_matrix(node: Any) -> bool:
    following = [target.get_node() for port in node.outputs() for target in port.get_target_inputs()]
    return any(
        one.get_type_name() == "MatMul" or (one.get_type_name() in _PASSES_ON and _feeds_matrix(one))
        for one in following
    )


def _options(graph: Any) -> dict[str, Any]:
    nncf = load_nncf()
    return {
        "target_device": nncf.TargetDevice.CPU,
        "model_type": nncf.ModelType.TRANSFORMER if has_attention(graph) else None,
    }


def _fed(graph: Any, batches: Sequence[Feeds]) -> list[dict[str, Any]]:
    """Return batches without the inputs that the graph has no use for."""
    names = {name for port in graph.inputs for name in port.get_names()}
    return [{name: array for name, array in batch.items() if name in names} for batch in batches]
