"""A quantised matrix: codes, scales, and the numbers that they stand for."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from auto_round.config_manager import LayerSettings
from auto_round.quantization._grouping import grouped, row_chunks

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""What the codes 0 to 7 of an FP4 element stand for; 8 to 15 are the same with a minus."""


def scale_values(scale: Tensor, settings: LayerSettings, global_scale: Tensor | None) -> Tensor:
    """Return what elements are multiplied by, float32, of scales as they are stored."""
    if settings.weight_dtype == "mxfp4":
        return scale.view(torch.float8_e8m0fnu).float()
    return scale.float() if global_scale is None else scale.float() / global_scale


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class QuantizedWeight:
    """A matrix `[out, in]`, quantised in groups along its rows."""

    settings: LayerSettings
    """Format, bits and groups."""
    codes: Tensor
    """uint8 `[out, in]`. int: 0 to 2**bits - 1. fp8: the bits of an E4M3 number. mxfp4 and nvfp4: the index
    into `E2M1`, with the sign in bit 3."""
    scale: Tensor
    """`[out, groups]`. int: in the dtype of the scales, and of either sign. fp8: float32. mxfp4: uint8, the
    biased exponent that E8M0 is. nvfp4: float8_e4m3fn."""
    zero: Tensor | None = None
    """uint8 `[out, groups]`: the code that stands for 0, of asymmetric integers. None for all others;
    symmetric integers have 2**(bits - 1) everywhere."""
    global_scale: Tensor | None = None
    """float32 scalar, of nvfp4 alone: what the scales are divided by."""

    def effective_scale(self) -> Tensor:
        """Return what the elements are multiplied by, float32 `[out, groups]`.

        Exact, except that nvfp4's scale divided by its global scale is rounded to float32.
        """
        return scale_values(self.scale, self.settings, self.global_scale)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the numbers, `dtype` `[out, in]`: element times scale in float32, then one cast.

        For integers the element is `code - zero`. In float32 the product is exact for scales of 16 bits and
        for mxfp4, and rounded once otherwise. Takes memory for the result and for some 10 MB more.
        """
        values = torch.empty(self.codes.shape, dtype=dtype, device=self.codes.device)
        scale = self.effective_scale()
        for rows in row_chunks(*self.codes.shape):
            chunk = grouped(self._elements(rows), self.settings.group_size)
            values[rows] = chunk.mul_(scale[rows].unsqueeze(-1)).flatten(1)
        return values

    def _elements(self, rows: slice) -> Tensor:
        codes = self.codes[rows]
        if self.settings.weight_dtype == "int":
            elements = codes.float()
            if self.zero is None:
                return elements.sub_(2 ** (self.settings.bits - 1))
            grouped(elements, self.settings.group_size).sub_(self.zero[rows].unsqueeze(-1))
            return elements
        if self.settings.weight_dtype == "fp8":
            return codes.view(torch.float8_e4m3fn).float()
        table = torch.tensor((*E2M1, *(-value for value in E2M1)), dtype=torch.float32, device=codes.device)
        return table.index_select(0, codes.flatten().int()).view(codes.shape)
