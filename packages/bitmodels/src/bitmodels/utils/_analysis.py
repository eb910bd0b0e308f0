"""What a model consists of."""

from __future__ import annotations

from typing import Any

import torch
from bitlayers import TernaryLayer
from bitlayers.utils import check_finite, estimate_memory_usage, ternary_layers
from torch import nn

__all__ = ["analyze_model"]


@torch.no_grad()
def analyze_model(model: nn.Module) -> dict[str, Any]:
    """Return what a model consists of and what it takes.

    Args:
        model: Any module, ternary or not.

    Returns:
        `total_params`: Weights and other parameters, packed ones included.
        `quantized_params`: Those in ternary layers.
        `quantized_share`: The second of the first.
        `memory_reduction`: What `deploy` saves, or has saved, of the bytes of the same model in 32 bits.
        `total_bytes`, `float32_bytes`, `deployed_bytes`, `bits_per_ternary_weight`: As
            `bitlayers.utils.estimate_memory_usage` counts.
        `is_deployed`: Whether there are ternary layers and all hold packed codes alone.
        `layers`: For each ternary layer a dictionary of its `name`, `type`, `shape`, whether `deployed`,
            `bytes` once deployed, and `zeros`, the share of its weights that are 0 (None on the meta device).

    Raises:
        QuantizationError: A ternary layer's weight holds NaN or infinity; the message names it.
    """
    check_finite(model)
    layers = ternary_layers(model)
    memory = estimate_memory_usage(model)
    quantized = sum(layer.weight_count for layer in layers.values())
    floats = {id(layer.weight) for layer in layers.values() if layer.weight is not None}
    total = quantized + sum(p.numel() for p in model.parameters() if id(p) not in floats)
    return {
        "total_params": total,
        "quantized_params": quantized,
        "quantized_share": quantized / total if total else 0.0,
        "memory_reduction": memory["reduction"],
        "total_bytes": memory["total_bytes"],
        "float32_bytes": memory["float32_bytes"],
        "deployed_bytes": memory["deployed_bytes"],
        "bits_per_ternary_weight": memory["bits_per_ternary_weight"],
        "is_deployed": bool(layers) and all(layer.is_deployed for layer in layers.values()),
        "layers": [
            {
                "name": name,
                "type": type(layer).__name__,
                "shape": list(layer.weight_shape),
                "deployed": layer.is_deployed,
                "bytes": layer.packed_bytes,
                "zeros": _zeros(layer),
            }
            for name, layer in layers.items()
        ],
    }


def _zeros(layer: TernaryLayer) -> float | None:
    held = layer.weight if layer.weight is not None else layer.qweight
    if held is None or held.is_meta:
        return None
    return 1 - layer.ternary_weight()[1].count_nonzero().item() / layer.weight_count
