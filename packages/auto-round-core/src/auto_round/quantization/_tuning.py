"""Train the quantisation of one block: its quantised output is to be what the float block put out."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Protocol, cast

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from auto_round.config_manager import LayerSettings, QuantizationConfig
from auto_round.exceptions import QuantizationError
from auto_round.quantization._block_ap import IntegerBlockAP
from auto_round.quantization._block_loss import BlockLoss
from auto_round.quantization._capture import Call
from auto_round.quantization._compute import scale_dtype_of
from auto_round.quantization._float_signround import FloatSignRound
from auto_round.quantization._layers import Layer
from auto_round.quantization._pieces import Scratch, WeightRows
from auto_round.quantization._quantized import QuantizedWeight
from auto_round.quantization._signround import IntegerSignRound
from auto_round.quantization._streams import Stream, batches, random_batches

_MANY_ITERS, _FEW_BITS = 1000, 3
_BEST_RATE = 5e-3
_HELD_VALUES = 1 << 24
"""The most values of a float weight that is held where memory is not short; more are read at each step."""
_SYMMETRIC_RANGE, _ASYMMETRIC_RANGE = 0.7, 1.4
"""What ranges take of the paper's rate: asymmetric ones have further to go at few bits."""


class Tuner(Protocol):
    """The trained quantisation of one matrix of weights."""

    def write(self, target: Tensor, *, keep: bool = False) -> None:
        """Write the quantised weight as it stands into `target`; `keep` remembers it as best."""
        ...

    def step(self, gradient: Tensor, target: Tensor, factor: float, *, keep: bool) -> None:
        """Take a step and write the new weight; `factor` is what is left of the rates."""
        ...

    def result(self) -> QuantizedWeight:
        """Return the best quantisation that was remembered."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Tuned:
    """What came of one block."""

    weights: dict[str, QuantizedWeight]
    """By the layer's name."""
    loss_before: float
    """Mean squared error of the block's output over all samples, rounded to nearest."""
    best_step: int
    """The step whose parameters were kept, counted from 0: that with the least mean loss of the batches up to
    it, as many as hold all samples."""
    losses: tuple[float, ...]
    """Of each step's batch, before the step, as a share of what rounding to nearest loses on that batch."""


