"""The convolution with ternary weights."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from bitcore.config import BitQuantConfig, check_sizes
from bitcore.exceptions import QuantizationError
from bitcore.ops import EXACT_TERMS, bitlinear, dequantize_weight, quantize_weight, quantize_x
from bitcore.packing import rows
from torch import Tensor, nn

from bitlayers._ternary import TernaryLayer, begin_bias

__all__ = ["BitConv2d", "PaddingMode"]

PaddingMode = Literal["zeros", "reflect", "replicate", "circular"]
_Pair = int | tuple[int, int]


class BitConv2d(TernaryLayer):
    """A convolution whose weights are -1, 0 and 1 times a scale, and whose inputs are rounded to 8 bits.

    It stands where `torch.nn.Conv2d` stands and takes its arguments. An image has one scale, where a linear
    layer has one for each token (`per_tensor` gives one to the whole batch). In evaluation codes are unpacked
    at each call and multiplied by torch's convolution, whose sums of integers are exact: what is gained is
    memory, not speed.

    Args:
        in_channels: Channels of inputs.
        out_channels: Channels of outputs.
        kernel_size: Height and width of the filter.
        stride: Steps of the filter.
        padding: Added on each side, or `same` or `valid`.
        dilation: Steps between the filter's points.
        groups: Into which both kinds of channels are divided.
        bias: Whether outputs have a bias.
        padding_mode: What is added.
        quant_config: How weights and inputs are quantised, also as a dictionary; the default of
            `BitQuantConfig` if None.
        device: Of the parameters.
        dtype: Of the parameters.

    Raises:
        QuantizationError: An argument is none of those that are allowed.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: _Pair,
        stride: _Pair = 1,
        padding: _Pair | Literal["same", "valid"] = 0,
        dilation: _Pair = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: PaddingMode = "zeros",
        quant_config: BitQuantConfig | Mapping[str, Any] | None = None,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_sizes(in_channels=in_channels, out_channels=out_channels, groups=groups)
        if in_channels % groups or out_channels % groups:
            raise QuantizationError(
                f"{groups} groups divide neither or only one of {in_channels} and {out_channels} channels."
            )
        if padding_mode not in get_args(PaddingMode):
            raise QuantizationError(
                f"padding_mode is {padding_mode!r}; it must be one of {', '.join(get_args(PaddingMode))}."
            )
        size = _pair("kernel_size", kernel_size)
        super().__init__((out_channels, in_channels // groups, *size), quant_config, device, dtype)
        self.in_channels, self.out_channels, self.groups = in_channels, out_channels, groups
        self.kernel_size = size
        self.stride = _pair("stride", stride)
        self.dilation = _pair("dilation", dilation)
        self.padding_mode: PaddingMode = padding_mode
        self.padding = self._padding(padding)
        self.bias = nn.Parameter(torch.empty(out_channels, device=device, dtype=dtype)) if bias else None
        self.reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        """Return the layer's output.

        Args:
            x: Floating, [images, in_channels, height, width], or one image without the first dimension.

        Returns:
            [images, out_channels, height, width], in x's dtype, or in that of autocast.

        Raises:
            QuantizationError: x is not floating or of another shape, or the weight holds NaN or infinity.
        """
        if x.ndim not in (3, 4) or x.shape[-3] != self.in_channels:
            raise QuantizationError(
                f"inputs are [images, {self.in_channels}, height, width]; these are {list(x.shape)}."
            )
        if x.ndim == 3:
            return self.forward(x.unsqueeze(0)).squeeze(0)
        weight = self.weight
        if self._computes_on_floats(x, weight, self.bias):
            rounded = bitlinear.fake_quantize_x(x.flatten(1), self.quant_config, self._strength).view_as(x)
            if weight is None:
                scale, codes = self.ternary_weight()
                fake = dequantize_weight(scale.view(-1, 1, 1, 1), codes, x.dtype)
            else:
                fake = bitlinear.fake_quantize_weight(weight, self.quant_config, self._strength)
            return self._convolve(rounded, fake, self.bias)
        if torch.is_autocast_enabled(x.device.type) and x.is_floating_point():
            x = x.to(torch.get_autocast_dtype(x.device.type))
        with torch.autocast(x.device.type, enabled=False):
            return self._evaluate(x)

    def extra_repr(self) -> str:
        """Return what `repr` says of the layer."""
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}, "
            f"dilation={self.dilation}, groups={self.groups}, bias={self.bias is not None}{self._form}"
        )

    @property
    def _terms(self) -> int:
        """How many products an output is the sum of."""
        return self.in_channels // self.groups * math.prod(self.kernel_size)

    def _evaluate(self, x: Tensor) -> Tensor:
        qweight_scale, qweight = self.packed()
        codes = self._unpack(qweight)
        scale = qweight_scale.view(-1, 1, 1)
        if not self.quant_config.quantizes_activations:
            out = self._convolve(x, dequantize_weight(scale.unsqueeze(1), codes, x.dtype), None).float()
        else:
            wide = torch.float32 if self._terms <= EXACT_TERMS else torch.float64
            x_scale, qx = quantize_x(x.flatten(1), self.quant_config.activation_granularity)
            product = self._convolve(qx.view(x.shape).to(wide), codes.to(wide), None).float()
            out = product * (x_scale.view(-1, 1, 1, 1) * scale)
        if self.bias is not None:
            out = out + self.bias.float().view(-1, 1, 1)
        return out.to(x.dtype)

    def _convolve(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        padded = F.pad(x, self.padding, "constant" if self.padding_mode == "zeros" else self.padding_mode)
        return F.conv2d(padded, weight, bias, self.stride, 0, self.dilation, self.groups)

    def _padding(self, padding: _Pair | str) -> tuple[int, int, int, int]:
        """Return what is added left, right, above and below."""
        if padding == "valid":
            return (0, 0, 0, 0)
        if padding == "same":
            if self.stride != (1, 1):
                raise QuantizationError("padding='same' needs a stride of 1.")
            down, across = (d * (k - 1) for d, k in zip(self.dilation, self.kernel_size, strict=True))
            return (across // 2, across - across // 2, down // 2, down - down // 2)
        if isinstance(padding, str):
            raise QuantizationError(f"padding is {padding!r}; it must be a number, a pair, same or valid.")
        down, across = _pair("padding", padding, least=0)
        return (across, across, down, down)

    def _begin(self, weight: nn.Parameter) -> None:
        nn.init.kaiming_uniform_(weight, a=math.sqrt(5))
        begin_bias(self.bias, self._terms)

    def _pack(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        scale, codes = quantize_weight(weight, self.quant_config.weight_granularity)
        return scale.view(-1).expand(self.out_channels).contiguous(), rows.pack(codes.flatten(1))

    def _unpack(self, qweight: Tensor) -> Tensor:
        return rows.unpack(qweight, self.out_channels, self._terms).view(self.weight_shape)

    def _packed_shapes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return (self.out_channels,), (self.out_channels, (self._terms + 3) // 4)


def _pair(name: str, value: _Pair, least: int = 1) -> tuple[int, int]:
    pair = (value, value) if isinstance(value, int) else tuple(value)
    if len(pair) != 2 or any(isinstance(size, bool) or size < least for size in pair):
        raise QuantizationError(f"{name} is {value!r}; it must be one or two whole numbers from {least} on.")
    return pair[0], pair[1]
