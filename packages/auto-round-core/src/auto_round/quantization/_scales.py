"""Blocks that are quantised already, and whose scales are trained while their codes stay."""

from __future__ import annotations

import copy
from collections.abc import Callable, Generator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from auto_round.config_manager import LayerSettings, QuantizationConfig
from auto_round.quantization._compute import scale_dtype_of
from auto_round.quantization._experts import FewShapes
from auto_round.quantization._fast_ops import fast_training
from auto_round.quantization._grouping import grouped, row_chunks
from auto_round.quantization._growth import corrections, grown_scale, step_growth
from auto_round.quantization._inputs import rounded_inputs
from auto_round.quantization._layers import Layer
from auto_round.quantization._quantized import QuantizedWeight
from auto_round.quantization._results import ResultStore
from auto_round.quantization._source import FloatModel, block_layers
from auto_round.quantization._streams import Stream

_GROWTH, _MEAN, _SQUARE, _BEST = range(4)
STATE_BYTES = 4 * 4
"""For each scale: growth, Adam's two averages, and the best growth so far, in fp32."""


@dataclass(kw_only=True, slots=True, eq=False)
class ScaledLayer:
    """A layer with its codes, and the gradient of its scales."""

    layer: Layer
    weight: QuantizedWeight
    """With the scales that it had at first."""
    state: slice
    """Where its scales are among those of its block."""
    gradient: Tensor | None = None
    """Of the loss with respect to the scales, fp32 [rows, groups], summed up."""

    def fill(self, growth: Tensor, scale_dtype: torch.dtype) -> None:
        """Write codes times scales into the module."""
        scale = grown_scale(self.weight.scale, growth[self.state], scale_dtype)
        with torch.no_grad(), self.layer.open(self.layer.weight.data) as matrix:
            matrix.copy_(replace(self.weight, scale=scale).dequantize(matrix.dtype))

    def gather(self, leaf: Tensor) -> None:
        """Add to the gradient of the scales what the gradient of the weight says, and let that go."""
        assert leaf.grad is not None  # noqa: S101
        weight, matrix = self.weight, self.layer.matrix(leaf.grad)
        if self.gradient is None:
            self.gradient = torch.zeros(weight.scale.shape, dtype=torch.float32, device=leaf.device)
        with torch.no_grad():
            for rows in row_chunks(*matrix.shape):
                elements = QuantizedWeight(
                    settings=weight.settings,
                    codes=weight.codes[rows],
                    scale=torch.ones_like(weight.scale[rows]),
                    zero=None if weight.zero is None else weight.zero[rows],
                ).dequantize()
                product = grouped(elements.mul_(matrix[rows]), weight.settings.group_size)
                self.gradient[rows] += product.sum(-1)
        leaf.grad = None


@dataclass(kw_only=True, slots=True, eq=False)
class ScaledBlock:
    """A block that holds codes times scales."""

    module: nn.Module
    layers: list[tuple[Layer, LayerSettings]]
    """All that is quantised in it, in any format."""
    trained: list[ScaledLayer]


