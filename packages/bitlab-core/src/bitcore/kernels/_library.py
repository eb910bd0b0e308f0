"""`torch.ops.bitcore.linear`, through which compilers and exporters see the kernels."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from bitcore.config import BitQuantConfig
from bitcore.exceptions import QuantizationError
from bitcore.kernels.registry import KernelRegistry
from bitcore.packing import tiles

_CONFIGS = {
    "int8_per_token": BitQuantConfig(),
    "int8_per_tensor": BitQuantConfig(activation_granularity="per_tensor"),
    "float32": BitQuantConfig(activation_dtype="float32"),
}
"""What the operator's last argument stands for; how weights were quantised is in their scales."""


def activations_of(config: BitQuantConfig) -> str:
    """Return the operator's name for how activations are quantised."""
    if not config.quantizes_activations:
        return "float32"
    return "int8_per_token" if config.scales_each_token else "int8_per_tensor"


def _config_of(activations: str) -> BitQuantConfig:
    if activations not in _CONFIGS:
        raise QuantizationError(f"activations is {activations!r}; it must be one of {', '.join(_CONFIGS)}.")
    return _CONFIGS[activations]


def _linear(
    x: Tensor, qweight_scale: Tensor, qweight: Tensor, bias: Tensor | None, activations: str
) -> Tensor:
    config = _config_of(activations)
    shape = (qweight_scale.numel(), x.shape[-1]) if x.ndim else None
    kernel = KernelRegistry.get_kernel_for_config(config, x.device, shape)
    return kernel(x, qweight_scale, qweight, bias, config)


def _fake(
    x: Tensor,
    qweight_scale: Tensor,
    qweight: Tensor,  # noqa: ARG001
    bias: Tensor | None,  # noqa: ARG001
    activations: str,
) -> Tensor:
    _config_of(activations)
    return x.new_empty((*x.shape[:-1], qweight_scale.shape[0]))


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG001
    x, qweight_scale, qweight, _, _ = inputs
    ctx.save_for_backward(qweight_scale, qweight)
    ctx.columns = x.shape[-1]


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, None, Tensor | None, None]:
    """Straight through the rounding of the activations; the packed weight has no gradient."""
    qweight_scale, qweight = ctx.saved_tensors
    by_x = by_bias = None
    if ctx.needs_input_grad[0]:
        codes = tiles.unpack(qweight, len(qweight_scale), ctx.columns).to(grad.dtype)
        by_x = (grad.float() * qweight_scale).to(grad.dtype) @ codes
    if ctx.needs_input_grad[3]:
        by_bias = grad.reshape(-1, grad.shape[-1]).sum(0)
    return by_x, None, None, by_bias, None


_LIBRARY: Any = torch.library.Library("bitcore", "DEF")
_LIBRARY.define(
    "linear(Tensor x, Tensor qweight_scale, Tensor qweight, Tensor? bias, str activations) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_LIBRARY.impl("linear", _linear, "CompositeExplicitAutograd")
_register: Any = torch.library
_register.register_fake("bitcore::linear", _fake, lib=_LIBRARY)
_register.register_autograd("bitcore::linear", _backward, setup_context=_setup, lib=_LIBRARY)
_operator = cast("Any", torch.ops).bitcore.linear.default


def linear(
    x: Tensor, qweight_scale: Tensor, qweight: Tensor, bias: Tensor | None, config: BitQuantConfig
) -> Tensor:
    """Return a ternary layer's output; `BitKernelBase.__call__` says what it is."""
    return _operator(x, qweight_scale, qweight, bias, activations_of(config))
