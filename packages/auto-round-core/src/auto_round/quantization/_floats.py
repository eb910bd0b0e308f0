"""Weights in formats of 4 and 8 bits that are floats themselves, rounded exactly to the formats' values.

mxfp4: E2M1 elements, and for each 32 of them a power of two (E8M0). Open Compute Project, Microscaling
Formats (MX) v1.0: the power is that of the largest magnitude less 2, which is E2M1's largest exponent.
nvfp4: E2M1 elements, for each 16 of them an E4M3 scale, and one float32 scale for the matrix, which brings
the largest scale to E4M3's largest number. NVIDIA, Pretraining LLMs with NVFP4 (arXiv 2509.25149).
fp8: E4M3 elements (no infinities, largest 448) and a float32 scale for each group, which usually is a row.
Micikevicius et al., FP8 Formats for Deep Learning (arXiv 2209.05433).

An element is `round(w / scale + offset)` to the nearest value of the format, halves to the even mantissa,
beyond the largest to the largest. A scale is never 0: where the formula gives less than the format's least
scale, it is that one (2**-127, 2**-9 and 2**-126).
"""

from __future__ import annotations

import torch
from torch import Tensor

from auto_round.config_manager import LayerSettings
from auto_round.exceptions import ConfigurationError
from auto_round.quantization._grouping import grouped, row_chunks
from auto_round.quantization._integers import group_range
from auto_round.quantization._quantized import E2M1, QuantizedWeight, scale_values

_E4M3_LARGEST = 448.0
_E4M3_LEAST = 2.0**-9
_FULL = {"mxfp4": 4.0, "nvfp4": 6.0, "fp8": _E4M3_LARGEST}
"""The element on which a group's largest magnitude lands; in mxfp4 somewhere from it to twice of it."""
LARGEST = {"mxfp4": E2M1[-1], "nvfp4": E2M1[-1], "fp8": _E4M3_LARGEST}
"""The largest element."""
_GROUP_SIZES = {"mxfp4": 32, "nvfp4": 16}


def round_elements(x: Tensor, weight_dtype: str) -> Tensor:
    """Return the elements of a format that are nearest to `x`, both float32 and of one shape.

    What becomes 0 keeps its sign.
    """
    if weight_dtype == "fp8":
        return x.clamp(-_E4M3_LARGEST, _E4M3_LARGEST).to(torch.float8_e4m3fn).float()
    magnitude = x.abs()
    # Half to even of whole steps is half to the even mantissa, also where the step changes.
    step = torch.where(magnitude < 2, 0.5, torch.where(magnitude < 4, 1.0, 2.0))
    return (x / step).round_().mul_(step).clamp_(-E2M1[-1], E2M1[-1])


def largest_magnitudes(weight: Tensor, settings: LayerSettings) -> Tensor:
    """Return the largest magnitude of each group, float32 `[out, groups]`, of weights `[out, in]`.

    Raises:
        QuantizationError: As `group_range`.
        ConfigurationError: The format has another group size, or the groups do not divide the rows.
    """
    needed = _GROUP_SIZES.get(settings.weight_dtype, settings.group_size)
    if settings.group_size != needed:
        raise ConfigurationError(
            f"group_size is {settings.group_size}; {settings.weight_dtype} has groups of {needed}."
        )
    low, high = group_range(grouped(weight, settings.group_size))
    return torch.maximum(-low, high)


def full_scale(largest: Tensor, settings: LayerSettings) -> Tensor:
    """Return the scale with which a format's range is used in full, not rounded, of `largest`'s shape."""
    return largest / _FULL[settings.weight_dtype]


def global_scale_of(largest: Tensor, settings: LayerSettings) -> Tensor | None:
    """Return nvfp4's scale of the matrix, a float32 scalar; None for the formats that have none.

    At most 2**116, so that the least scale divided by it is a normal number; 1 for a matrix of zeros.
    """
    if settings.weight_dtype != "nvfp4":
        return None
    most = largest.max() if largest.numel() else largest.new_zeros(())
    whole = (_E4M3_LARGEST * E2M1[-1] / most).clamp_max(2.0**116)
    return torch.where(most == 0, torch.ones_like(whole), whole)


