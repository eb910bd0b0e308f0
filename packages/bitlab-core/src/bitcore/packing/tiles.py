"""Tiles: the layout that the kernels compute on, a quarter of a byte a weight.

Rows come in groups of 16 and up to four groups in a tile of 64; columns in steps of 16. Rows and columns
that are missing at the end hold zeros. A tile is `[steps][groups][16 rows][4 columns]` bytes, and a byte of
the step s, the row l and the column j holds in its bits 2p and 2p+1 the code, plus one, of column
`16 s + 4 p + j`.

So 64 bytes in a row, masked, are one operand of a processor's instruction that multiplies 16 rows by four
columns and adds them up, and one stream of bytes serves any number of inputs.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from bitcore.packing._codes import check_codes, check_packed, join_pairs, pad, split_pairs

__all__ = ["pack", "packed_shape", "unpack"]

_ROWS, _COLUMNS, _GROUPS = 16, 16, 4


def packed_shape(rows: int, columns: int) -> tuple[int, int]:
    """Return the shape of packed codes: the padded rows, and a quarter of the padded columns."""
    return rows + -rows % _ROWS, (columns + -columns % _COLUMNS) // 4


def pack(codes: Tensor) -> Tensor:
    """Pack codes.

    Args:
        codes: int8 of -1, 0 and 1, [rows, columns].

    Returns:
        uint8 of `packed_shape(rows, columns)`. The bytes are in the order of the tiles, not of the rows.

    Raises:
        QuantizationError: `codes` is something else.
    """
    padded = pad(check_codes(codes), _ROWS, _COLUMNS)
    plus_one = (padded + 1).to(torch.uint8)
    tiles = [
        # [groups, 16 l, steps, 4 p, 4 j] -> [steps, groups, 16 l, 4 j, 4 p]
        join_pairs(plus_one[rows].view(-1, _ROWS, columns // _COLUMNS, 4, 4).permute(2, 0, 1, 4, 3)).flatten()
        for columns in [padded.shape[1]]
        for rows in _tiles(padded.shape[0])
    ]
    return torch.cat(tiles).view(packed_shape(*codes.shape))


def unpack(packed: Tensor, rows: int, columns: int) -> Tensor:
    """Return the codes that `pack` packed, int8 [rows, columns].

    Raises:
        QuantizationError: The bytes are not as many as these rows and columns have.
    """
    shape = packed_shape(rows, columns)
    check_packed(packed, shape, "a packed weight")
    steps = shape[1] * 4 // _COLUMNS
    codes = torch.empty(shape[0], shape[1] * 4, dtype=torch.int8, device=packed.device)
    stream = packed.reshape(-1)
    for tile in _tiles(shape[0]):
        bytes_ = stream[tile.start * shape[1] : tile.stop * shape[1]].view(steps, -1, _ROWS, 4)
        # [steps, groups, 16 l, 4 j, 4 p] -> [groups, 16 l, steps, 4 p, 4 j]
        pairs = split_pairs(bytes_).permute(1, 2, 0, 4, 3)
        codes[tile] = pairs.reshape(tile.stop - tile.start, -1).to(torch.int8) - 1
    return codes[:rows, :columns].contiguous()


def _tiles(rows: int) -> Iterator[slice]:
    size = _ROWS * _GROUPS
    for start in range(0, rows, size):
        yield slice(start, min(start + size, rows))
