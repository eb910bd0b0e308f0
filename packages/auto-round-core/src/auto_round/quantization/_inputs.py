"""What goes into the layers of a block: measured for importance and ranges, or rounded to 8 bits."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from types import TracebackType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from auto_round.config_manager import LayerSettings, QuantizationConfig
from auto_round.exceptions import QuantizationError
from auto_round.quantization._activations_quant import (
    ActivationKind,
    amax_to_scale,
    fake_quantize_static,
    fake_quantize_tokens,
)
from auto_round.quantization._experts import GROUPED_PRODUCTS
from auto_round.quantization._layers import Layer

# What multiplies by a weight, and where in its arguments inputs and weight are.
_PRODUCTS: dict[Any, tuple[int, int, str, str]] = {
    F.linear: (0, 1, "input", "weight"),
    torch.addmm: (1, 2, "mat1", "mat2"),
    torch.matmul: (0, 1, "input", "other"),
    Tensor.matmul: (0, 1, "self", "other"),
}


class InputChanger(TorchFunctionMode):
    """Hands what is multiplied by a layer's weight to a function, and multiplies what that returns.

    Experts are seen one by one or all at once, since what counts is the memory of the weight. Holds in this
    thread, within a `with`.

    Raises:
        QuantizationError: At the end of the `with`, experts had no inputs that were seen.
    """

    def __init__(self, layers: Iterable[Layer], change: Callable[[Layer, Tensor], Tensor]) -> None:
        super().__init__()
        self._layers = {layer.weight.untyped_storage().data_ptr(): layer for layer in layers}
        self._change = change
        self._seen: set[str] = set()

    def __torch_function__(
        self,
        func: Any,
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = dict(kwargs or {})
        product = _PRODUCTS.get(func)
        if product is None and getattr(func, "__name__", "") in GROUPED_PRODUCTS:
            product = 0, 1, "input", "mat2"
        if product is not None:
            inputs, weight, input_name, weight_name = product
            by: Tensor = args[weight] if len(args) > weight else kwargs[weight_name]
            layer = self._layers.get(by.untyped_storage().data_ptr())
            if layer is not None:
                self._seen.add(layer.name)
                if len(args) > inputs:
                    args = (*args[:inputs], self._change(layer, args[inputs]), *args[inputs + 1 :])
                else:
                    kwargs[input_name] = self._change(layer, kwargs[input_name])
        return func(*args, **kwargs)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        super().__exit__(kind, error, trace)  # pyright: ignore[reportUnknownMemberType] - torch's has no types
        for layer in self._layers.values():
            # One expert may have nothing to do, all of a block never.
            if error is None and layer.weight.ndim == 3 and layer.name not in self._seen:
                raise QuantizationError(
                    f"{layer.name} multiplies by copies of its experts, so that their inputs cannot be told; "
                    "load the model with experts_implementation='grouped_mm' or 'eager'."
                )


class InputStatistics:
    """Mean squares of each layer's input channels, and the largest magnitude of its inputs.

    Args:
        layers: Those to be measured.
    """

    def __init__(self, layers: Sequence[Layer]) -> None:
        self._layers = layers
        self._squares: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}
        self._largest: dict[str, Tensor] = {}

    def watching(self) -> InputChanger:
        """Return a context within which inputs are measured."""
        return InputChanger(self._layers, self._note)

    def importance(self, layer: Layer, width: int) -> Tensor:
        """Return the mean square of each input channel, fp32 [width]; ones for a layer that had no inputs."""
        if layer.name not in self._squares:
            # An expert to which nothing was sent has no say about its channels.
            return torch.ones(width, dtype=torch.float32)
        return (self._squares[layer.name] / self._counts[layer.name]).float()

    def largest(self, layer: Layer) -> Tensor:
        """Return the largest magnitude of a layer's inputs, a scalar.

        Raises:
            QuantizationError: It had none.
        """
        if layer.name not in self._largest:
            raise QuantizationError(
                f"{layer.name} had no inputs in calibration, so there is no range for them; set "
                "quantization.act_dynamic to True, or leave the layer out in quantization.ignore_layers."
            )
        return self._largest[layer.name]

    def _note(self, layer: Layer, inputs: Tensor) -> Tensor:
        rows = inputs.detach().float().flatten(0, -2)
        if rows.numel():
            squares = rows.square().sum(0).double().cpu()
            self._squares[layer.name] = self._squares.get(layer.name, 0) + squares
            self._counts[layer.name] = self._counts.get(layer.name, 0) + len(rows)
            largest = rows.abs().amax().cpu()
            self._largest[layer.name] = torch.maximum(self._largest.get(layer.name, largest), largest)
        return inputs


def rounded_inputs(
    layers: Sequence[tuple[Layer, LayerSettings]],
    config: QuantizationConfig,
    ranges: Mapping[str, Tensor] | None = None,
) -> AbstractContextManager[object]:
    """Return a context within which layers get their inputs as the configuration rounds them.

    Args:
        layers: The quantised layers, and how they are.
        config: `act_bits` and `act_dynamic`.
        ranges: The largest magnitude of each layer's inputs, for static scales.
    """
    if config.act_bits == 16:
        return nullcontext()
    kinds: dict[str, ActivationKind] = {
        layer.name: "e4m3" if settings.weight_dtype == "fp8" else "int8" for layer, settings in layers
    }
    scales: dict[str, Tensor] = {}
    if not config.act_dynamic:
        for layer, _ in layers:
            scale = amax_to_scale((ranges or {})[layer.name], kinds[layer.name])
            scales[layer.name] = scale.to(layer.weight.device)

    def change(layer: Layer, inputs: Tensor) -> Tensor:
        if config.act_dynamic:
            return fake_quantize_tokens(inputs, kinds[layer.name])
        return fake_quantize_static(inputs, scales[layer.name], kinds[layer.name])

    return InputChanger([layer for layer, _ in layers], change)