def round_scale(scale: Tensor, settings: LayerSettings, global_scale: Tensor | None) -> Tensor:
    """Return float32 scales as a format stores them (see `QuantizedWeight.scale`).

    Next to `scale` for nvfp4 and fp8, the power of two at or below it for mxfp4.
    """
    if settings.weight_dtype == "mxfp4":
        # frexp's mantissa is below 1: its exponent is one more than that of the leading digit.
        biased = torch.frexp(scale).exponent + (127 - 1)
        return torch.where(scale == 0, 0, biased.clamp_(0, 254)).to(torch.uint8)
    if global_scale is not None:
        return (scale * global_scale).clamp_(_E4M3_LEAST, _E4M3_LARGEST).to(torch.float8_e4m3fn)
    return scale.clamp_min(torch.finfo(torch.float32).tiny)


def encode(
    weight: Tensor,
    settings: LayerSettings,
    scale: Tensor,
    global_scale: Tensor | None,
    offset: Tensor | None = None,
) -> QuantizedWeight:
    """Round weights `[out, in]` with scales that are stored already."""
    codes = torch.empty(weight.shape, dtype=torch.uint8, device=weight.device)
    values = scale_values(scale, settings, global_scale)
    table = torch.tensor(E2M1, dtype=torch.float32, device=weight.device)
    for rows in row_chunks(*weight.shape):
        units = grouped(weight[rows], settings.group_size).float() / values[rows].unsqueeze(-1)
        if offset is not None:
            units += offset[rows]
        elements = round_elements(units, settings.weight_dtype).flatten(1)
        if settings.weight_dtype == "fp8":
            codes[rows] = elements.to(torch.float8_e4m3fn).view(torch.uint8)
        else:
            index = torch.bucketize(elements.abs(), table, out_int32=True)
            codes[rows] = (index + 8 * elements.signbit()).to(torch.uint8)
    return QuantizedWeight(settings=settings, codes=codes, scale=scale, global_scale=global_scale)


def quantize_float(
    weight: Tensor, settings: LayerSettings, *, offset: Tensor | None = None, max_scale: Tensor | None = None
) -> QuantizedWeight:
    """Round weights `[out, in]` to mxfp4, nvfp4 or fp8.

    `offset` `[out, groups, size]` is added to the scaled weights before they are rounded, `max_scale`
    `[out, groups]` multiplies each group's largest magnitude; both float32, without them plain rounding.

    Raises:
        QuantizationError: A weight is NaN or infinite, or the weights are no floats.
        ConfigurationError: The format has another group size, or the groups do not divide the rows.
    """
    with torch.no_grad():
        largest = largest_magnitudes(weight, settings)
        global_scale = global_scale_of(largest, settings)
        clipped = largest if max_scale is None else largest * max_scale
        scale = round_scale(full_scale(clipped, settings), settings, global_scale)
        return encode(weight, settings, scale, global_scale, offset)


def fake_quantize_float(
    w: Tensor, settings: LayerSettings, offset: Tensor | None = None, max_scale: Tensor | None = None
) -> Tensor:
    """Return what `quantize_float` of the same arguments dequantises to, to the last bit.

    Float32 `[out, in]`. Gradients reach `w`, `offset` and `max_scale`: rounding passes them as if nothing had
    been rounded, and none where an element is beyond the largest. A scale counts as proportional to
    `max_scale`, its rounding passed over; the groups' largest magnitudes are constants.

    Raises:
        As `quantize_float`.
    """
    with torch.no_grad():
        largest = largest_magnitudes(w, settings)
        global_scale = global_scale_of(largest, settings)
        clipped = largest if max_scale is None else largest * max_scale
        stored = round_scale(full_scale(clipped, settings), settings, global_scale)
        scale = scale_values(stored, settings, global_scale)
        slope = None if max_scale is None else scale / max_scale.clamp_min(1e-6)
    if slope is not None and max_scale is not None:
        # The added term is 0, and has the gradient.
        scale = scale + slope * (max_scale - max_scale.detach())
    units = grouped(w, settings.group_size).float() / scale.unsqueeze(-1)
    if offset is not None:
        units = units + offset
    most = LARGEST[settings.weight_dtype]
    inside = units.clamp(-most, most)
    elements = inside + (round_elements(units.detach(), settings.weight_dtype) - inside).detach()
    return (elements * scale.unsqueeze(-1)).flatten(1)
