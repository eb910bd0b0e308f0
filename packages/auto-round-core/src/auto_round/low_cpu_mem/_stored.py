"""A tensor that is still on disk, and how its values come into memory."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import cast

import torch
from torch import Tensor

from auto_round.exceptions import CheckpointError
from auto_round.low_cpu_mem._sources import Source

PIECE_BYTES = 1 << 20
"""What is read at most beside the result, where values must be converted or put into another order."""

_MOST_REPEATED_BYTES = 1 << 26
# Values are moved as integers of their size: every type has a copy then, and no bit of a NaN changes.
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True, kw_only=True)
class StoredTensor:
    """Where the values of one tensor are."""

    source: Source
    """The file."""
    offset: int
    """Byte at which the first value is."""
    dtype: torch.dtype
    """Type of the stored values."""
    shape: tuple[int, ...]
    """Shape."""
    stride: tuple[int, ...]
    """Values, not bytes, from one index to the next, for each dimension; none is negative."""

    @property
    def nbytes(self) -> int:
        """Bytes that the tensor takes once it is in memory, in its own type."""
        return math.prod(self.shape) * self.dtype.itemsize

    def span(self) -> int:
        """Bytes from the first value to the last, both included."""
        return _span(self.shape, self.stride) * self.dtype.itemsize

    def check(self, start: int, end: int) -> None:
        """Refuse a tensor that reaches outside bytes `start` to `end`, or repeats a few bytes without end.

        Raises:
            CheckpointError: It does.
        """
        check_shape(self.shape, self.dtype.itemsize)
        if self.offset < start or self.offset + self.span() > end:
            raise CheckpointError(
                f"its shape {self.shape} and strides {self.stride} reach outside its {end - start} bytes"
            )
        if self.nbytes > max(end - start, _MOST_REPEATED_BYTES):
            raise CheckpointError(
                f"its shape {self.shape} repeats {end - start} bytes up to {self.nbytes} bytes"
            )

    def read(self, dtype: torch.dtype | None = None) -> Tensor:
        """Return the values as a new contiguous tensor on the CPU.

        Raises:
            CheckpointError: The file ends early, or the values cannot become `dtype`.
        """
        result = torch.empty(self.shape, dtype=self._result_type(dtype), device="cpu")
        self._fill(result)
        return result

    def read_rows(self, rows: slice | Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """Return `self[rows]` as a new contiguous tensor on the CPU, without reading the other rows.

        Raises:
            CheckpointError: There is no such row, or as in `read`.
        """
        if not self.shape:
            raise CheckpointError("it is a scalar and has no rows")
        count = self.shape[0]
        if isinstance(rows, slice):
            start, stop, step = rows.indices(count)
            for bound in (rows.start, rows.stop):
                if bound is not None and not -count <= bound <= count:
                    raise CheckpointError(f"{rows} reaches outside its {count} rows")
            if step > 0:
                return self._rows(start, len(range(start, stop, step)), step).read(dtype)
            rows = torch.tensor(list(range(start, stop, step)), dtype=torch.int64, device="cpu")
        rows = _checked_rows(rows, count)
        result = torch.empty((len(rows), *self.shape[1:]), dtype=self._result_type(dtype), device="cpu")
        if result.numel():
            self._gather(result, rows)
        return result

    def _rows(self, start: int, count: int, step: int = 1) -> StoredTensor:
        offset = self.offset + start * self.stride[0] * self.dtype.itemsize
        return StoredTensor(
            source=self.source,
            offset=offset,
            dtype=self.dtype,
            shape=(count, *self.shape[1:]),
            stride=(self.stride[0] * step, *self.stride[1:]),
        )

    def _gather(self, result: Tensor, rows: Tensor) -> None:
        wanted, order = torch.sort(rows, stable=True)
        # A new run begins where the next row in the file is neither the same nor the one after.
        starts = [0, *_numbers(torch.nonzero(wanted.diff() > 1).flatten() + 1), len(wanted)]
        # Rows that go to consecutive places, each once, need no detour.
        straight = torch.ones_like(wanted)
        straight[1:] = (wanted.diff() == 1) & (order.diff() == 1)
        detours = [0, *_numbers(torch.cumsum(1 - straight, 0))]
        at_once = max(1, PIECE_BYTES // max(1, math.prod(self.shape[1:]) * self.dtype.itemsize))
        for low, high in pairwise(starts):
            first = int(wanted[low])
            if detours[high] == detours[low + 1]:
                place = int(order[low])
                self._rows(first, high - low)._fill(result[place : place + high - low])
                continue
            for begin in range(low, high, at_once):
                end = min(begin + at_once, high)
                first, last = int(wanted[begin]), int(wanted[end - 1])
                piece = self._rows(first, last - first + 1).read(result.dtype)
                as_integers(result).index_copy_(
                    0, order[begin:end], as_integers(piece).index_select(0, wanted[begin:end] - first)
                )

    def _result_type(self, dtype: torch.dtype | None) -> torch.dtype:
        if dtype is None or dtype == self.dtype:
            return self.dtype
        if torch.float4_e2m1fn_x2 in (dtype, self.dtype) or (self.dtype.is_complex and not dtype.is_complex):
            raise CheckpointError(f"its values are {self.dtype}, which cannot be converted to {dtype}")
        return dtype

    def _fill(self, result: Tensor) -> None:
        """Read into `result`, which has the right shape, is contiguous, and may have another type."""
        if not result.numel():
            return
        if result.dtype == self.dtype and _is_contiguous(self.shape, self.stride):
            self.source.read_into(memory_of(result), self.offset)
            return
        # With the dimensions in the order in which they lie in the file, what is read in one go is dense.
        order = sorted(range(len(self.shape)), key=lambda dimension: -self.stride[dimension])
        target = result.permute(order)
        stride = tuple(self.stride[dimension] for dimension in order)
        values = _buffer_values(tuple(target.shape), stride, self.dtype)
        buffer = torch.empty(values, dtype=self.dtype, device="cpu")
        self._fill_pieces(target, self.offset, stride, buffer)

    def _fill_pieces(self, target: Tensor, offset: int, stride: tuple[int, ...], buffer: Tensor) -> None:
        shape = tuple(target.shape)
        values = _span(shape, stride)
        if values <= len(buffer):
            self.source.read_into(memory_of(buffer)[: values * self.dtype.itemsize], offset)
            piece = buffer.as_strided(shape, stride)
            if target.dtype == self.dtype:
                target, piece = as_integers(target), as_integers(piece)
            target.copy_(piece)
            return
        row = _span(shape[1:], stride[1:])
        step = 1 if row > len(buffer) else 1 + (len(buffer) - row) // max(stride[0], 1)
        for start in range(0, shape[0], step):
            begin = offset + start * stride[0] * self.dtype.itemsize
            if step == 1:
                self._fill_pieces(target[start], begin, stride[1:], buffer)
            else:
                self._fill_pieces(target[start : start + step], begin, stride, buffer)


def check_shape(shape: tuple[int, ...], itemsize: int) -> None:
    """Refuse a shape that no tensor can have.

    Raises:
        CheckpointError: It has too many dimensions, or too many values for 64 bits to count.
    """
    if len(shape) > 64 or math.prod(max(size, 1) for size in shape) * itemsize >= 2**63:
        raise CheckpointError("its shape is larger than any tensor")


def contiguous_stride(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the strides of a tensor whose last dimension is densest."""
    stride: list[int] = []
    step = 1
    for size in reversed(shape):
        stride.append(step)
        step *= max(size, 1)
    return tuple(reversed(stride))


