"""Weights of a model that are read from disk once and kept in the computer's memory."""

from __future__ import annotations

import threading

import torch
from torch import Tensor, nn

from auto_round.low_cpu_mem._checkpoint import CheckpointReader
from auto_round.low_cpu_mem._weights import ModelWeights


class HostWeights(ModelWeights):
    """Weights that stay in the computer's memory once they were read, where that is wanted.

    They are pinned if there is a CUDA device, so that copies to it are fast. What is returned is what is
    kept: it must not be changed.

    Args:
        model: As for `ModelWeights`.
        reader: As for `ModelWeights`.
    """

    def __init__(self, model: nn.Module, reader: CheckpointReader) -> None:
        super().__init__(model, reader)
        self.keep = False
        """Whether what is read from now on stays."""
        self._kept: dict[tuple[str, torch.dtype | None], Tensor] = {}
        self._keeping = threading.Lock()

    def read(self, name: str, *, dtype: torch.dtype | None = None) -> Tensor:
        """Return a tensor as `ModelWeights.read` does."""
        if not self.keep:
            return super().read(name, dtype=dtype)
        key = self.tied_to(name), dtype
        with self._keeping:
            if key not in self._kept:
                value = super().read(name, dtype=dtype)
                self._kept[key] = value.pin_memory() if torch.cuda.is_available() else value
            return self._kept[key]

    def read_rows(self, name: str, rows: slice | Tensor, *, dtype: torch.dtype | None = None) -> Tensor:
        """Return rows as `ModelWeights.read_rows` does; they are taken from the whole tensor."""
        if not self.keep:
            return super().read_rows(name, rows, dtype=dtype)
        return self.read(name, dtype=dtype)[rows if isinstance(rows, slice) else rows.cpu()]
