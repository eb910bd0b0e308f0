"""What Hugging Face checkpoints of BitNet hold: transformers' `bitnet` quantisation, offline.

The byte of row r and column k holds four rows of that column: in its bits 2i and 2i+1 the code, plus one, of
row `i * packed_rows + r`. One scale goes with a weight, `weight_scale` of shape [1]; its meaning depends on
`linear_class` in the checkpoint's `quantization_config`: with `bitlinear` outputs are divided by it, with
`autobitlinear` the weight is multiplied by it.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from bitcore.exceptions import QuantizationError
from bitcore.packing._codes import check_codes, check_packed, join_pairs, pad, split_pairs

__all__ = ["LinearClass", "pack", "scale_from_stored", "scale_to_stored", "unpack"]

LinearClass = Literal["bitlinear", "autobitlinear"]


def pack(codes: Tensor) -> Tensor:
    """Pack codes, int8 of -1, 0 and 1 [rows, columns], as uint8 [rows / 4, columns], rounded up.

    Raises:
        QuantizationError: `codes` is something else.
    """
    padded = pad(check_codes(codes), 4, 1)
    return join_pairs((padded + 1).to(torch.uint8).view(4, -1, codes.shape[1]).permute(1, 2, 0))


def unpack(packed: Tensor, rows: int, columns: int) -> Tensor:
    """Return the codes that `pack` packed, int8 [rows, columns].

    Raises:
        QuantizationError: The bytes are not as many as these rows and columns have.
    """
    check_packed(packed, ((rows + 3) // 4, columns), "a BitNet weight")
    pairs = split_pairs(packed).permute(2, 0, 1).reshape(-1, columns)
    return pairs[:rows].to(torch.int8).sub_(1)


def scale_from_stored(stored: Tensor, linear_class: LinearClass) -> Tensor:
    """Return what codes are multiplied by, fp32 [1], of a checkpoint's `weight_scale`.

    Raises:
        QuantizationError: `linear_class` is unknown, or the scale is not one positive number.
    """
    return _converted(stored, linear_class)


def scale_to_stored(scale: Tensor, linear_class: LinearClass) -> Tensor:
    """Return what a checkpoint holds as `weight_scale`, fp32 [1], of what codes are multiplied by.

    Raises:
        QuantizationError: `linear_class` is unknown, or the scale is not one positive number: these
            checkpoints have no place for a scale for each row.
    """
    return _converted(scale, linear_class)


def _converted(scale: Tensor, linear_class: str) -> Tensor:
    if linear_class not in get_args(LinearClass):
        raise QuantizationError(
            f"linear_class is {linear_class!r}; it must be one of {', '.join(get_args(LinearClass))}."
        )
    value = scale.float().reshape(-1)
    if len(value) != 1 or not bool(value > 0) or not bool(value.isfinite()):
        raise QuantizationError(
            f"a BitNet checkpoint has one positive scale for a weight; this is {scale.dtype} "
            f"{list(scale.shape)}."
        )
    return value.reciprocal() if linear_class == "bitlinear" else value
