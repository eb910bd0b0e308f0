"""Integers of 2 to 8 bits: the scale and zero point of a group, and rounding to codes.

The arithmetic is SignRound's (arXiv 2309.05516): everything in float32 with scales that already are rounded
to the dtype in which they will be stored, so that what is trained is to the last bit what is read back.
`low` and `high` are a group's smallest and largest weight, with 0 between them; clipping shrinks them.

No result here is smaller than the formats force it to be: a group's scale has, as its least magnitude, the
least that its dtype holds and that is a normal number in float32 (2**-24 for float16, 2**-126 for bfloat16
and float32). A group of zeros gets that scale, so that nothing is divided by 0.
"""

from __future__ import annotations

import torch
from torch import Tensor

from auto_round.exceptions import QuantizationError


def straight_through_round(x: Tensor) -> Tensor:
    """Round half to even; the gradient passes as if nothing had been rounded.

    Exact for magnitudes below 2**22 in float32.
    """
    return x + (x.round() - x).detach() if x.requires_grad else x.round()


def group_range(w_grouped: Tensor) -> tuple[Tensor, Tensor]:
    """Return `low <= 0 <= high`, float32 `[out, groups]`, of weights `[out, groups, size]`.

    Raises:
        QuantizationError: A weight is NaN or infinite, or the weights are no floats.
    """
    if not w_grouped.is_floating_point():
        raise QuantizationError(
            f"weights are of {w_grouped.dtype}; only floating-point weights are quantised."
        )
    low, high = w_grouped.aminmax(dim=-1)
    low, high = low.float().clamp_max_(0), high.float().clamp_min_(0)
    if not bool((high - low).isfinite().all()) and not bool(w_grouped.isfinite().all()):
        raise QuantizationError(
            f"{int((~w_grouped.isfinite()).sum())} of {w_grouped.numel()} weights are NaN or infinite; the "
            "checkpoint is damaged or its training diverged. Nothing can be quantised from it."
        )
    return low, high


def symmetric_scale(low: Tensor, high: Tensor, bits: int, scale_dtype: torch.dtype) -> Tensor:
    """Return signed scales, float32 of `low`'s shape, that hold values of `scale_dtype`.

    The full range is used: the end of larger magnitude lands on -2**(bits - 1), which makes the scale
    negative where that end is `high`, or where both are equal. Gradients pass through the cast.

    Raises:
        QuantizationError: `scale_dtype` cannot hold a scale that the weights need.
    """
    largest = torch.maximum(-low, high)
    signed = torch.where(-low > high, largest, -largest)
    scale = _stored(signed / 2 ** (bits - 1), scale_dtype, largest)
    least = least_scale(scale_dtype)
    return torch.where(scale < 0, scale.clamp_max(-least), scale.clamp_min(least))


def asymmetric_scale(low: Tensor, high: Tensor, bits: int, scale_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return positive scales that hold values of `scale_dtype`, and zero points, float32 of `low`'s shape.

    The zero point is the whole number of 0 to 2**bits - 1 that stands for 0. A scale that was rounded down
    (by up to a third where float16 has few digits left) can ask for one beyond, which has no place in
    `bits` bits; it is clamped, and the group's lowest weights with it. Gradients pass through cast and
    rounding.

    Raises:
        QuantizationError: `scale_dtype` cannot hold a scale that the weights need.
    """
    most = 2**bits - 1
    scale = _stored((high - low) / most, scale_dtype, torch.maximum(-low, high))
    scale = scale.clamp_min(least_scale(scale_dtype))
    return scale, straight_through_round(-low / scale).clamp(0, most)


def round_to_codes(
    w_grouped: Tensor, scale: Tensor, zero: Tensor | None, bits: int, offset: Tensor | None = None
) -> Tensor:
    """Return codes 0 to 2**bits - 1, uint8 `[out, groups, size]`, of weights of that shape.

    `code = clamp(round(w / scale + offset) + zero)`, half to even. `scale` and `zero` are `[out, groups]`;
    no `zero` means symmetric, 2**(bits - 1). `offset` has the weights' shape or one that broadcasts to it.
    """
    with torch.no_grad():
        units = w_grouped.float() / scale.unsqueeze(-1)
        if offset is not None:
            units += offset
        units.round_()
        units += 2 ** (bits - 1) if zero is None else zero.unsqueeze(-1)
        return units.clamp_(0, 2**bits - 1).to(torch.uint8)


def least_scale(scale_dtype: torch.dtype) -> float:
    """Return the least magnitude of a scale that is stored in this dtype."""
    info = torch.finfo(scale_dtype)
    return max(info.tiny * info.eps, torch.finfo(torch.float32).tiny)


def _stored(scale: Tensor, scale_dtype: torch.dtype, largest: Tensor) -> Tensor:
    with torch.no_grad():
        stored = scale.to(scale_dtype).float()
    # Compiled steps need no look at the values: they only shrink scales that have been looked at.
    if not torch.compiler.is_compiling() and not bool(stored.isfinite().all()):
        raise QuantizationError(
            f"weights of up to {float(largest.max()):.4g} need a scale of {float(scale.abs().max()):.4g}, "
            f"and {scale_dtype} holds at most {torch.finfo(scale_dtype).max:.4g}; set scale_dtype to "
            "bfloat16 or float32, or leave the layer as it is."
        )
    # Through the cast itself gradients would be rounded to scale_dtype too, and small ones become 0 in
    # float16. The sum is exact, since the two lie within a factor of 2 of each other.
    return scale + (stored - scale).detach() if scale.requires_grad else stored
