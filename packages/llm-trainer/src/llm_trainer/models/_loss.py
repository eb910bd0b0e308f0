"""Cross-entropy of a linear classifier without holding all of its logits.

Letters: N tokens, D model width, V vocabulary.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

IGNORE_INDEX = -100
_CHUNK_LOGITS = 1 << 20


def soft_cap(logits: Tensor, cap: float | None) -> Tensor:
    """Bound logits smoothly to (-cap, cap)."""
    return logits if cap is None else cap * torch.tanh(logits / cap)


class _LinearCrossEntropy(torch.autograd.Function):
    """Sum of cross-entropies, with the gradients computed chunk by chunk beside the loss.

    The product with the weight may run in half precision; softmax and loss are in float32.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x_ND: Tensor,
        weight_VD: Tensor,
        targets_N: Tensor,
        cap: float | None,
        dtype: torch.dtype,
        gradients: bool,
    ) -> Tensor:
        x, weight = x_ND.to(dtype), weight_VD.to(dtype)
        # needs_input_grad only tells of the inputs; whether gradients are wanted at all, the caller must.
        needs_x, needs_weight = (gradients and needed for needed in ctx.needs_input_grad[:2])
        grad_x = torch.empty_like(x) if needs_x else None
        grad_weight = torch.zeros_like(weight_VD, dtype=torch.float32) if needs_weight else None
        loss = torch.zeros((), dtype=torch.float32, device=x.device)
        rows = max(1, _CHUNK_LOGITS // weight.size(0))
        for start in range(0, x.size(0), rows):
            chunk, targets = x[start : start + rows], targets_N[start : start + rows]
            logits = soft_cap((chunk @ weight.T).float(), cap)
            kept = targets != IGNORE_INDEX
            safe = torch.where(kept, targets, 0)[:, None]
            log_sums = torch.logsumexp(logits, dim=-1)
            loss += ((log_sums - logits.gather(1, safe).squeeze(1)) * kept).sum()
            if grad_x is None and grad_weight is None:
                continue
            slope = None if cap is None else 1 - (logits / cap).square()
            grad = logits.sub_(log_sums[:, None]).exp_()
            grad.scatter_add_(1, safe, torch.full_like(safe, -1, dtype=grad.dtype))
            grad *= kept[:, None]
            if slope is not None:
                grad *= slope
            grad_low = grad.to(dtype)
            if grad_x is not None:
                torch.mm(grad_low, weight, out=grad_x[start : start + rows])
            if grad_weight is not None:
                grad_weight += grad_low.T @ chunk
        ctx.save_for_backward(grad_x, grad_weight)
        ctx.dtypes = x_ND.dtype, weight_VD.dtype
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        grad_x, grad_weight = cast("tuple[Tensor | None, Tensor | None]", ctx.saved_tensors)
        scale = grad_outputs[0]
        x_dtype, weight_dtype = ctx.dtypes
        return (
            None if grad_x is None else (grad_x * scale).to(x_dtype),
            None if grad_weight is None else (grad_weight * scale).to(weight_dtype),
            None,
            None,
            None,
            None,
        )


def linear_cross_entropy(
    x_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, cap: float | None = None
) -> Tensor:
    """Return the mean of -log softmax(cap(x W'))[target] over the targets that are not -100; 0 if all are.

    The logits of a million (token, class) pairs, or of one token, are held at a time; a few copies of them
    in float32 (some 20 MB) are all that depends on the chunk. The gradients are computed in the forward pass
    and kept until the backward: that of the weight in float32, V x D, with one to one and a half times as
    much again while a chunk is added to it. Where torch computes no gradients (`torch.no_grad`), neither is
    there. In half precision there are copies of the input and the weight too. Under autocast the
    products run in its dtype.
    A second derivative raises `RuntimeError`.
    """
    device = x_ND.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight_VD.dtype
    with torch.autocast(device, enabled=False):
        total = cast(
            "Tensor",
            _LinearCrossEntropy.apply(x_ND, weight_VD, targets_N, cap, dtype, torch.is_grad_enabled()),
        )
    return total / (targets_N != IGNORE_INDEX).sum().clamp(min=1)


def next_token_targets(labels_BT: Tensor) -> Tensor:
    """Shift labels so that position t holds the label of t + 1; the last one has none."""
    return F.pad(labels_BT[:, 1:], (0, 1), value=IGNORE_INDEX)
