"""Cross-entropy of a linear classifier without holding all of its logits.

Letters: N tokens, D model width, V vocabulary.
"""

from __future__ import annotations

from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from llm_trainer.models._onednn import serves, times_transposed

IGNORE_INDEX = -100
# So many that adding to the weight's gradient, once a chunk, costs little beside the products.
_CHUNK_LOGITS = 1 << 23
# On a CPU the passes of a softmax go over a part of a chunk that stays in a core's cache.
_CACHED_LOGITS = 1 << 18


def soft_cap(logits: Tensor, cap: float | None) -> Tensor:
    """Bound logits smoothly to (-cap, cap)."""
    return logits if cap is None else cap * torch.tanh(logits / cap)


def _losses_and_slopes_(
    logits_RV: Tensor, targets_R1: Tensor, cap: float | None, weights_R1: Tensor | None
) -> Tensor:
    """Return each row's cross-entropy (R, 1); with weights, put the weighted gradient into the logits."""
    values = soft_cap(logits_RV.float(), cap)
    slope = None if cap is None or weights_R1 is None else 1 - (values / cap).square()
    picked = values.gather(1, targets_R1)
    highest = values.amax(-1, keepdim=True)
    sums = values.sub_(highest).exp_().sum(-1, keepdim=True)
    if weights_R1 is not None:
        values.mul_(weights_R1 / sums).scatter_add_(1, targets_R1, -weights_R1)
        if slope is not None:
            values *= slope
        if values.data_ptr() != logits_RV.data_ptr():
            logits_RV.copy_(values)
    return sums.log_().add_(highest).sub_(picked)


class _LinearCrossEntropy(torch.autograd.Function):
    """Mean of cross-entropies, with the gradients computed chunk by chunk beside the loss.

    The products with the weight may run in half precision; softmax and loss are in float32.
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
        # Copied once, instead of for each chunk.
        weight_DV = weight.T.contiguous() if needs_x and serves(x, weight) else weight.T
        grad_x = torch.empty_like(x) if needs_x else None
        grad_weight = torch.zeros_like(weight_VD, dtype=torch.float32) if needs_weight else None
        kept_N1 = (targets_N != IGNORE_INDEX)[:, None]
        safe_N1 = torch.where(kept_N1, targets_N[:, None], 0)
        share = 1 / kept_N1.sum().clamp(min=1).float()
        # Divided by the number of tokens, float16 gradients would be too small to be told from zero.
        late = share if dtype is torch.float16 else None
        weights_N1 = kept_N1.float() if late is not None else kept_N1 * share
        losses_N1 = torch.empty_like(kept_N1, dtype=torch.float32)
        rows = max(1, _CHUNK_LOGITS // weight.size(0))
        step = max(1, _CACHED_LOGITS // weight.size(0)) if x.device.type == "cpu" else rows
        for start in range(0, x.size(0), rows):
            chunk = slice(start, min(start + rows, x.size(0)))
            logits = times_transposed(x[chunk], weight)
            for first in range(start, chunk.stop, step):
                part = slice(first, min(first + step, chunk.stop))
                losses_N1[part] = _losses_and_slopes_(
                    logits[first - start : part.stop - start],
                    safe_N1[part],
                    cap,
                    weights_N1[part] if needs_x or needs_weight else None,
                )
            if grad_x is not None:
                grad_x[chunk] = times_transposed(logits, weight_DV)
            if grad_weight is not None:
                grad_weight += times_transposed(logits.T, x[chunk].T)
        ctx.save_for_backward(grad_x, grad_weight, late)
        ctx.dtypes = x_ND.dtype, weight_VD.dtype
        # Not a product with the mask: what is left out may be infinite.
        return losses_N1.masked_fill_(~kept_N1, 0).sum() * share

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        grad_x, grad_weight, late = cast(
            "tuple[Tensor | None, Tensor | None, Tensor | None]", ctx.saved_tensors
        )
        scale = grad_outputs[0] if late is None else grad_outputs[0] * late
        # On a GPU the question would make the host wait; on a CPU it saves a pass over the weight's gradient.
        if scale.device.type == "cpu" and scale == 1:
            scale = None
        return (
            *map(partial(_scaled, scale=scale), (grad_x, grad_weight), ctx.dtypes),
            None,
            None,
            None,
            None,
        )


def _scaled(gradient: Tensor | None, dtype: torch.dtype, scale: Tensor | None) -> Tensor | None:
    if gradient is None:
        return None
    return (gradient if scale is None else gradient * scale).to(dtype)


def linear_cross_entropy(
    x_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, cap: float | None = None
) -> Tensor:
    """Return the mean of -log softmax(cap(x W'))[target] over the targets that are not -100; 0 if all are.

    The logits of eight million (token, class) pairs, or of one token, are held at a time, in the dtype of the
    products, so they take 17 MB in half precision and twice that in float32; on a GPU the softmax of a chunk
    takes its float32 copy as well. The gradients are computed in the forward pass and kept until the
    backward: that of the weight in float32, V x D, with one to one and a half times as much again while a
    chunk is added to it. Where torch computes no gradients (`torch.no_grad`), neither is there. In half
    precision there are copies of the input and the weight too. Under autocast the products run in its dtype.
    A second derivative raises `RuntimeError`.
    """
    device = x_ND.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight_VD.dtype
    with torch.autocast(device, enabled=False):
        return cast(
            "Tensor",
            _LinearCrossEntropy.apply(x_ND, weight_VD, targets_N, cap, dtype, torch.is_grad_enabled()),
        )


def next_token_targets(labels_BT: Tensor) -> Tensor:
    """Shift labels so that position t holds the label of t + 1; the last one has none."""
    return F.pad(labels_BT[:, 1:], (0, 1), value=IGNORE_INDEX)
