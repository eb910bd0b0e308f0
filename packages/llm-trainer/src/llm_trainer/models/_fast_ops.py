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

from llm_trainer.models import _onednn

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


class _HalfLinear(torch.autograd.Function):
    """A product in half precision with a weight in float32, whose gradient is in float32 too."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
        x_low, weight_low = x.to(dtype), weight.to(dtype)
        ctx.save_for_backward(x_low, weight_low)
        ctx.dtypes = x.dtype, weight.dtype
        ctx.has_bias = bias is not None
        return F.linear(x_low, weight_low, None if bias is None else bias.to(dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, weight = cast("tuple[Tensor, Tensor]", ctx.saved_tensors)
        x_dtype, weight_dtype = ctx.dtypes
        rows_x, rows_grad = x.flatten(0, -2), grad.flatten(0, -2)
        grad_x = (grad @ weight).to(x_dtype) if ctx.needs_input_grad[0] else None
        grad_weight = _transposed_product(rows_grad, rows_x).to(weight_dtype)
        grad_bias = rows_grad.sum(0, dtype=weight_dtype) if ctx.has_bias else None
        return grad_x, grad_weight, grad_bias, None


def _transposed_product(a: Tensor, b: Tensor) -> Tensor:
    """Return a' b. oneDNN multiplies with a transposed first factor at half of its speed, so a copy pays."""
    if torch.compiler.is_compiling() or a.size(1) <= b.size(1):
        return a.t().contiguous() @ b
    # Copying a wide matrix is slow as well; the narrow one, then.
    return (b.t().contiguous() @ a).t().contiguous()


class _OneDnnLinear(torch.autograd.Function):
    """A float32 product by oneDNN, where torch takes MKL's."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.has_bias = bias is not None
        return _onednn.linear(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, weight = cast("tuple[Tensor, Tensor]", ctx.saved_tensors)
        rows_x, rows_grad = x.flatten(0, -2), grad.flatten(0, -2)
        grad_x = _onednn.linear(grad, weight.t()) if ctx.needs_input_grad[0] else None
        grad_weight = _onednn.linear(rows_grad.t(), rows_x.t())
        return grad_x, grad_weight, rows_grad.sum(0) if ctx.has_bias else None


class Linear(nn.Linear):
    """`nn.Linear`, with passes of its own on a CPU: for half precision, and for float32 where oneDNN is the
    faster.
    """

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - the name in nn.Linear
        """Return x W' + b, in autocast's dtype under autocast."""
        trains = torch.is_grad_enabled() and self.weight.requires_grad
        if torch.is_autocast_enabled(input.device.type):
            if input.device.type != "cpu" or not trains:
                return super().forward(input)
            dtype = torch.get_autocast_dtype("cpu")
            return cast("Tensor", _HalfLinear.apply(input, self.weight, self.bias, dtype))
        if not _onednn.serves(input, self.weight):
            return super().forward(input)
        if trains or (torch.is_grad_enabled() and input.requires_grad):
            return cast("Tensor", _OneDnnLinear.apply(input, self.weight, self.bias))
        return _onednn.linear(input, self.weight, self.bias)


class RMSNorm(nn.Module):
    """Scale to unit root mean square, then by a learned weight (Zhang and Sennrich, 2019)."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last dimension."""
        return unit_rms(x, self.eps) * self.weight
