"""Which token comes next."""

from __future__ import annotations

import torch
from torch import Tensor

from bitmodels.exceptions import QuantizationError

__all__ = ["chosen"]


def chosen(
    logits_BV: Tensor,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    generator: torch.Generator | None,
) -> Tensor:
    """Return one token for each row of logits, int64 [B].

    Raises:
        QuantizationError: A value is impossible.
    """
    if not temperature >= 0:
        raise QuantizationError(f"temperature is {temperature}; it must not be negative.")
    if top_k is not None and top_k < 1:
        raise QuantizationError(f"top_k is {top_k}; it must be 1 or more.")
    if top_p is not None and not 0 < top_p <= 1:
        raise QuantizationError(f"top_p is {top_p}; it must be above 0 and at most 1.")
    if temperature == 0:
        return logits_BV.argmax(-1)
    if top_k is not None and top_k < logits_BV.shape[-1]:
        least = logits_BV.topk(top_k).values[:, -1:]
        logits_BV = logits_BV.masked_fill(logits_BV < least, -torch.inf)
    probabilities = ((logits_BV - logits_BV.amax(-1, keepdim=True)) / temperature).softmax(-1)
    if top_p is not None and top_p < 1:
        ordered, order = probabilities.sort(descending=True)
        # The first is always among them: what comes before it adds up to nothing.
        left_out = ordered.cumsum(-1) - ordered >= top_p
        probabilities = probabilities.masked_fill(left_out.scatter(1, order, left_out), 0.0)
    return torch.multinomial(probabilities, 1, generator=generator).squeeze(1)
