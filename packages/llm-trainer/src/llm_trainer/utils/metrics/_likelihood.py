"""How well a model predicts text."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from typing import Protocol, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from llm_trainer.data import LanguageModelingDataset
from llm_trainer.exceptions import DataError
from llm_trainer.models._evaluation_mode import evaluation_mode

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


class ByteCounter(Protocol):
    """A tokenizer that knows how much text a token stands for; those of `llm_trainer.tokenizer` do."""

    def token_byte_lengths(self) -> npt.NDArray[np.int64]:
        """Return the number of UTF-8 bytes that each id stands for; 0 for the special ones."""
        ...


def bits_per_byte(
    loss: float,
    dataset: LanguageModelingDataset | Iterable[Mapping[str, Tensor]],
    tokenizer: ByteCounter | None = None,
) -> float:
    """Convert a mean loss on a dataset, in nats a token, into bits a byte of its text.

    It compares models with different tokenizers: loss * tokens / (ln 2 * UTF-8 bytes). End-of-text tokens
    are counted, for knowing where a text ends is part of knowing the text; beginning-of-text tokens are
    not.

    Args:
        loss: What `mean_loss` or `Trainer.evaluate` returned for the dataset.
        dataset: A `LanguageModelingDataset`, whose texts' bytes are counted, and for which the first token
            of a row, which nothing predicts, is taken to cost as much as the others do; with a tokenizer
            any rows or batches with `labels`.
        tokenizer: Counts the tokens that are predicted and their bytes, and so no others: exact also for
            rows that lack a part of the texts.

    Raises:
        DataError: There is no byte of text, or a label that the tokenizer does not know, or the dataset
            needs the tokenizer.
    """
    if tokenizer is not None:
        tokens, text_bytes = _count_predicted(
            cast("Iterable[Mapping[str, Tensor]]", dataset), tokenizer.token_byte_lengths()
        )
    elif isinstance(dataset, LanguageModelingDataset):
        stats = dataset.get_stats()
        tokens, text_bytes = stats["num_tokens"] - stats["num_documents"], stats["num_text_bytes"]
    else:
        raise DataError(
            "Only a LanguageModelingDataset counts its bytes; give the tokenizer of the rows too."
        )
    if not text_bytes:
        raise DataError("The data have no byte of text to predict, so there are no bits a byte.")
    return loss * tokens / (math.log(2) * text_bytes)


def _count_predicted(
    rows: Iterable[Mapping[str, Tensor]], byte_lengths: npt.NDArray[np.int64]
) -> tuple[int, int]:
    lengths = torch.as_tensor(byte_lengths)
    tokens = text_bytes = 0
    for row in rows:
        labels = row["labels"][..., 1:]
        predicted = labels[labels != _IGNORE_INDEX].cpu()
        if predicted.numel() and not 0 <= int(predicted.min()) <= int(predicted.max()) < len(lengths):
            raise DataError(
                f"The labels hold ids from {int(predicted.min())} to {int(predicted.max())}, the tokenizer "
                f"has {len(lengths)}; give the one that the data were encoded with."
            )
        tokens += predicted.numel()
        text_bytes += int(lengths[predicted].sum())
    return tokens, text_bytes
