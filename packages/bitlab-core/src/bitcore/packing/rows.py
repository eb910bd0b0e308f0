"""Plain rows: four codes in a byte, the first in the lowest bits, each plus one."""

from __future__ import annotations

import torch
from torch import Tensor

from bitcore.packing._codes import check_codes, check_packed, join_pairs, pad, split_pairs

__all__ = ["pack", "unpack"]


def pack(codes: Tensor) -> Tensor:
    """Pack codes, int8 of -1, 0 and 1 [rows, columns], as uint8 [rows, columns / 4], rounded up.

    Raises:
        QuantizationError: `codes` is something else.
    """
    padded = pad(check_codes(codes), 1, 4)
    return join_pairs((padded + 1).to(torch.uint8).view(len(codes), -1, 4))


def unpack(packed: Tensor, rows: int, columns: int) -> Tensor:
    """Return the codes that `pack` packed, int8 [rows, columns].

    Raises:
        QuantizationError: The bytes are not as many as these rows and columns have.
    """
    check_packed(packed, (rows, (columns + 3) // 4), "a weight in plain rows")
    return split_pairs(packed).flatten(1)[:, :columns].to(torch.int8).sub_(1)
