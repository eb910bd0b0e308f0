"""Which pieces of which documents stand in which row."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Int64Array = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Layout:
    """Rows as pieces of documents."""

    starts: Int64Array
    """Where in the tokens each piece begins, row after row."""
    lengths: Int64Array
    """Tokens of each piece."""
    firsts: Int64Array
    """The first piece of each row, and the number of pieces."""


def one_document_a_row(offsets: Int64Array, max_length: int) -> Layout:
    """Give each document rows of its own, all full but the last of each."""
    starts, lengths = _cut(offsets, max_length)
    return Layout(starts, lengths, np.arange(len(starts) + 1, dtype=np.int64))


def concatenate(offsets: Int64Array, max_length: int) -> Layout:
    """Put documents behind one another and cut wherever a row is full."""
    total = int(offsets[-1])
    cuts = np.arange(0, total, max_length, dtype=np.int64)
    bounds = np.union1d(offsets, cuts)
    firsts = np.searchsorted(bounds, np.append(cuts, total))
    return Layout(bounds[:-1], np.diff(bounds), firsts.astype(np.int64))


def best_fit(offsets: Int64Array, max_length: int) -> Layout:
    """Cut only what is longer than a row, and fill rows with the pieces by best-fit decreasing.

    The longest piece goes first, each into the row with the least room that holds it (Johnson, 1974; for
    language models Ding et al., "Fewer Truncations Improve Language Modeling", 2024). Pieces of one length
    that go into rows of equal room are placed at once, so the time is that of sorting the pieces by length
    and then hardly depends on their number.
    """
    starts, lengths = _cut(offsets, max_length)
    order = np.argsort(_narrow(max_length - lengths), kind="stable")
    row_of, num_rows = _place(lengths[order], max_length)
    # Stable: within a row, pieces stay in the order they were placed in.
    by_row = np.argsort(_narrow(row_of), kind="stable")
    pieces = order[by_row]
    firsts = np.zeros(num_rows + 1, dtype=np.int64)
    np.cumsum(np.bincount(row_of, minlength=num_rows), out=firsts[1:])
    return Layout(starts[pieces], lengths[pieces], firsts)


def _cut(offsets: Int64Array, max_length: int) -> tuple[Int64Array, Int64Array]:
    """Return starts and lengths of the documents' pieces of at most `max_length`."""
    firsts, ends = offsets[:-1], offsets[1:]
    pieces: Int64Array = -(-(ends - firsts) // max_length)
    before: Int64Array = np.cumsum(pieces) - pieces
    within: Int64Array = np.arange(int(pieces.sum()), dtype=np.int64) - np.repeat(before, pieces)
    starts: Int64Array = np.repeat(firsts, pieces) + within * max_length
    return starts, np.minimum(max_length, np.repeat(ends, pieces) - starts)


def _place(lengths: Int64Array, max_length: int) -> tuple[Int64Array, int]:
    """Return the row of each piece, for pieces from the longest to the shortest, and the number of rows."""
    row_of = np.empty(len(lengths), dtype=np.int64)
    num_rows = 0
    # Rows by the room they have left, and one bit for each amount of room that some row has.
    rows_with: list[list[Int64Array]] = [[] for _ in range(max_length + 1)]
    rooms = 0
    lasts = np.flatnonzero(np.diff(lengths, append=0))
    first = 0
    for last in lasts.tolist():
        length = int(lengths[last])
        while first <= last:
            wanted = last + 1 - first
            fitting = rooms >> length
            if fitting:
                room = length + (fitting & -fitting).bit_length() - 1
                rows = np.concatenate(rows_with[room])
            else:
                room = max_length
                count = -(-wanted // (room // length))
                rows = np.arange(num_rows, num_rows + count, dtype=np.int64)
                num_rows += count
            # A row that took a piece has even less room, so it takes the next as well while that fits.
            each = room // length
            used, rest = np.split(rows, [-(-wanted // each)])
            placed = min(wanted, len(used) * each)
            row_of[first : first + placed] = np.repeat(used, each)[:placed]
            first += placed
            in_last = placed - (len(used) - 1) * each
            changed = [(room, rest)] if fitting else []
            changed += [(room - each * length, used[:-1]), (room - in_last * length, used[-1:])]
            rows_with[room] = []
            rooms &= ~(1 << room)
            for left, those in changed:
                if left and len(those):
                    rows_with[left].append(those)
                    rooms |= 1 << left
    return row_of, num_rows


def _narrow(values: Int64Array) -> npt.NDArray[Any]:
    """Use 16 bits where they do: numpy sorts those by counting, many times faster."""
    return values.astype(np.uint16) if values.max(initial=0) < 1 << 16 else values
