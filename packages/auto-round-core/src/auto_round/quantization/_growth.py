"""Scales that Adam trains relative to their first values: `start * (1 + growth)`, as they are stored.

The gradient passes the rounding to the type in which scales are stored as if there were none.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from auto_round.quantization._integers import least_scale

FIRST, SECOND = 0.9, 0.999
"""Adam's memory of the gradient and of its square."""
TINY = 1e-30


def corrections(count: int) -> tuple[float, float]:
    """Return what Adam's averages are short of at a step, from 1: a factor of the rate, and a divisor."""
    return 1 / (1 - FIRST**count), math.sqrt(1 - SECOND**count)


def step_growth(
    growth: Tensor, mean: Tensor, square: Tensor, gradient: Tensor, *, rate: float, root: float
) -> None:
    """Take a step of Adam in place, all of one shape.

    Args:
        growth: What is trained, held from -0.5 to 1.
        mean: Adam's memory of the gradient.
        square: Of its square.
        gradient: With respect to the growth, which is that of the scale times its first value.
        rate: The learning rate, times the first of the step's `corrections`.
        root: The second of them.
    """
    mean.lerp_(gradient, 1 - FIRST)
    square.mul_(SECOND).addcmul_(gradient, gradient, value=1 - SECOND)
    size = square.sqrt().div_(root).add_(TINY)
    growth.sub_(mean / size * rate).clamp_(-0.5, 1)


def grown_scale(start: Tensor, growth: Tensor, scale_dtype: torch.dtype) -> Tensor:
    """Return `start * (1 + growth)` as it is stored, in `start`'s shape.

    Neither nothing nor more than the type holds, and of the sign that `start` has.
    """
    start = start.float()
    scale = (start * (1 + growth.view(start.shape))).to(scale_dtype).float()
    least, most = least_scale(scale_dtype), torch.finfo(scale_dtype).max
    return scale.abs().clamp_(least, most).mul_(start.sign()).to(scale_dtype)
