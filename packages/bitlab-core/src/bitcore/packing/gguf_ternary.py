"""GGUF's ternary types: TQ2_0 (66 bytes for 256 weights) and TQ1_0 (54 bytes).

Each block of 256 weights along a row has a scale of 16 bits, here that of its row, and its codes, plus one.
In TQ2_0 a byte holds four codes, 32 weights apart. In TQ1_0 a byte holds five as the digits of a number of
base 3, which is stored as the fraction of 243 that it is, rounded up, so that a multiplication and a shift
give the digits back, the highest first. Format: ggml's `block_tq1_0` and `block_tq2_0`.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from bitcore.exceptions import QuantizationError
from bitcore.packing._codes import check_codes, check_packed, join_pairs, split_pairs

__all__ = ["BLOCK_WEIGHTS", "TernaryType", "block_bytes", "pack", "unpack"]

TernaryType = Literal["TQ1_0", "TQ2_0"]
BLOCK_WEIGHTS = 256
"""Weights in a block; rows are whole blocks."""


class _Run(NamedTuple):
    """Bytes of TQ1_0 that hold `digits` codes each, which lie `apart` weights from one another."""

    bytes_: int
    digits: int
    apart: int


_RUNS = (_Run(32, 5, 32), _Run(16, 5, 16), _Run(4, 4, 4))


def block_bytes(kind: TernaryType) -> int:
    """Return the bytes of a block, its scale included.

    Raises:
        QuantizationError: The type is unknown.
    """
    if kind not in get_args(TernaryType):
        raise QuantizationError(
            f"{kind!r} is none of GGUF's ternary types {', '.join(get_args(TernaryType))}."
        )
    return 66 if kind == "TQ2_0" else 54


def pack(codes: Tensor, scale: Tensor, kind: TernaryType) -> Tensor:
    """Pack codes and scales.

    Args:
        codes: int8 of -1, 0 and 1, [rows, columns], columns a multiple of 256.
        scale: What codes are multiplied by, one for all or one for each row; rounded to 16 bits.
        kind: The type.

    Returns:
        uint8 [rows, columns / 256 * block_bytes(kind)].

    Raises:
        QuantizationError: Codes, scales or the type are something else, or a scale is beyond 16 bits.
    """
    rows, columns = check_codes(codes).shape
    size = block_bytes(kind)
    if columns % BLOCK_WEIGHTS:
        raise QuantizationError(f"{kind} needs rows of a multiple of {BLOCK_WEIGHTS} weights, not {columns}.")
    half = scale.reshape(-1).to(torch.float16)
    if len(half) not in (1, rows) or not bool(half.isfinite().all()) or bool((half == 0).any()):
        raise QuantizationError(
            f"{kind} takes one scale, or one for each of {rows} rows, that a float of 16 bits can hold; "
            f"these are {list(scale.shape)} from {float(scale.min()):.3g} to {float(scale.max()):.3g}."
        )
    blocks = (codes.view(rows, -1, BLOCK_WEIGHTS) + 1).to(torch.uint8)
    packed = _quarters(blocks) if kind == "TQ2_0" else _fifths(blocks)
    scales = half.expand(rows).contiguous().view(torch.uint8).view(rows, 1, 2).expand(-1, blocks.shape[1], -1)
    return torch.cat([packed, scales.to(packed.device)], -1).view(rows, blocks.shape[1] * size)


def unpack(packed: Tensor, rows: int, columns: int, kind: TernaryType) -> tuple[Tensor, Tensor]:
    """Return what was packed.

    Returns:
        Codes, int8 [rows, columns], and the scale of each block, fp32 [rows, columns / 256]. Files may have
        other scales in one row.

    Raises:
        QuantizationError: The bytes are not as many as these rows and columns have.
    """
    size = block_bytes(kind)
    if columns % BLOCK_WEIGHTS:
        raise QuantizationError(f"{kind} has rows of a multiple of {BLOCK_WEIGHTS} weights, not {columns}.")
    check_packed(packed, (rows, columns // BLOCK_WEIGHTS * size), f"a {kind} weight")
    blocks = packed.reshape(rows, -1, size)
    data, scales = blocks[..., :-2], blocks[..., -2:].contiguous().view(torch.float16).float()
    codes = _from_quarters(data) if kind == "TQ2_0" else _from_fifths(data)
    return codes.view(rows, columns).to(torch.int8).sub_(1), scales.view(rows, -1)


def _quarters(blocks: Tensor) -> Tensor:
    return join_pairs(blocks.view(*blocks.shape[:2], 2, 4, 32).transpose(-1, -2)).flatten(2)


def _from_quarters(data: Tensor) -> Tensor:
    return split_pairs(data.reshape(*data.shape[:2], 2, 32)).transpose(-1, -2).flatten(2)


def _fifths(blocks: Tensor) -> Tensor:
    parts: list[Tensor] = []
    start = 0
    for run in _RUNS:
        end = start + run.bytes_ * run.digits
        digits = blocks[..., start:end].reshape(*blocks.shape[:2], -1, run.digits, run.apart).int()
        number = sum(digits[..., place, :] * 3 ** (4 - place) for place in range(run.digits))
        parts.append(torch.as_tensor(number).flatten(2))
        start = end
    return ((torch.cat(parts, -1) * 256 + 242) // 243).to(torch.uint8)


def _from_fifths(data: Tensor) -> Tensor:
    parts: list[Tensor] = []
    start = 0
    for run in _RUNS:
        fraction = data[..., start : start + run.bytes_].reshape(*data.shape[:2], -1, 1, run.apart).int()
        powers = torch.tensor([3**place for place in range(run.digits)], device=data.device).view(-1, 1)
        parts.append(((fraction * powers % 256) * 3 // 256).flatten(2))
        start += run.bytes_
    return torch.cat(parts, -1)
