"""One optimizer step over several batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from llm_trainer.training._precision import Precision
from llm_trainer.utils.metrics import batch_loss, count_labels


@dataclass(frozen=True)
class StepResult:
    """What a step did."""

    loss: float
    """Mean loss over the step's labelled tokens."""
    grad_norm: float
    """Norm of the gradient before clipping."""
    labelled: int
    """Tokens that were predicted."""
    tokens: int
    """Tokens that were read, padding not counted."""
    skipped: bool
    """Whether the loss or gradient was not finite, so that nothing was changed."""

    @property
    def changed(self) -> bool:
        """Whether there was an update: no token to predict makes none either."""
        return not self.skipped and self.labelled > 0


def count_tokens(batch: dict[str, Tensor]) -> int:
    """Count the tokens of a batch that are not padding."""
    mask = batch.get("attention_mask")
    return batch["input_ids"].numel() if mask is None else int(mask.ne(0).sum())


def take_step(
    model: nn.Module,
    batches: Sequence[dict[str, Tensor]],
    optimizer: Optimizer,
    precision: Precision,
    device: torch.device,
    max_grad_norm: float | None,
) -> StepResult:
    """Update the model with the mean loss over all labelled tokens of all batches.

    Each batch weighs by its share of those tokens, so the batches together give the gradient of one large
    one, however many they are and however long. A loss or gradient that is not finite changes nothing, and
    neither do batches without a labelled token.
    """
    labels = [count_labels(batch) for batch in batches]
    total, tokens = sum(labels), sum(map(count_tokens, batches))
    if not total:
        return StepResult(loss=0.0, grad_norm=0.0, labelled=0, tokens=tokens, skipped=False)
    loss_sum = torch.zeros((), dtype=torch.float32, device=device)
    for batch, count in zip(batches, labels, strict=True):
        with precision.autocast():
            loss = batch_loss(model, batch, device) * (count / total)
        precision.scaler.scale(loss).backward()  # pyright: ignore[reportUnknownMemberType] - torch's annotation
        loss_sum += loss.detach()
    precision.scaler.unscale_(optimizer)
    parameters = list(model.parameters())
    norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    loss_value, norm_value = float(loss_sum), float(norm)
    finite = _is_finite(loss_value) and _is_finite(norm_value)
    if finite:
        # Only where it is needed: it passes over all gradients.
        if max_grad_norm is not None and norm_value > max_grad_norm:
            torch.nn.utils.clip_grads_with_norm_(parameters, max_grad_norm, norm)
        precision.scaler.step(optimizer)
    # A scaler halves its factor after an overflow, which unscale_ found.
    precision.scaler.update()
    optimizer.zero_grad(set_to_none=True)
    return StepResult(loss_value, norm_value, total, tokens, not finite)


def _is_finite(value: float) -> bool:
    return abs(value) < float("inf")