class ScaledBlocks:
    """Gives the blocks of a model one at a time, with their scales as they are trained.

    Args:
        source: The float model. Blocks are loaded from it and let go again.
        store: Codes, and the scales at first.
        config: How layers are quantised.
        device: Where blocks are computed.
        dtype: In which type.
        resident: Keep all blocks from their first use on.
        folder: Where what is kept for the scales is; None for memory.
        ranges: The largest input of each layer by block, where activations have fixed scales.
    """

    def __init__(
        self,
        source: FloatModel,
        store: ResultStore,
        config: QuantizationConfig,
        *,
        device: torch.device,
        dtype: torch.dtype,
        resident: bool,
        folder: Path | None,
        ranges: Mapping[int, Mapping[str, Tensor]],
    ) -> None:
        self._source, self._store, self._config = source, store, config
        self._device, self._dtype, self._resident, self._folder = device, dtype, resident, folder
        self._ranges, self._scale_dtype = ranges, scale_dtype_of(config)
        self._kept: dict[int, ScaledBlock] = {}
        self._states: dict[int, Stream] = {}

    def __len__(self) -> int:
        return len(self._source.blocks)

    @contextmanager
    def forwards(self, index: int) -> Generator[nn.Module]:
        """Give a block to be run without gradients."""
        with self._opened(index) as block, torch.no_grad(), FewShapes(), self._rounding(index, block):
            yield block.module

    @contextmanager
    def backwards(self, index: int) -> Generator[ScaledBlock]:
        """Give a block that gathers the gradients of its scales while it is run backwards."""
        with self._opened(index) as block, ExitStack() as stack:
            for one in block.trained:
                one.gradient = None
                leaf = one.layer.weight
                leaf.requires_grad_()
                stack.callback(leaf.requires_grad_, False)
                attach = cast("Callable[[object], RemovableHandle]", leaf.register_post_accumulate_grad_hook)  # pyright: ignore
                stack.callback(attach(one.gather).remove)
            stack.enter_context(torch.enable_grad())
            stack.enter_context(FewShapes())
            stack.enter_context(fast_training(block.module))
            stack.enter_context(self._rounding(index, block))
            yield block

    def step(self, index: int, block: ScaledBlock, rate: float, count: int) -> None:
        """Take a step of Adam with what a block has gathered.

        Args:
            index: Of the block.
            block: As `backwards` gave it.
            rate: The learning rate, relative to the scale.
            count: Which step it is, from 1.
        """
        state = self._states[index]
        growth, mean, square = state.read((_GROWTH, _MEAN, _SQUARE)).to(self._device)
        gradient = torch.zeros_like(growth)
        for one in block.trained:
            # Experts to which no token was sent have none.
            if one.gradient is not None:
                gradient[one.state] = one.gradient.mul_(one.weight.scale).flatten()
                one.gradient = None
        more, root = corrections(count)
        step_growth(growth, mean, square, gradient, rate=rate * more, root=root)
        state.write((_GROWTH, _MEAN, _SQUARE), torch.stack((growth, mean, square)))
        if self._resident:
            for one in block.trained:
                one.fill(growth, self._scale_dtype)

    def keep(self) -> None:
        """Remember the scales as they are as the best."""
        for state in self._states.values():
            state.write((_BEST,), state.read((_GROWTH,)))

    def best(self) -> Generator[tuple[int, dict[str, Tensor]]]:
        """Yield the index and the best scales, by layer, of each block that has some."""
        for index, state in self._states.items():
            (growth,) = state.read((_BEST,))
            scales: dict[str, Tensor] = {}
            start = 0
            for name in self._trained_names(index):
                scale = self._store.read(name).scale
                scales[name] = grown_scale(scale, growth[start : start + scale.numel()], self._scale_dtype)
                start += scale.numel()
            yield index, scales

    def close(self) -> None:
        """Let blocks and state go."""
        self._kept.clear()
        for state in self._states.values():
            state.close()
        self._states.clear()

    def _trained_names(self, index: int) -> list[str]:
        found = block_layers(self._source.blocks[index], self._source.block_names[index], self._config)
        return [layer.name for layer, settings in found if settings.weight_dtype == "int"]

    @contextmanager
    def _opened(self, index: int) -> Generator[ScaledBlock]:
        if index in self._kept:
            yield self._kept[index]
            return
        try:
            module = self._source.load(index, self._device, self._dtype)
            if self._resident:
                # The source's own block must be free again whenever the model is called.
                module = copy.deepcopy(module)
                self._source.finish(index, {})
            block = self._filled(index, module)
            del module
            if self._resident:
                self._kept[index] = block
            yield block
        finally:
            self._source.finish(index, {})

    def _filled(self, index: int, module: nn.Module) -> ScaledBlock:
        module.requires_grad_(False)
        layers = block_layers(module, self._source.block_names[index], self._config)
        block = ScaledBlock(module=module, layers=layers, trained=[])
        start = 0
        for layer, settings in layers:
            weight = _moved(self._store.read(layer.name), self._device)
            if settings.weight_dtype != "int":
                with torch.no_grad(), layer.open(layer.weight.data) as matrix:
                    matrix.copy_(weight.dequantize(matrix.dtype))
                continue
            place = slice(start, start + weight.scale.numel())
            block.trained.append(ScaledLayer(layer=layer, weight=weight, state=place))
            start = place.stop
        if not block.trained:
            return block
        if index not in self._states:
            self._states[index] = Stream(4, (start,), torch.float32, self._folder)
            self._states[index].write(range(4), torch.zeros(4, start, dtype=torch.float32))
        growth = self._states[index].read((_GROWTH,))[0].to(self._device)
        for one in block.trained:
            one.fill(growth, self._scale_dtype)
        return block

    def _rounding(self, index: int, block: ScaledBlock) -> AbstractContextManager[object]:
        if not block.layers:
            return nullcontext()
        return rounded_inputs(block.layers, self._config, self._ranges.get(index))


def _moved(weight: QuantizedWeight, device: torch.device) -> QuantizedWeight:
    parts = {
        name: value.to(device)
        for name in ("codes", "scale", "zero", "global_scale")
        if (value := cast("Tensor | None", getattr(weight, name))) is not None
    }
    return replace(weight, **parts)
