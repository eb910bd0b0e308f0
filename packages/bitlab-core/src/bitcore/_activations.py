"""Activations of 8 bits: absmax quantisation of BitNet b1.58 (Ma et al., arXiv 2402.17764)."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from bitcore.config import ActivationGranularity, check_field
from bitcore.exceptions import QuantizationError

_MOST = 127.0
_LEAST_MAGNITUDE = 1e-5
EXACT_TERMS = (1 << 24) // 128
"""The most products of 8-bit codes by -1, 0 and 1 whose sum a float of 32 bits holds exactly."""


def compute_x_scale(x: Tensor, granularity: ActivationGranularity = "per_token") -> Tensor:
    """Return the largest magnitude, at least 1e-5, over 127: what codes are multiplied by.

    Args:
        x: Floating, [..., features].
        granularity: One scale for all of x, or one for each token, a row along the last dimension
            (`per_channel` means the same).

    Returns:
        fp32, [1] for `per_tensor` and [..., 1] else.

    Raises:
        QuantizationError: x is not floating, or the granularity is unknown.
    """
    check_field("activation_granularity", granularity)
    return _largest(x, granularity) / _MOST


def quantize_x(x: Tensor, granularity: ActivationGranularity = "per_token") -> tuple[Tensor, Tensor]:
    """Round activations to 8 bits.

    Args:
        x: Floating, [..., features].
        granularity: One scale for all of x, or one for each token.

    Returns:
        The scale as `compute_x_scale` returns it, and the codes, int8 in x's shape:
        `clip(round(x * (127 / largest magnitude)), -128, 127)`. Where x holds NaN the scale is NaN, so that
        what is computed with it is NaN too.

    Raises:
        QuantizationError: x is not floating, or the granularity is unknown.
    """
    check_field("activation_granularity", granularity)
    scale, codes = eight_bits(x, granularity)
    return scale, codes.to(torch.int8)


def dequantize_x(scale: Tensor, qx: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return `qx * scale`, in `dtype`."""
    return (qx.float() * scale.float()).to(dtype)


def eight_bits(x: Tensor, granularity: str) -> tuple[Tensor, Tensor]:
    """Return what `quantize_x` does, the codes as fp32."""
    magnitude = _largest(x, granularity)
    # The factor in two roundings, as torch divides a number by a tensor.
    codes = (x.float() * (magnitude.reciprocal() * _MOST)).round().clamp(-128, 127)
    return magnitude / _MOST, codes


def check_floating(x: Tensor) -> None:
    """Raise `QuantizationError` if inputs are not floating."""
    if not isinstance(cast("object", x), Tensor) or not x.is_floating_point():
        kind = getattr(x, "dtype", type(x).__name__)
        raise QuantizationError(f"a ternary layer takes floating inputs, but was given {kind}.")


def _largest(x: Tensor, granularity: str) -> Tensor:
    """Return the largest magnitude of each row or of all, fp32 and at least 1e-5."""
    check_floating(x)
    magnitude = x.float().abs()
    if granularity == "per_tensor":
        most = magnitude.amax().view(1) if magnitude.numel() else magnitude.new_zeros(1)
    elif magnitude.shape[-1:].numel():
        most = magnitude.amax(-1, keepdim=True)
    else:
        most = magnitude.new_zeros((*magnitude.shape[:-1], 1))
    return most.clamp(min=_LEAST_MAGNITUDE)
