"""Codes of 2 to 8 bits as one stream of bits over 32-bit words.

Code `i` of a row takes the bits `i * bits` to `(i + 1) * bits - 1` of the row's stream, its least significant
bit first, and bit `j` of the stream is bit `j % 32` of word `j // 32`. So a code may straddle two words, and
32 codes fill `bits` words. At 2, 3, 4 and 8 bits this is how GPTQ's checkpoints have codes along the input.

Eight codes are moved at a time, as the bytes of one 64-bit number. That reads bytes as words, and is right on
little-endian machines only, as are all that torch is built for.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from auto_round.exceptions import QuantizationError
from auto_round.quantization._grouping import row_chunks

_BLOCK = 32
_CHUNK = 1 << 20
_LANES = (8, 16, 32)
# The lower one of each two lanes of 8, 16 and 32 bits.
_LOWER = (0x00FF00FF00FF00FF, 0x0000FFFF0000FFFF, 0x00000000FFFFFFFF)


def packed_width(count: int, bits: int) -> int:
    """Return how many 32-bit words `count` codes of `bits` bits take."""
    return -(-count * bits // 32)


def pack(codes: Tensor, bits: int) -> Tensor:
    """Return int32 words `[..., ceil(n * bits / 32)]` of uint8 codes `[..., n]`.

    The bits after a row's last code are 0. Takes memory for the words and some 4 MB more, and for a copy of
    `codes` where they are not contiguous.

    Raises:
        QuantizationError: `bits` is not 2 to 8, `codes` is not uint8, or a code needs more bits than that.
    """
    _check(codes, "codes", torch.uint8, bits)
    if codes.numel() and int(codes.max()) >= 2**bits:
        raise QuantizationError(f"a code is {int(codes.max())}; {bits} bits hold 0 to {2**bits - 1}.")
    count = codes.shape[-1]
    words = codes.new_empty((*codes.shape[:-1], packed_width(count, bits)), dtype=torch.int32)
    source, target = _rows(codes, words, count, bits)
    for rows in _chunks(source):
        target[rows] = _pack_rows(source[rows], bits)[:, : target.shape[1]]
    return words


def unpack(words: Tensor, bits: int, count: int) -> Tensor:
    """Return the `count` codes of each row, uint8 `[..., count]`, of int32 words `[..., n]`.

    Takes memory as `pack` does.

    Raises:
        QuantizationError: `bits` is not 2 to 8, `words` is not int32, or rows have other than the
            ceil(count * bits / 32) words that so many codes take.
    """
    _check(words, "words", torch.int32, bits)
    if count < 0 or words.shape[-1] != packed_width(count, bits):
        raise QuantizationError(
            f"rows of {words.shape[-1]} words do not hold {count} codes of {bits} bits; {count} codes take "
            f"{packed_width(max(count, 0), bits)} words."
        )
    codes = words.new_empty((*words.shape[:-1], count), dtype=torch.uint8)
    target, source = _rows(codes, words, count, bits)
    for rows in _chunks(target):
        target[rows] = _unpack_rows(source[rows], bits)[:, : target.shape[1]]
    return codes


def _check(given: Tensor, name: str, dtype: torch.dtype, bits: int) -> None:
    if not 2 <= bits <= 8:
        raise QuantizationError(f"bits is {bits}; codes of 2 to 8 bits are packed.")
    if given.dtype != dtype or given.ndim == 0:
        raise QuantizationError(f"{name} are {given.dtype} {list(given.shape)}; give {dtype} [..., n].")


def _rows(codes: Tensor, words: Tensor, count: int, bits: int) -> tuple[Tensor, Tensor]:
    """Return both as matrices of as many rows; rows that end with a word are cut into blocks of 32 codes."""
    if count == 0:
        return codes.view(-1, 1), words.view(-1, 1)
    if count % _BLOCK == 0:
        return codes.reshape(-1, _BLOCK), words.reshape(-1, bits)
    return codes.reshape(-1, count), words.reshape(-1, packed_width(count, bits))


def _chunks(codes: Tensor) -> Iterator[slice]:
    return row_chunks(codes.shape[0], -(-codes.shape[1] // _BLOCK) * _BLOCK, _CHUNK)


def _pack_rows(codes: Tensor, bits: int) -> Tensor:
    rows, count = codes.shape
    bytes_ = codes.new_zeros((rows, -(-count // _BLOCK) * _BLOCK))
    bytes_[:, :count] = codes
    octets = bytes_.view(torch.int64)
    for step, (lane, lower) in enumerate(zip(_LANES, _LOWER, strict=True)):
        upper = (octets >> lane).bitwise_and_(lower)
        octets.bitwise_and_(lower).bitwise_or_(upper << (bits << step))
    return octets.unsqueeze(-1).view(torch.uint8)[..., :bits].reshape(rows, -1).view(torch.int32)


def _unpack_rows(words: Tensor, bits: int) -> Tensor:
    rows, width = words.shape
    padded = words.new_zeros((rows, -(-width // bits) * bits))
    padded[:, :width] = words
    octets = words.new_zeros((rows, padded.shape[1] // bits * 4), dtype=torch.int64)
    octets.unsqueeze(-1).view(torch.uint8)[..., :bits] = padded.view(torch.uint8).view(rows, -1, bits)
    for step in (2, 1, 0):
        # 2**step codes lie together in each lane of twice the width; the mask is theirs, in every such lane.
        lane, codes = _LANES[step], bits << step
        mask = (2**codes - 1) * ((2**64 - 1) // (2 ** (2 * lane) - 1))
        upper = (octets >> codes).bitwise_and_(mask)
        octets.bitwise_and_(mask).bitwise_or_(upper << lane)
    return octets.view(torch.uint8)
