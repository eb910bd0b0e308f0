"""How well a model predicts."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from typing import cast

import torch
from torch import Tensor, nn

from llm_trainer.data import LanguageModelingDataset
from llm_trainer.exceptions import DataError
from llm_trainer.models._evaluation_mode import evaluation_mode

__all__ = ["batch_loss", "bits_per_byte", "compute_perplexity", "count_labels", "mean_loss", "perplexity_of"]

_IGNORE_INDEX = -100


def count_labels(batch: dict[str, Tensor]) -> int:
    """Count the tokens that a batch asks to predict; the first of a row has nothing before it."""
    return int((batch["labels"][:, 1:] != _IGNORE_INDEX).sum())


def batch_loss(model: nn.Module, batch: dict[str, Tensor], device: torch.device) -> Tensor:
    """Return the mean loss over the batch's labelled tokens, in nats a token."""
    names = batch.keys() & {"input_ids", "attention_mask", "labels"}
    moved = {name: batch[name].to(device, non_blocking=True) for name in names}
    output = model(moved["input_ids"], moved.get("attention_mask"), moved["labels"], return_logits=False)
    return cast("Tensor", output.loss)


@torch.inference_mode()
def mean_loss(
    model: nn.Module,
    batches: Iterable[dict[str, Tensor]],
    device: torch.device,
    *,
    stop: Callable[[], bool] = lambda: False,
) -> tuple[float, int]:
    """Return the mean loss over all labelled tokens, in nats, and their number, in evaluation mode.

    Args:
        model: A `TransformerLM`, or a module that is called alike.
        batches: Dictionaries with `input_ids`, `labels` and, if wanted, `attention_mask`.
        device: Where the model is.
        stop: Asked before each batch; True ends the count there.
    """
    total, tokens = 0.0, 0
    with evaluation_mode(model):
        for batch in batches:
            if stop():
                break
            count = count_labels(batch)
            total += float(batch_loss(model, batch, device)) * count
            tokens += count
    return total / max(tokens, 1), tokens


def perplexity_of(loss: float) -> float:
    """Return e to the power of a loss in nats a token; infinity where that is too large, nan of nan."""
    return math.inf if loss > 709 else math.exp(loss)


def compute_perplexity(
    model: nn.Module,
    dataloader: Iterable[dict[str, Tensor]],
    device: torch.device | str,
    amp_dtype: torch.dtype | None = None,
) -> float:
    """Return e to the power of the mean loss over all labelled tokens.

    Every token weighs the same, whatever the sizes of the batches, so it is not the mean of their
    perplexities.

    Args:
        model: A `TransformerLM` on `device`.
        dataloader: Batches with `input_ids`, `labels` and, if wanted, `attention_mask`.
        device: Where to compute.
        amp_dtype: Half precision for the matrix products; None leaves the model's own.

    Raises:
        DataError: There is no token to predict.
    """
    place = torch.device(device)
    with nullcontext() if amp_dtype is None else torch.autocast(place.type, dtype=amp_dtype):
        loss, tokens = mean_loss(model, dataloader, place)
    if not tokens:
        raise DataError("The data have no token to predict, so there is no perplexity.")
    return perplexity_of(loss)


def bits_per_byte(loss: float, dataset: LanguageModelingDataset) -> float:
    """Convert a mean loss on a dataset, in nats a token, into bits a byte of its text.

    It compares models with different tokenizers: loss * tokens / (ln 2 * UTF-8 bytes). End-of-text tokens
    are counted, for knowing where a text ends is part of knowing the text; beginning-of-text tokens are
    not. The first token of a row, which nothing predicts, is taken to cost as much as the others do.
    """
    stats = dataset.get_stats()
    tokens = stats["num_tokens"] - stats["num_documents"]
    return loss * tokens / (math.log(2) * stats["num_text_bytes"])
