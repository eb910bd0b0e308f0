"""Work on large weights in pieces that stay in a processor's cache."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor

_CPU_VALUES = 1 << 16
_GPU_VALUES = 1 << 24
_BUFFERS = 5


class WeightRows(Protocol):
    """A matrix [rows, in] whose rows are asked for by slices, such as one on disk; a tensor is one too."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Rows and inputs."""
        ...

    def __getitem__(self, rows: slice, /) -> Tensor:
        """Return some rows, fp32 and contiguous; they are not to be changed."""
        ...


class Scratch:
    """Buffers for one piece of a weight.

    Args:
        device: Where the weights are. On a GPU pieces are large, since there starting an operation is what
            costs.
    """

    def __init__(self, device: torch.device) -> None:
        self._values = _CPU_VALUES if device.type == "cpu" else _GPU_VALUES
        self.device = device
        self._buffers: list[Tensor] = []

    def pieces(self, tensor: Tensor) -> Iterator[slice]:
        """Yield slices of the first dimension that fit a buffer, or hold one row."""
        rows = max(1, self._values // max(1, tensor[0].numel()))
        for start in range(0, len(tensor), rows):
            yield slice(start, min(start + rows, len(tensor)))

    def take(self, index: int, like: Tensor) -> Tensor:
        """Return buffer number `index` in a tensor's shape, in fp32; what it holds is left over."""
        count = like.numel()
        if not self._buffers or len(self._buffers[0]) < count:
            self._buffers = [torch.empty(count, device=self.device) for _ in range(_BUFFERS)]
        return self._buffers[index][:count].view(like.shape)
