"""Batches of rows."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.data import (
    DataLoader,
    Dataset,
    default_collate,  # pyright: ignore[reportUnknownVariableType]
)


def create_dataloader(
    dataset: Dataset[dict[str, Tensor]],
    batch_size: int = 32,
    shuffle: bool = True,
    num_workers: int = 0,
    pin_memory: bool | None = None,
    drop_last: bool = False,
    seed: int | None = None,
) -> DataLoader[dict[str, Tensor]]:
    """Return a loader of batches without the columns at their end that are padding in every row.

    Args:
        dataset: Rows, such as `LanguageModelingDataset`.
        batch_size: Rows in a batch.
        shuffle: Whether each pass takes the rows in another order.
        num_workers: Processes that prepare batches; rows that are in memory need none.
        pin_memory: Whether batches are made ready for copying to a GPU; None where there is one.
        drop_last: Whether a last, smaller batch is left out.
        seed: Of the order; None takes torch's.
    """
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    return DataLoader(
        dataset,
        batch_size=batch_size,
        shuffle=shuffle,
        num_workers=num_workers,
        pin_memory=torch.cuda.is_available()
        if pin_memory is None
        else pin_memory and torch.cuda.is_available(),
        drop_last=drop_last,
        generator=generator,
        collate_fn=collate,
        persistent_workers=num_workers > 0,
    )


def collate(rows: list[dict[str, Tensor]]) -> dict[str, Any]:
    """Stack rows and cut off what is padding at the end of all of them."""
    batch = default_collate(rows)
    mask = batch.get("attention_mask")
    if mask is None:
        return batch
    # The first column counts as used, lest rows of padding alone have none; the least that predicts is two.
    columns = mask.ne(0).any(dim=0)
    columns[0] = True
    used = max(2, int(columns.nonzero()[-1]) + 1)
    return {
        name: value[:, :used] if getattr(value, "shape", ())[:2] == mask.shape else value
        for name, value in batch.items()
    }
