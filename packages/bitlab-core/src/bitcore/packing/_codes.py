"""What all layouts check of codes and of packed bytes."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from bitcore.exceptions import QuantizationError


def check_codes(codes: Tensor) -> Tensor:
    """Return codes that are -1, 0 and 1, [rows, columns], as int8.

    Raises:
        QuantizationError: They are something else.
    """
    if not isinstance(cast("object", codes), Tensor) or codes.ndim != 2 or codes.numel() == 0:
        raise QuantizationError(f"codes are to be a matrix [rows, columns], but are {_described(codes)}.")
    least, most = (float(end) for end in codes.aminmax())
    if codes.dtype != torch.int8 or least < -1 or most > 1:
        raise QuantizationError(
            f"codes are to be int8 of -1, 0 and 1, but are {codes.dtype} from {least:g} to {most:g}."
        )
    return codes


def check_packed(packed: Tensor, shape: tuple[int, ...], layout: str) -> Tensor:
    """Return packed bytes of the shape that they are to have.

    Raises:
        QuantizationError: They are something else.
    """
    if (
        not isinstance(cast("object", packed), Tensor)
        or packed.dtype != torch.uint8
        or tuple(packed.shape) != shape
    ):
        raise QuantizationError(
            f"{layout} is to be uint8 {list(shape)} for these rows and columns, but is {_described(packed)}."
        )
    return packed


def pad(codes: Tensor, rows: int, columns: int) -> Tensor:
    """Return codes with zeros behind the last row and column, up to multiples of `rows` and `columns`."""
    right, below = -codes.shape[1] % columns, -codes.shape[0] % rows
    return torch.nn.functional.pad(codes, (0, right, 0, below)) if right or below else codes


def join_pairs(pairs: Tensor) -> Tensor:
    """Return bytes of four 2-bit numbers, the first lowest, of uint8 [..., 4]."""
    shifts = torch.tensor([0, 2, 4, 6], dtype=torch.uint8, device=pairs.device)
    # The numbers do not overlap, so that their sum is all of them.
    return (pairs << shifts).sum(-1, dtype=torch.uint8)


def split_pairs(packed: Tensor) -> Tensor:
    """Return the four 2-bit numbers of each byte, the lowest first, uint8 [..., 4]."""
    shifts = torch.tensor([0, 2, 4, 6], dtype=torch.uint8, device=packed.device)
    return (packed.unsqueeze(-1) >> shifts) & 3


def _described(value: object) -> str:
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
    return type(value).__name__
