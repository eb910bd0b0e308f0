"""Training of all scales together, so that the quantised model predicts what the float model does.

Source: Chen et al., "EfficientQAT: Efficient Quantization-Aware Training for Large Language Models"
(arXiv 2407.11062), whose second phase trains the scales of all layers, codes and zero points staying as they
are. It trains them by the next token of a text; here the target is what the float model itself predicts, and
the loss KL(float || quantised), averaged over tokens, so that a small calibration set is enough and nothing
is learnt from it but the float model. Scales are trained relative to their first values.

No more than one block is in memory unless all fit. A step takes a batch through the blocks one after another
and keeps what goes into each, has the model's own forward make logits of what comes out, and goes back block
by block, running each again for its gradient. The float model's hidden states after the last block are there
from quantising, so no float block is run.

Layers outside the blocks stay as they are rounded; one before the blocks counts as not quantised.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence, Set
from contextlib import ExitStack
from typing import Protocol

import torch
from av_memory import MemoryTracker, trim_heap
from torch import Tensor, nn

from auto_round.config_manager import QuantizationConfig
from auto_round.exceptions import QuantizationError
from auto_round.quantization._plan import Means
from auto_round.quantization._report import EndToEndReport
from auto_round.quantization._results import ResultStore
from auto_round.quantization._scales import ScaledBlocks
from auto_round.quantization._source import FloatModel
from auto_round.quantization._streams import Stream, batches, random_batches
from auto_round.quantization._tail import Tail, frozen

_RATE = 5e-3
"""On a small Llama of 2 bits 3e-3 and 5e-3 did about as well after `best`, 1e-3 and 1e-2 less; after others
1e-2 did best. Larger models were not tried."""
_HELD_OUT, _FEWEST_TO_HOLD_OUT = 8, 16
"""Every eighth sample is held out, of at least so many; of fewer each counts for the training."""
_LOOKS = 8
"""How often the loss is measured after a part of the steps."""


class Heads(Protocol):
    """What is known of a model before and around its blocks."""

    def embed(self, samples: Sequence[int]) -> Tensor:
        """Return what goes into the first block for some samples; runs within `callable_head`."""
        ...

    def prepare(self, sizes: Set[int]) -> None:
        """Find out how blocks are called with batches of these sizes; no block may be loaded."""
        ...

    def call(self, index: int, block: nn.Module, hidden: Tensor) -> Tensor:
        """Return what a block makes of hidden states [batch, tokens, width]."""
        ...


class EndToEnd:
    """Trains the scales of a model whose blocks are quantised.

    Args:
        source: The float model.
        config: `end_to_end_steps`, `end_to_end_lr`, batch and seed.
        store: What the blocks became; it is given the new scales where they are better.
        work: Where and with what.
        tail: What follows the blocks.
        heads: What comes before them.
        tokens: int64 [samples, tokens].
        wanted: The float model's hidden states after the last block.
        ranges: As for `ScaledBlocks`.
        on_step: Called after each step with its number from 0 and its loss in nats a token.
    """

    def __init__(
        self,
        source: FloatModel,
        config: QuantizationConfig,
        store: ResultStore,
        work: Means,
        tail: Tail,
        heads: Heads,
        tokens: Tensor,
        wanted: Stream,
        ranges: Mapping[int, Mapping[str, Tensor]],
        on_step: Callable[[int, float], None],
    ) -> None:
        self._source, self._config, self._store, self._work = source, config, store, work
        self._tail, self._heads, self._tokens, self._wanted = tail, heads, tokens, wanted
        self._on_step = on_step
        self._blocks = ScaledBlocks(
            source,
            store,
            config,
            device=work.device,
            dtype=work.dtype,
            resident=work.resident,
            folder=work.spill_folder,
            ranges=ranges,
        )
        self._training, self._measured = split(len(tokens))
        self._batch = min(config.batch_size * config.gradient_accumulate_steps, len(self._training))
        # One place for each sample of a batch before each block, after the last, and for its gradient.
        self._places = (len(self._blocks) + 2) * self._batch
        self._hidden: Stream | None = None
        self._parameters: tuple[dict[str, nn.Parameter], dict[str, nn.Parameter]] = ({}, {})

    def run(self) -> EndToEndReport:
        """Train, and put the scales into the store if the measured loss is less with them.

        Raises:
            QuantizationError: The loss is not finite before any training.
            ExportError: The new scales cannot be written; the store has the old ones.
        """
        begin_s = time.monotonic()
        with MemoryTracker("end to end") as tracker, ExitStack() as stack:
            stack.callback(self._blocks.close)
            stack.callback(self._parameters_go)
            work = self._work
            floats = self._tail.load(work.device, work.dtype)
            self._parameters = floats, {**floats, **self._quantized_outside()}
            shape = self._wanted.shape
            self._hidden = stack.enter_context(Stream(self._places, shape, work.dtype, work.spill_folder))
            groups = [range(self._batch), *batches(self._measured, self._places)]
            self._heads.prepare({len(part) for some in groups for part in batches(some, work.micro_batch)})
            before, after, best_step, losses = self._train()
            if best_step:
                self._store.replace_scales(
                    (f"scales-{index:05d}", scales) for index, scales in self._blocks.best()
                )
        trim_heap()
        return EndToEndReport(
            loss_before=before,
            loss_after=after,
            samples=len(self._measured),
            held_out=self._measured is not self._training,
            best_step=best_step,
            step_losses=tuple(losses),
            wall_s=time.monotonic() - begin_s,
            peak_mb=tracker.result.cpu.peak_mb,
        )

    def _train(self) -> tuple[float, float, int, list[float]]:
        steps, losses = self._config.end_to_end_steps, list[float]()
        before = best = self.measure()
        best_step = 0
        if not math.isfinite(before):
            raise QuantizationError(
                f"the divergence of the quantised model's predictions is {before}: its logits or the float "
                "model's overflow or are NaN. Set quantization.end_to_end_iters to 0 to keep the blocks as "
                "they are."
            )
        order = random_batches(self._training, self._batch, f"{self._config.seed}:end to end")
        rate = self._config.end_to_end_lr or _RATE
        apart = -(-steps // _LOOKS)
        for step in range(steps):
            loss = self.step(next(order), rate * (1 + math.cos(math.pi * step / steps)) / 2, step + 1)
            losses.append(loss)
            self._on_step(step, loss)
            if not math.isfinite(loss):
                # What is done by then took hours, and is kept as it was when it was best.
                break
            if (step + 1) % apart == 0 or step + 1 == steps:
                now = self.measure()
                if now < best:
                    best, best_step = now, step + 1
                    self._blocks.keep()
        return before, best, best_step, losses

    def measure(self) -> float:
        """Return the loss on the samples that are measured, in nats a token."""
        total = 0.0
        for samples in batches(self._measured, self._places):
            places = range(len(samples))
            self._embed(samples)
            for index in range(len(self._blocks)):
                self._forwards(index, places, places)
            with self._source.callable_head():
                for part in batches(places, self._work.micro_batch):
                    total += self._divergence(samples, part, part)[0]
        return total / (len(self._measured) * self._tokens.shape[1])

    def step(self, samples: Sequence[int], rate: float, count: int) -> float:
        """Take a step on a batch.

        Args:
            samples: Its samples.
            rate: The learning rate.
            count: The number of the step, from 1.

        Returns:
            The batch's loss before the step, in nats a token.
        """
        size, last = len(samples), len(self._blocks)
        self._embed(samples)
        for index in range(last):
            self._forwards(index, self._level(index, size), self._level(index + 1, size))
        hidden, gradients = self._level(last, size), self._level(last + 1, size)
        weight = 1 / (size * self._tokens.shape[1])
        total = 0.0
        with self._source.callable_head():
            for part in batches(range(size), self._work.micro_batch):
                some = self._some(hidden, part)
                loss, gradient = self._divergence(samples, part, some, weight=weight)
                assert gradient is not None  # noqa: S101 - a weight was given
                self._stream.write(self._some(gradients, part), gradient)
                total += loss * weight
        if math.isfinite(total):
            for index in reversed(range(last)):
                self._backwards(index, self._level(index, size), gradients, rate, count)
        return total

    @property
    def _stream(self) -> Stream:
        assert self._hidden is not None  # noqa: S101 - there is one while it runs
        return self._hidden

    def _parameters_go(self) -> None:
        self._parameters = ({}, {})

    @staticmethod
    def _level(index: int, size: int) -> range:
        """Return the places of what goes into a block."""
        return range(index * size, (index + 1) * size)

    @staticmethod
    def _some(places: range, part: Sequence[int]) -> Sequence[int]:
        return [places[one] for one in part]

    def _embed(self, samples: Sequence[int]) -> None:
        with self._source.callable_head():
            for part in batches(range(len(samples)), self._work.micro_batch):
                self._stream.write(part, self._heads.embed([samples[one] for one in part]))

    def _forwards(self, index: int, given: range, to: range) -> None:
        with self._blocks.forwards(index) as block:
            for part in batches(range(len(given)), self._work.micro_batch):
                hidden = self._stream.read(self._some(given, part)).to(self._work.device)
                self._stream.write(self._some(to, part), self._heads.call(index, block, hidden))

    def _backwards(self, index: int, given: range, gradients: range, rate: float, count: int) -> None:
        with self._blocks.backwards(index) as block:
            for part in batches(range(len(given)), self._work.micro_batch):
                hidden = self._stream.read(self._some(given, part)).to(self._work.device)
                hidden.requires_grad_(index > 0)
                output = self._heads.call(index, block.module, hidden)
                places = self._some(gradients, part)
                if output.requires_grad:
                    output.backward(self._stream.read(places).to(output))  # pyright: ignore
                if hidden.grad is not None:
                    self._stream.write(places, hidden.grad)
                del output, hidden
            if block.trained:
                self._blocks.step(index, block, rate, count)

    def _divergence(
        self,
        samples: Sequence[int],
        part: Sequence[int],
        places: Sequence[int],
        *,
        weight: float | None = None,
    ) -> tuple[float, Tensor | None]:
        those = [samples[one] for one in part]
        device = self._work.device
        return self._tail.divergence(
            self._tokens[those],
            self._wanted.read(those).to(device),
            self._stream.read(places).to(device),
            self._parameters,
            weight=weight,
        )

    def _quantized_outside(self) -> dict[str, nn.Parameter]:
        """Return the quantised parameters that follow the blocks."""
        found: dict[str, nn.Parameter] = {}
        for layer, _ in self._source.outside(self._config):
            if layer.parameter_name in self._tail.names:
                stored = torch.empty(layer.weight.shape, dtype=self._work.dtype)
                with layer.open(stored) as matrix:
                    matrix.copy_(self._store.read(layer.name).dequantize(matrix.dtype))
                found[layer.parameter_name] = frozen(stored.to(self._work.device))
        return found


def split(samples: int) -> tuple[list[int], list[int]]:
    """Return the samples that are trained on and those on which the loss is measured.

    They are the same list where there are too few to hold some out.
    """
    every = list(range(samples))
    if samples < _FEWEST_TO_HOLD_OUT:
        return every, every
    held = every[_HELD_OUT - 1 :: _HELD_OUT]
    return [one for one in every if one not in set(held)], held
