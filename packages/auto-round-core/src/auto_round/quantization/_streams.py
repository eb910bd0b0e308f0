"""The activations between two blocks, of all samples: in memory, or in a file that is read by batches."""

from __future__ import annotations

import os
import random
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import torch
from torch import Tensor

from auto_round.exceptions import ExportError, QuantizationError
from auto_round.low_cpu_mem._stored import memory_of

_Move = Callable[[int, Sequence[memoryview], int], int]


def batches(samples: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    """Yield the samples, at most `size` at a time."""
    for start in range(0, len(samples), size):
        yield samples[start : start + size]


def random_batches(samples: Sequence[int], size: int, seed: str) -> Iterator[list[int]]:
    """Yield batches without end: all in a random order, and in a new one when fewer than `size` are left."""
    generator = random.Random(seed)  # noqa: S311
    while True:
        shuffled = list(samples)
        generator.shuffle(shuffled)
        for start in range(0, len(shuffled) - size + 1, size):
            yield shuffled[start : start + size]


class Stream:
    """One tensor of activations for each of `samples` samples, all of one shape.

    In a file, values are read and written with `pread` and `pwrite` and no page is mapped, so that they
    count as memory of nobody. The file has no name, and goes with the process whatever happens.

    Args:
        samples: How many.
        shape: Of one sample, such as (tokens, width).
        dtype: Of the values.
        folder: Where the file is; None keeps all in memory.

    Raises:
        ExportError: The disk has no room, or the folder cannot be written to.
    """

    def __init__(
        self, samples: int, shape: Sequence[int], dtype: torch.dtype, folder: Path | None = None
    ) -> None:
        self.shape, self.dtype, self._folder = tuple(shape), dtype, folder
        self._sample_bytes = torch.Size(self.shape).numel() * dtype.itemsize
        self._memory: Tensor | None = None
        self._file: int | None = None
        if folder is None:
            self._memory = torch.empty((samples, *self.shape), dtype=dtype)
            return
        try:
            with tempfile.TemporaryFile(dir=folder) as file:
                self._file = os.dup(file.fileno())
                # Room is taken now: a disk that is full in the middle of the work costs hours.
                os.posix_fallocate(self._file, 0, samples * self._sample_bytes)
        except OSError as failure:
            self.close()
            raise ExportError(
                f"{folder} has no room for {samples * self._sample_bytes / 2**20:.0f} MB of activations "
                f"({failure.strerror}). Free some, or name another folder in memory.workspace_dir."
            ) from failure

    def read(self, samples: Sequence[int], *, dtype: torch.dtype | None = None) -> Tensor:
        """Return some samples, [len(samples), *shape], in new memory."""
        if self._memory is not None:
            return self._memory.index_select(0, torch.tensor(samples)).to(dtype or self.dtype)
        result = torch.empty((len(samples), *self.shape), dtype=self.dtype)
        for place, sample in enumerate(samples):
            self._transfer(memory_of(result[place]), sample * self._sample_bytes, os.preadv)
        return result.to(dtype or self.dtype)

    def write(self, samples: Sequence[int], values: Tensor) -> None:
        """Replace some samples by `values`, [len(samples), *shape]."""
        values = values.detach().to("cpu", self.dtype)
        if self._memory is not None:
            self._memory.index_copy_(0, torch.tensor(samples), values)
            return
        values = values.contiguous()
        for place, sample in enumerate(samples):
            self._transfer(memory_of(values[place]), sample * self._sample_bytes, os.pwritev)

    def _transfer(self, buffer: memoryview, offset: int, move: _Move) -> None:
        if self._file is None:
            raise QuantizationError("the stream of activations is closed")
        done = 0
        while done < len(buffer):
            count = move(self._file, [buffer[done:]], offset + done)
            if count == 0:
                raise QuantizationError(f"the file of activations in {self._folder} became shorter")
            done += count

    def close(self) -> None:
        """Let the memory or the file go."""
        self._memory = None
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
