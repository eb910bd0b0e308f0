"""Elementwise operations whose backward pass is written out, because it takes fewer passes over memory.

On a CPU these operations, not the matrix products, are the larger part of a small model's step: composed of
torch's own, an RMS norm's backward takes 3 to 5 times as long. None of them can be differentiated twice.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

# torch declares no types for these.
_linalg = cast("Any", torch.linalg)


class _UnitRms(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, eps: float) -> Tensor:
        dtype = torch.promote_types(x.dtype, torch.float32)
        norm: Tensor = _linalg.vector_norm(x, dim=-1, keepdim=True, dtype=dtype)
        scale = norm.square_().div_(x.size(-1)).add_(eps).rsqrt_().to(x.dtype)
        y = x * scale
        ctx.save_for_backward(y, scale)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        y, scale = cast("tuple[Tensor, Tensor]", ctx.saved_tensors)
        mean_product: Tensor = _linalg.vecdot(grad, y).unsqueeze(-1) / y.size(-1)
        return torch.addcmul(grad, y, mean_product, value=-1).mul_(scale), None


def unit_rms(x: Tensor, eps: float) -> Tensor:
    """Scale the last dimension to a root mean square of one."""
    return cast("Tensor", _UnitRms.apply(x, eps))


class _SquaredRelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        positive = F.relu(x)
        ctx.save_for_backward(positive)
        return positive * positive

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        (positive,) = cast("tuple[Tensor]", ctx.saved_tensors)
        return (grad * positive).mul_(2)


def squared_relu(x: Tensor) -> Tensor:
    """Return max(x, 0) squared."""
    return cast("Tensor", _SquaredRelu.apply(x))


class RMSNorm(nn.Module):
    """Scale to unit root mean square, then by a learned weight (Zhang and Sennrich, 2019)."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last dimension."""
        return unit_rms(x, self.eps) * self.weight
