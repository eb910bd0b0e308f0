"""The reference: plain torch operations, on any device."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from bitcore._activations import EXACT_TERMS, eight_bits
from bitcore.config import BitQuantConfig
from bitcore.kernels._operands import check_operands
from bitcore.kernels.base import BitKernelBase
from bitcore.packing import tiles


class TorchKernel(BitKernelBase):
    """Unpacks the weight at each call and multiplies floats, whose sums are exact integers."""

    name: ClassVar[str] = "torch"

    def why_not(
        self,
        config: BitQuantConfig,  # noqa: ARG002
        device: torch.device,  # noqa: ARG002
        shape: tuple[int, int] | None = None,  # noqa: ARG002
    ) -> str | None:
        """Return None: it always can."""
        return None

    def __call__(
        self,
        x: Tensor,
        qweight_scale: Tensor,
        qweight: Tensor,
        bias: Tensor | None = None,
        config: BitQuantConfig | None = None,
    ) -> Tensor:
        """Return the layer's output; see `BitKernelBase`."""
        config = config or BitQuantConfig()
        check_operands(x, qweight_scale, qweight, bias)
        codes = tiles.unpack(qweight, len(qweight_scale), x.shape[-1])
        if not config.quantizes_activations:
            weight = codes.float() * qweight_scale.unsqueeze(-1)
            out = x.float() @ weight.t()
        else:
            scale, qx = eight_bits(x, config.activation_granularity)
            wide = torch.float32 if x.shape[-1] <= EXACT_TERMS else torch.float64
            product = (qx.to(wide) @ codes.to(wide).t()).float()
            out = product * (scale * qweight_scale)
        if bias is not None:
            out = out + bias.to(x.dtype).float()
        return out.to(x.dtype)