def tune_block(
    block: nn.Module,
    layers: Sequence[tuple[Layer, LayerSettings]],
    read: Callable[[Layer], WeightRows],
    call: Callable[[int], Call],
    loss_of: BlockLoss,
    inputs: Stream,
    targets: Stream,
    samples: int,
    config: QuantizationConfig,
    *,
    micro_batch: int,
    compiles: bool,
    seed: str,
    on_step: Callable[[int, float], None] | None = None,
) -> Tuned:
    """Train the quantisation of a block's layers, and leave the best in the block.

    Args:
        block: On the device and in the type in which it is to be trained, in evaluation mode.
        layers: What is quantised in it, and how.
        read: Returns a layer's float weight, a matrix [rows, in] in fp32, or what gives its rows.
        call: Says how the block is called with a batch of so many samples.
        loss_of: Runs it.
        inputs: What goes in.
        targets: What is to come out.
        samples: How many there are of both.
        config: Method, steps, rates and batch.
        micro_batch: Samples that go through the block at once; the batch of a step is split into as many.
        compiles: The steps of integers' tuners are compiled.
        seed: Of the order of samples. Each block has its own, so that none depends on what others drew.
        on_step: Called after each step with its number and its loss relative to rounding to nearest.

    Raises:
        QuantizationError: A weight or a loss is not finite; the message names the layer.
    """
    device = layers[0][0].weight.device
    scratch = Scratch(device, compiles=compiles)
    block.requires_grad_(False)
    tuners: list[tuple[Layer, nn.Parameter, Tuner]] = []
    for layer, settings in layers:
        leaf = layer.weight
        leaf.requires_grad_()
        with layer.named_in_errors():
            weight = read(layer)
            if compiles and math.prod(weight.shape) <= _HELD_VALUES:
                weight = weight[:]
            tuner = make_tuner(weight, settings, config, scratch)
        with layer.open(leaf.data) as matrix:
            tuner.write(matrix, keep=True)
        tuners.append((layer, leaf, tuner))

    def given(some: Sequence[int]) -> tuple[Call, Tensor, Tensor]:
        return call(len(some)), inputs.read(some).to(device), targets.read(some).to(device)

    base = torch.empty(samples, dtype=torch.float32)
    with torch.no_grad():
        for batch in batches(list(range(samples)), micro_batch):
            base[batch] = BlockLoss(compiles=False)(block, *given(batch)).cpu()
    loss_before = float(base.mean())
    if not math.isfinite(loss_before):
        raise QuantizationError(
            f"the loss of the block of {layers[0][0].name} is {loss_before}: activations overflow or are NaN."
        )
    # A sample on which nothing is lost must not divide by zero.
    base.clamp_(min=max(loss_before * 1e-6, 1e-30))

    best, best_step, losses = 1.0, 0, list[float]()
    size = min(config.batch_size * config.gradient_accumulate_steps, samples)
    order = random_batches(range(samples), size, seed)
    state = _StepState()
    # One batch is easier than another, so steps are judged by as many as hold all samples.
    recent = deque[float](maxlen=samples // size)

    with ExitStack() as stack:
        stack.enter_context(loss_of.fast(block, lambda: given(range(min(size, micro_batch)))))
        for layer, leaf, tuner in tuners:
            attach = cast("Callable[[object], RemovableHandle]", leaf.register_post_accumulate_grad_hook)  # pyright: ignore
            stack.callback(attach(_stepper(layer, tuner, state)).remove)
        for step in range(config.iters):
            batch = next(order)
            parts = list(batches(batch, micro_batch))
            share = float(base[batch].mean()) * len(batch)
            state.factor = _schedule(config.quality, step, config.iters)
            loss = 0.0
            for index, part in enumerate(parts):
                # What goes in and is to come out has no name here, so that nothing of it stays too long.
                error = loss_of(block, *given(part)).sum() / share
                loss += float(error.detach())
                state.last = index == len(parts) - 1
                if state.last:
                    recent.append(loss)
                    state.keep = sum(recent) < best * len(recent)
                error.backward()  # pyright: ignore[reportUnknownMemberType] - torch's annotation
            if not math.isfinite(loss):
                raise QuantizationError(
                    f"the loss of the block of {layers[0][0].name} is {loss} at step {step}; set a smaller "
                    "quantization.lr."
                )
            if state.keep:
                best, best_step = sum(recent) / len(recent), step
            losses.append(loss)
            if on_step is not None:
                on_step(step, loss)

    weights: dict[str, QuantizedWeight] = {}
    with torch.no_grad():
        for layer, leaf, tuner in tuners:
            leaf.requires_grad_(False).grad = None
            weights[layer.name] = tuner.result()
            with layer.open(leaf.data) as matrix:
                matrix.copy_(weights[layer.name].dequantize(leaf.dtype))
    return Tuned(weights=weights, loss_before=loss_before, best_step=best_step, losses=tuple(losses))


def make_tuner(
    weight: WeightRows, settings: LayerSettings, config: QuantizationConfig, scratch: Scratch
) -> Tuner:
    """Return what trains a matrix [rows, in] as the configuration asks for; it leaves the matrix as it is."""
    rate = config.lr
    scale_dtype = scale_dtype_of(config)
    if config.quality == "best" and settings.weight_dtype == "int":
        return IntegerBlockAP(
            weight[:].clone(),
            settings,
            scale_dtype,
            scratch,
            rate=rate or _BEST_RATE,
            scale_rate=config.minmax_lr or rate or _BEST_RATE,
        )
    usual = 1 / max(1, config.iters)
    if config.iters >= _MANY_ITERS and settings.bits <= _FEW_BITS:
        usual *= 2
    trains_integers = settings.weight_dtype == "int"
    range_share = (_SYMMETRIC_RANGE if settings.symmetric else _ASYMMETRIC_RANGE) if trains_integers else 1
    range_rate = config.minmax_lr or rate or range_share * usual
    if trains_integers:
        # Twice the paper's: most offsets take less than whole steps here, and all end within their range.
        rate = rate or 2 / max(1, config.iters)
        return IntegerSignRound(weight, settings, scale_dtype, scratch, rate=rate, range_rate=range_rate)
    return FloatSignRound(weight[:], settings, rate=rate or usual, range_rate=range_rate)


def _schedule(quality: str, step: int, steps: int) -> float:
    """Return what is left of the rates at a step: linear to zero for SignRound, a cosine for Adam."""
    return 1 - step / steps if quality != "best" else (1 + math.cos(math.pi * step / steps)) / 2


@dataclass
class _StepState:
    """What the hooks need to know of the step that is being taken."""

    factor: float = 1.0
    keep: bool = False
    last: bool = False


def _stepper(layer: Layer, tuner: Tuner, state: _StepState) -> Callable[[Tensor], None]:
    """Return a hook that steps as soon as a weight's gradient is whole, and lets the gradient go.

    All gradients of a block are never there at once. The weight is changed while others still wait for
    theirs: that is safe, since a weight's own gradient is the last thing for which autograd needs it.
    """

    def hook(leaf: Tensor) -> None:
        if not state.last or leaf.grad is None:
            return
        with torch.no_grad(), layer.open(leaf.data) as matrix:
            tuner.step(layer.matrix(leaf.grad), matrix, state.factor, keep=state.keep)
        leaf.grad = None

    return hook
