"""The linear layer with ternary weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, Literal, get_args

import torch
from bitcore.config import BitQuantConfig, check_sizes
from bitcore.exceptions import QuantizationError
from bitcore.kernels import KernelRegistry
from bitcore.ops import bitlinear
from bitcore.packing import tiles
from torch import Tensor, nn

from bitlayers._ternary import TernaryLayer, any_autocast, begin_bias, is_plain, wants_gradients
from bitlayers.norm import SubLN

__all__ = ["BitLinear", "InitMethod"]

InitMethod = Literal["xavier_uniform", "kaiming_uniform"]


class BitLinear(TernaryLayer):
    """A linear layer whose weights are -1, 0 and 1 times a scale, and whose inputs are rounded to 8 bits.

    It stands where `torch.nn.Linear` stands. Training keeps a float weight and passes gradients straight
    through the rounding (BitNet b1.58, Ma et al., arXiv 2402.17764); evaluation computes on packed codes;
    `deploy` drops the float weight.

    Args:
        in_features: Size of inputs, above zero.
        out_features: Size of outputs, above zero.
        bias: Whether outputs have a bias.
        init_method: How the weight begins. `xavier_uniform` is Glorot's; `kaiming_uniform` is that of
            `torch.nn.Linear`. The bias begins as that of `torch.nn.Linear` either way.
        quant_config: How weights and inputs are quantised, also as a dictionary; the default of
            `BitQuantConfig` if None.
        norm: Normalises inputs before they are rounded: True for a `SubLN`, or a module of your own. BitNet
            has one before each of its layers.
        device: Of the parameters.
        dtype: Of the parameters.

    Raises:
        QuantizationError: A size, `init_method` or `quant_config` is none of those that are allowed.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        init_method: InitMethod = "xavier_uniform",
        quant_config: BitQuantConfig | Mapping[str, Any] | None = None,
        *,
        norm: bool | nn.Module = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_sizes(in_features=in_features, out_features=out_features)
        if init_method not in get_args(InitMethod):
            raise QuantizationError(
                f"init_method is {init_method!r}; it must be one of {', '.join(get_args(InitMethod))}."
            )
        super().__init__((out_features, in_features), quant_config, device, dtype)
        self.in_features, self.out_features = in_features, out_features
        self.init_method: InitMethod = init_method
        self.bias = nn.Parameter(torch.empty(out_features, device=device, dtype=dtype)) if bias else None
        if norm is True:
            norm = SubLN(in_features, device=device, dtype=dtype)
        self.norm = norm or None
        self._run: Callable[[Tensor], Tensor] | None = None
        self.reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        """Return the layer's output.

        Args:
            x: Floating, [..., in_features].

        Returns:
            [..., out_features], in x's dtype, or in that of autocast.

        Raises:
            QuantizationError: x is not floating or of another size, or the weight holds NaN or infinity.
        """
        shape = x.shape
        if not shape or shape[-1] != self.in_features:
            raise QuantizationError(f"inputs are [..., {self.in_features}]; these are {list(shape)}.")
        if self.norm is not None:
            x = self.norm(x)
        compiling = torch.compiler.is_compiling()
        if self.training or (compiling and self.weight is not None):
            return bitlinear.forward(
                x,
                weight=self.weight,
                bias=self.bias,
                quant_config=self.quant_config,
                strength=self._strength,
            )
        autocasts = compiling or any_autocast()
        if autocasts and torch.is_autocast_enabled(x.device.type) and x.is_floating_point():
            x = x.to(torch.get_autocast_dtype(x.device.type))
        # Asked first, as looking parameters up takes longer.
        differentiable = torch.is_grad_enabled() and wants_gradients(x, self.weight, self.bias)
        if compiling or differentiable or not is_plain(x):
            taken = compiling or bitlinear.is_transformed()
            scale, qweight = (self.qweight_scale, self.qweight) if taken else self.packed()
            return bitlinear.forward(
                x,
                weight=self.weight,
                bias=self.bias,
                quant_config=self.quant_config,
                training=False,
                qweight=qweight,
                qweight_scale=scale,
            )
        # In this order, as in `packed`.
        run = None if self._is_stale() else self._run
        return (run or self._bind())(x)

    def extra_repr(self) -> str:
        """Return what `repr` says of the layer."""
        sizes = f"in_features={self.in_features}, out_features={self.out_features}"
        return f"{sizes}, bias={self.bias is not None}{self._form}"

    def _bind(self) -> Callable[[Tensor], Tensor]:
        sources = self._sources()
        scale, qweight = self.packed()
        shape = self.out_features, self.in_features
        kernel = KernelRegistry.get_kernel_for_config(self.quant_config, qweight.device, shape)
        run = self._run = kernel.bind(scale, qweight, self.bias, self.quant_config)
        self._kept_of = sources
        return run

    def _begin(self, weight: nn.Parameter) -> None:
        if self.init_method == "xavier_uniform":
            nn.init.xavier_uniform_(weight)
        else:
            nn.init.kaiming_uniform_(weight, a=math.sqrt(5))
        begin_bias(self.bias, self.in_features)

    def _pack(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        return bitlinear.prepare_weights(weight, self.quant_config)

    def _unpack(self, qweight: Tensor) -> Tensor:
        return tiles.unpack(qweight, self.out_features, self.in_features)

    def _packed_shapes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return (self.out_features,), tiles.packed_shape(self.out_features, self.in_features)

    def forget_packed(self) -> None:
        """Drop what is kept for evaluation, so that the weight is looked at again."""
        super().forget_packed()
        self._run = None

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"_run": None}
