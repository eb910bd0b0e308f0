"""What is checked of a kernel's operands before memory is touched."""

from __future__ import annotations

import torch
from torch import Tensor

from bitcore._activations import check_floating
from bitcore.exceptions import QuantizationError
from bitcore.packing import tiles


def check_operands(x: Tensor, qweight_scale: Tensor, qweight: Tensor, bias: Tensor | None) -> None:
    """Raise `QuantizationError` where shapes, dtypes or devices do not fit one another."""
    check_floating(x)
    rows = qweight_scale.numel()
    if qweight_scale.ndim != 1 or qweight_scale.dtype != torch.float32:
        raise QuantizationError(
            f"qweight_scale is fp32 [rows], one for each; this is {qweight_scale.dtype} "
            f"{list(qweight_scale.shape)}."
        )
    expected = tiles.packed_shape(rows, x.shape[-1]) if x.ndim else None
    if qweight.dtype != torch.uint8 or tuple(qweight.shape) != expected:
        raise QuantizationError(
            f"inputs of shape {list(x.shape)} and {rows} rows need a packed weight of shape {expected}, "
            f"but it is {qweight.dtype} {list(qweight.shape)}."
        )
    if bias is not None and tuple(bias.shape) != (rows,):
        raise QuantizationError(f"the bias is [{rows}], one for each row; this is {list(bias.shape)}.")
    for name, other in (("qweight_scale", qweight_scale), ("qweight", qweight), ("bias", bias)):
        if other is not None and other.device != x.device:
            raise QuantizationError(f"the inputs are on {x.device}, but {name} is on {other.device}.")
