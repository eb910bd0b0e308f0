"""I2_S of bitnet.cpp, as its x86 builds write it: 128 weights in 32 bytes, one scale for the whole weight.

All rows follow one another. A byte holds four codes, plus one, that lie 32 weights apart, the first in the
top bits. Behind the last weight comes the scale, fp32, in 32 bytes of which the other 28 are zeros. Builds
for ARM have blocks of 64 weights, which this module does not read. The type is not in llama.cpp itself.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bitcore.exceptions import QuantizationError
from bitcore.packing._codes import check_codes, check_packed, join_pairs, split_pairs

__all__ = ["BLOCK_WEIGHTS", "pack", "unpack"]

BLOCK_WEIGHTS = 128
"""Weights in a block; rows are whole blocks."""
_END_BYTES = 32


def pack(codes: Tensor, scale: Tensor) -> Tensor:
    """Pack codes and their one scale.

    Args:
        codes: int8 of -1, 0 and 1, [rows, columns], columns a multiple of 128.
        scale: What codes are multiplied by, one number.

    Returns:
        uint8 [rows * columns / 4 + 32].

    Raises:
        QuantizationError: Codes are something else, or there is more than one scale.
    """
    _check_columns(check_codes(codes).shape[1])
    if scale.numel() != 1:
        raise QuantizationError(f"I2_S has one scale for a weight, not {scale.numel()}.")
    blocks = (codes.view(-1, 4, 32) + 1).to(torch.uint8)
    data = join_pairs(blocks.flip(1).transpose(1, 2)).flatten()
    end = data.new_zeros(_END_BYTES)
    end[:4] = scale.detach().reshape(1).float().view(torch.uint8)
    return torch.cat([data, end])


def unpack(packed: Tensor, rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """Return what `pack` packed: codes, int8 [rows, columns], and the scale, fp32 [1].

    Raises:
        QuantizationError: The bytes are not as many as these rows and columns have.
    """
    _check_columns(columns)
    count = rows * columns // 4
    check_packed(packed, (count + _END_BYTES,), "an I2_S weight")
    pairs = split_pairs(packed[:count].view(-1, 32)).transpose(1, 2).flip(1)
    scale = packed[count : count + 4].clone().view(torch.float32)
    return pairs.reshape(rows, columns).to(torch.int8).sub_(1), scale


def _check_columns(columns: int) -> None:
    if columns % BLOCK_WEIGHTS:
        raise QuantizationError(f"I2_S has rows of a multiple of {BLOCK_WEIGHTS} weights, not {columns}.")
