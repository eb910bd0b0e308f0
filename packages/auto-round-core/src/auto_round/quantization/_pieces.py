"""Work on large weights in pieces that stay in a processor's cache."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from contextlib import contextmanager
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

_CPU_VALUES = 1 << 16
_COMPILED_VALUES = 1 << 18
_GPU_VALUES = 1 << 24
_BUFFERS = 5

Buffers = tuple[Tensor | None, ...]
"""Where what is worked out on the way may be written; None for memory of its own."""


class WeightRows(Protocol):
    """A matrix [rows, in] whose rows are asked for by slices, such as one on disk; a tensor is one too."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Rows and inputs."""
        ...

    def __getitem__(self, rows: slice, /) -> Tensor:
        """Return some rows, fp32 and contiguous; they are not to be changed."""
        ...


class Piece(NamedTuple):
    """A part of a matrix: some of its rows, which are some of its groups."""

    rows: slice
    groups: slice


class Scratch:
    """Buffers for one piece of a weight.

    Args:
        device: Where the weights are. On a GPU pieces are large, since there starting an operation is what
            costs.
        compiles: What is done with a piece is compiled: there are no buffers, and pieces are larger.
    """

    def __init__(self, device: torch.device, *, compiles: bool = False) -> None:
        on_cpu = _COMPILED_VALUES if compiles else _CPU_VALUES
        self._values = on_cpu if device.type == "cpu" else _GPU_VALUES
        self.device, self.compiles = device, compiles
        self._buffers: list[Tensor] = []

    def pieces(self, shape: tuple[int, ...], size: int) -> Iterator[Piece]:
        """Yield the parts of a matrix [rows, in] in groups of `size` that fit a buffer, or hold one row."""
        rows, width = shape
        most, groups = max(1, self._values // max(1, width)), width // size
        for start in range(0, rows, most):
            end = min(start + most, rows)
            yield Piece(slice(start, end), slice(start * groups, end * groups))

    def buffers(self, like: Tensor) -> Buffers:
        """Return buffers of a tensor's shape, in fp32; what they hold is left over."""
        if self.compiles:
            return (None,) * _BUFFERS
        count = like.numel()
        if not self._buffers or len(self._buffers[0]) < count:
            self._buffers = list(torch.empty(_BUFFERS, count, dtype=torch.float32, device=self.device))
        return tuple(buffer[:count].view(like.shape) for buffer in self._buffers)


def part(tensor: Tensor, rows: slice) -> Tensor:
    """Return some rows as a tensor of its own with the same memory.

    To autograd it is no view: steps would be compiled once more for each form of what is viewed.
    """
    return tensor[rows].data


@contextmanager
def opened(target: Tensor, piece: Piece) -> Generator[Tensor]:
    """Give a piece of a matrix as [groups, size] to be written; the matrix has it afterwards."""
    rows = part(target, piece.rows)
    count = piece.groups.stop - piece.groups.start
    if rows.is_contiguous():
        yield rows.view(count, -1).data
    else:
        groups = torch.empty(count, rows.numel() // count, dtype=rows.dtype, device=rows.device)
        yield groups
        rows.copy_(groups.view(rows.shape))