def memory_of(tensor: Tensor) -> memoryview:
    """Return the bytes of a contiguous tensor on the CPU, to be read or written."""
    raw = torch.empty(0, dtype=torch.uint8, device="cpu").set_(tensor.untyped_storage())
    start = tensor.storage_offset() * tensor.element_size()
    return raw.numpy().data[start : start + tensor.numel() * tensor.element_size()]


def as_integers(tensor: Tensor) -> Tensor:
    """Return the same memory as integers of the same size, as far as there are any."""
    return tensor.view(_INTEGERS.get(tensor.element_size(), tensor.dtype))


def _span(shape: tuple[int, ...], stride: tuple[int, ...]) -> int:
    if 0 in shape:
        return 0
    return 1 + sum((size - 1) * step for size, step in zip(shape, stride, strict=True))


def _is_contiguous(shape: tuple[int, ...], stride: tuple[int, ...]) -> bool:
    dense = contiguous_stride(shape)
    return all(size <= 1 or step == wanted for size, step, wanted in zip(shape, stride, dense, strict=True))


def _buffer_values(shape: tuple[int, ...], stride: tuple[int, ...], dtype: torch.dtype) -> int:
    return max(1, min(_span(shape, stride), PIECE_BYTES // dtype.itemsize))


def _numbers(tensor: Tensor) -> list[int]:
    return cast("list[int]", tensor.tolist())  # pyright: ignore[reportUnknownMemberType]


def _checked_rows(rows: Tensor, count: int) -> Tensor:
    integral = not (rows.is_floating_point() or rows.is_complex() or rows.dtype == torch.bool)
    if rows.dim() != 1 or not integral:
        raise CheckpointError(
            f"rows must be a slice or a tensor of integers with one dimension, not {rows.dtype} of shape "
            f"{tuple(rows.shape)}"
        )
    rows = rows.detach().to("cpu", torch.int64)
    if len(rows) and (int(rows.min()) < 0 or int(rows.max()) >= count):
        wrong = int(rows.min()) if int(rows.min()) < 0 else int(rows.max())
        raise CheckpointError(f"there is no row {wrong}; its rows are 0 to {count - 1}")
    return rows
