"""Ternary weights: absmean quantisation of BitNet b1.58 (Ma et al., arXiv 2402.17764)."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from bitcore.config import WeightGranularity, check_field
from bitcore.exceptions import QuantizationError

_LEAST_SCALE = 1e-5
"""What a scale is at least, so that zeros can be divided by it."""


def compute_weight_scale(weight: Tensor, granularity: WeightGranularity = "per_tensor") -> Tensor:
    """Return the mean magnitude of a weight, at least 1e-5: what codes are multiplied by.

    Args:
        weight: Floating, [out, ...].
        granularity: One scale for all, or one for each output.

    Returns:
        fp32, [1] for `per_tensor`, and [out, 1, ...] for `per_channel`, as many dimensions as the weight.

    Raises:
        QuantizationError: The weight is not floating, is empty, or holds NaN or infinity, or the granularity
            is unknown.
    """
    _check(weight, granularity)
    return mean_magnitude(weight, granularity)


def mean_magnitude(weight: Tensor, granularity: str) -> Tensor:
    """Return what `compute_weight_scale` does, of a weight that may be anything."""
    magnitude = weight.float().abs()
    if granularity == "per_tensor":
        return magnitude.mean().clamp(min=_LEAST_SCALE).view(1)
    inner = tuple(range(1, magnitude.ndim))
    return (magnitude.mean(inner, keepdim=True) if inner else magnitude).clamp(min=_LEAST_SCALE)


def quantize_weight(
    weight: Tensor, granularity: WeightGranularity = "per_tensor", *, scale: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Round a weight to -1, 0 and 1 times a scale.

    Args:
        weight: Floating, [out, ...].
        granularity: One scale for all, or one for each output.
        scale: To be used instead of the mean magnitude; broadcast against the weight.

    Returns:
        The scale, fp32, and the codes, int8 in the weight's shape: `clip(round(weight / scale), -1, 1)`.

    Raises:
        QuantizationError: The weight is not floating, is empty, or holds NaN or infinity, or the granularity
            is unknown.
    """
    _check(weight, granularity)
    scale = mean_magnitude(weight, granularity) if scale is None else scale.float()
    return scale, ternary(weight, scale).to(torch.int8)


def ternary(weight: Tensor, scale: Tensor) -> Tensor:
    """Return codes as fp32."""
    # By the reciprocal, as the published models were trained and as transformers does.
    return (weight.float() * scale.reciprocal()).round().clamp(-1, 1)


def dequantize_weight(scale: Tensor, qweight: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return `qweight * scale`, in `dtype`, of codes in their own shape and a scale that is broadcast."""
    return (qweight.float() * scale.float()).to(dtype)


def _check(weight: Tensor, granularity: str) -> None:
    check_field("weight_granularity", granularity)
    if not isinstance(cast("object", weight), Tensor) or not weight.is_floating_point():
        kind = getattr(weight, "dtype", type(weight).__name__)
        raise QuantizationError(f"a weight is to be a floating tensor, but is {kind}.")
    if weight.ndim == 0 or weight.numel() == 0:
        raise QuantizationError(f"a weight of shape {list(weight.shape)} holds nothing to quantise.")
    if not bool(torch.stack(weight.aminmax()).isfinite().all()):
        bad = int((~weight.isfinite()).sum())
        raise QuantizationError(f"{bad} of {weight.numel()} weights are NaN or infinite.")
