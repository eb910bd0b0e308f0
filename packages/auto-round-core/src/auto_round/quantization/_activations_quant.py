"""Activations of 8 bits, as fake quantisation: integers of -127 to 127, or E4M3 floats.

Integers leave -128 out, so that a scale is as good for either sign and kernels need no special case. All
arithmetic is in float32, whatever the activations are; what comes back has their dtype. Gradients pass
straight through the rounding. A scale is a constant for them.

NaN stays NaN, and a token with an infinity becomes NaN: whoever checks a loss sees it.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from auto_round.exceptions import QuantizationError
from auto_round.quantization._floats import round_elements

ActivationKind = Literal["int8", "e4m3"]
_LARGEST: dict[ActivationKind, float] = {"int8": 127.0, "e4m3": 448.0}


def amax_to_scale(amax: Tensor, kind: ActivationKind = "int8") -> Tensor:
    """Return the scales, float32 of `amax`'s shape, that bring magnitudes of up to `amax` into the range.

    Never below float32's least normal number, so that an `amax` of 0 is no division by 0.
    """
    return (amax.float() / _LARGEST[kind]).clamp_min(torch.finfo(torch.float32).tiny)


def fake_quantize_tokens(x: Tensor, kind: ActivationKind = "int8") -> Tensor:
    """Round activations `[..., tokens, channels]` with a scale for each token, found as it comes.

    Nothing is beyond a token's range, hence gradients pass everywhere.
    """
    scale = amax_to_scale(x.detach().abs().amax(-1, keepdim=True), kind)
    return _Rounded.apply(x, scale, kind, False)


def fake_quantize_static(x: Tensor, scale: Tensor, kind: ActivationKind = "int8") -> Tensor:
    """Round activations of any shape with one scale, a scalar (see `amax_to_scale`).

    What is beyond the range becomes its end, and no gradient passes there.

    Raises:
        QuantizationError: `scale` is no single number, or not above 0 and finite.
    """
    if scale.numel() != 1 or not bool((scale > 0) & scale.isfinite()):
        given = f"{float(scale):.4g}" if scale.numel() == 1 else f"of shape {list(scale.shape)}"
        raise QuantizationError(
            f"a static scale is {given}; it must be one finite number above 0. Calibrate it on inputs that "
            "reach the layer."
        )
    return _Rounded.apply(x, scale.detach().float().reshape(()), kind, True)


class _Rounded(torch.autograd.Function):
    """Rounded activations; the gradient is passed on, except, with `clips`, of what was beyond the range."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, kind: ActivationKind, clips: bool) -> Tensor:
        units = x.float() / scale
        most = _LARGEST[kind]
        if clips:
            ctx.save_for_backward(units.abs() <= most)
        rounded = units.round_().clamp_(-most, most) if kind == "int8" else round_elements(units, "fp8")
        return rounded.mul_(scale).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        (gradient,) = gradients
        return (gradient * ctx.saved_tensors[0] if ctx.saved_tensors else gradient), None, None, None
