"""The ternary linear layer as a function, for training and with packed weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from bitcore._activations import check_floating, eight_bits
from bitcore._weights import mean_magnitude, ternary
from bitcore.config import BitQuantConfig
from bitcore.exceptions import QuantizationError
from bitcore.kernels import _library
from bitcore.kernels.registry import KernelRegistry
from bitcore.packing import tiles

__all__ = ["fake_quantize_weight", "fake_quantize_x", "forward", "is_transformed", "prepare_weights"]

_forward_ad: Any = torch.autograd.forward_ad
_functorch: Any = cast("Any", torch)._C._functorch


def prepare_weights(
    weight: Tensor, config: BitQuantConfig | Mapping[str, Any] | None = None
) -> tuple[Tensor, Tensor]:
    """Quantise a weight and pack it for the kernels.

    Args:
        weight: Floating, [rows, columns].
        config: One scale for the weight, or one for each row, also as a dictionary; the default of
            `BitQuantConfig` if None.

    Returns:
        `qweight_scale`, fp32 [rows], and `qweight`, uint8 in the layout of `bitcore.packing.tiles`.

    Raises:
        QuantizationError: The weight is no floating matrix, or holds NaN or infinity.
    """
    config = BitQuantConfig.of(config)
    kernel = KernelRegistry.get_kernel_for_config(config, weight.device)
    return kernel.prepare_weights(weight, config)


def forward(
    x: Tensor,
    *,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    quant_config: BitQuantConfig | Mapping[str, Any] | None = None,
    training: bool = True,
    qweight: Tensor | None = None,
    qweight_scale: Tensor | None = None,
    strength: float = 1.0,
) -> Tensor:
    """Return the output of a ternary linear layer.

    In training both sides are rounded as they will be later, and gradients pass through the rounding as if it
    were not there (the straight-through estimator of Bengio et al., arXiv 1308.3432), so that with the
    rounded x' and W' the gradients are `grad @ W'` of x and `grad.T @ x'` of the weight. Else the kernel
    computes on packed weights; see `BitKernelBase.__call__`.

    Args:
        x: Floating, [..., columns].
        weight: Floating, [rows, columns]; needed for training. Elsewhere it is packed at each call where no
            packed one is given, and gets its gradient either way.
        bias: [rows].
        quant_config: How both are quantised, also as a dictionary; the default of `BitQuantConfig` if None.
        training: With gradients, from the float weight.
        qweight: What `prepare_weights` returned.
        qweight_scale: What `prepare_weights` returned.
        strength: In training, how much of the rounding is done: 0 none, 1 all. A network that was trained
            with floats takes it better when it comes little by little.

    Returns:
        [..., rows], in x's dtype (under autocast, in its).

    Raises:
        QuantizationError: What is needed is missing, shapes do not fit, or x is not floating.
    """
    config = BitQuantConfig.of(quant_config)
    if training and weight is None:
        raise QuantizationError("training=True needs the float weight; packed weights cannot be trained.")
    transformed = not torch.compiler.is_compiling() and is_transformed()
    if weight is not None and (training or transformed):
        _check_columns(x, weight)
        return F.linear(
            fake_quantize_x(x, config, strength), fake_quantize_weight(weight, config, strength), bias
        )
    if weight is not None:
        _check_columns(x, weight)
    if qweight is None or qweight_scale is None:
        if weight is None:
            raise QuantizationError("training=False needs qweight and qweight_scale, or the float weight.")
        qweight_scale, qweight = prepare_weights(weight, config)
    if transformed:
        # The operator has gradients backwards alone.
        codes = tiles.unpack(qweight, len(qweight_scale), x.shape[-1])
        dequantized = (codes * qweight_scale.unsqueeze(-1)).to(x.dtype)
        return F.linear(fake_quantize_x(x, config), dequantized, None if bias is None else bias.to(x.dtype))
    out = _library.linear(x, qweight_scale, qweight, bias, config)
    if weight is not None and weight.requires_grad and torch.is_grad_enabled():
        return cast("Any", _WeightGradient).apply(out, x, weight, config)
    return out


def is_transformed() -> bool:
    """Return whether a function of `torch.func`, or differentiation forwards, is at work.

    Compilers do not trace this.
    """
    return _forward_ad._current_level >= 0 or _functorch.peek_interpreter_stack() is not None


def fake_quantize_weight(weight: Tensor, config: BitQuantConfig, strength: float = 1.0) -> Tensor:
    """Return a weight rounded to -1, 0 and 1 times its scale, in its dtype; its gradient passes straight.

    With a `strength` below 1 it goes only that far from the weight to the rounded one.
    """
    with torch.no_grad():
        scale = mean_magnitude(weight, config.weight_granularity)
        rounded = (ternary(weight, scale) * scale).to(weight.dtype)
    return _straight(weight, rounded, strength)


def fake_quantize_x(x: Tensor, config: BitQuantConfig, strength: float = 1.0) -> Tensor:
    """Return activations rounded to 8 bits times their scale, in their dtype; the gradient passes straight.

    With a `strength` below 1 they go only that far from what they are to what is rounded.

    Raises:
        QuantizationError: x is not floating.
    """
    if not config.quantizes_activations:
        check_floating(x)
        return x
    with torch.no_grad():
        scale, codes = eight_bits(x, config.activation_granularity)
        rounded = (codes * scale).to(x.dtype)
    return _straight(x, rounded, strength)


class _StraightThrough(torch.autograd.Function):
    """The second argument forwards; the gradient goes to the first."""

    generate_vmap_rule = True

    @staticmethod
    def forward(_value: Tensor, rounded: Tensor) -> Tensor:  # pyright: ignore
        return rounded

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        """Keep nothing."""

    @staticmethod
    def backward(_ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:  # pyright: ignore
        return grads[0], None


class _WeightGradient(torch.autograd.Function):
    """Passes a packed layer's output on, and its gradient to the float weight that was packed."""

    @staticmethod
    def forward(  # pyright: ignore
        out: Tensor,
        x: Tensor,  # noqa: ARG004
        weight: Tensor,  # noqa: ARG004
        config: BitQuantConfig,  # noqa: ARG004
    ) -> Tensor:
        return out.view_as(out)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:  # noqa: ARG004
        _, x, weight, config = inputs
        ctx.save_for_backward(x)
        ctx.config, ctx.dtype = config, weight.dtype

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, Tensor, None]:  # pyright: ignore
        (grad,), (x,) = grads, ctx.saved_tensors
        rounded = fake_quantize_x(x, ctx.config).reshape(-1, x.shape[-1])
        by_weight = grad.reshape(-1, grad.shape[-1]).t() @ rounded
        return grad, None, by_weight.to(ctx.dtype), None


def _straight(value: Tensor, rounded: Tensor, strength: float) -> Tensor:
    if strength != 1.0:
        with torch.no_grad():
            rounded = value.lerp(rounded, strength)
    if not torch.compiler.is_compiling() and is_transformed():
        return rounded.detach() + (value - value.detach())
    return cast("Any", _StraightThrough).apply(value, rounded)


def _check_columns(x: Tensor, weight: Tensor) -> None:
    if weight.ndim != 2 or x.ndim == 0 or x.shape[-1] != weight.shape[1]:
        raise QuantizationError(
            f"inputs of shape {list(x.shape)} do not fit a weight [rows, columns] of {list(weight.shape)}."
        )
