"""The walk over the blocks: each is loaded, quantised against its float output, written, and let go."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence, Set
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Protocol

import torch
from av_memory import MemoryTracker, get_cpu_memory, trim_heap, tune_allocator
from torch import Tensor, nn

from auto_round.config_manager import LayerSettings, QuantizationConfig
from auto_round.exceptions import QuantizationError
from auto_round.quantization._block_loss import BlockLoss
from auto_round.quantization._capture import Call, Capture, same_calls
from auto_round.quantization._compute import all_finite, scale_dtype_of
from auto_round.quantization._end_to_end import EndToEnd
from auto_round.quantization._experts import FewShapes
from auto_round.quantization._inputs import InputStatistics, rounded_inputs
from auto_round.quantization._layers import Layer
from auto_round.quantization._plan import Means
from auto_round.quantization._quantized import QuantizedWeight
from auto_round.quantization._report import BlockReport, LayerReport, QuantizationReport, layer_report
from auto_round.quantization._results import ResultStore
from auto_round.quantization._rtn import quantize_optimized_rtn, quantize_rtn
from auto_round.quantization._source import FloatModel, block_layers
from auto_round.quantization._streams import Stream, batches
from auto_round.quantization._tail import Tail
from auto_round.quantization._tuning import tune_block

_MMAP_BYTES, _KEPT_BYTES = 32 << 20, 1 << 30


class Progress(Protocol):
    """Is told how far the work is."""

    def begin(self, blocks: int, steps: int) -> None:
        """Work begins on so many blocks, each with so many steps of training."""
        ...

    def step(self, block: int, step: int, loss: float) -> None:
        """A step of training was taken; the loss is relative to rounding to nearest."""
        ...

    def block(self, index: int, report: BlockReport) -> None:
        """A block is done."""
        ...

    def end_to_end(self, step: int, steps: int, loss: float) -> None:
        """A step of training all scales together was taken, of so many; the loss is in nats a token."""
        ...


class Walk:
    """Quantises the blocks of a model in their order.

    Args:
        source: The float model.
        config: How.
        store: Where the quantised weights go.
        means: Device, type, and what is allowed of memory.
        tokens: Calibration, int64 [samples, tokens]; None where the method reads none.
        report: Is filled.
        progress: Is told.
        tail: What follows the blocks, where scales are trained end to end.
    """

    def __init__(
        self,
        source: FloatModel,
        config: QuantizationConfig,
        store: ResultStore,
        means: Means,
        tokens: Tensor | None,
        report: QuantizationReport,
        progress: Progress,
        tail: Tail | None = None,
    ) -> None:
        self._source, self._config, self._store, self._means = source, config, store, means
        self._tokens, self._report, self._progress = tokens, report, progress
        self._scale_dtype = scale_dtype_of(config)
        self._capture = Capture(source.model, list(source.blocks))
        self._calls: dict[int, list[Call]] = {}
        self._tail = tail
        self._loss = BlockLoss(compiles=means.compiles and not self._hides_from_compilers())
        self._ranges: dict[int, dict[str, Tensor]] = {}
        self._begin_s = time.monotonic()

    def run(self) -> None:
        """Quantise all blocks, and then the layers outside them that the configuration names.

        Raises:
            QuantizationError: Weights, calibration or losses are not finite, or something does not fit.
        """
        self._progress.begin(len(self._source.blocks), self._config.iters if self._config.trains else 0)
        with ExitStack() as stack:
            wanted = self._blocks(stack)
            outside = self._outside()
            if self._tail is not None and wanted is not None:
                self._end_to_end(self._tail, wanted)
        self._source.take_over(outside)

    def _blocks(self, stack: ExitStack) -> Stream | None:
        """Quantise the blocks; return what the last float block puts out, which the stack closes."""
        if self._tokens is None:
            for index in range(len(self._source.blocks)):
                self._block(index, None, None)
            return None
        # Two streams: what the float blocks put out, and what the quantised ones do.
        float_stream = stack.enter_context(self._embedded(self._tokens))
        with ExitStack() as here:
            quantized_stream = float_stream
            if self._config.enable_quanted_input:
                quantized_stream = here.enter_context(self._copied(float_stream))
            for index in range(len(self._source.blocks)):
                self._block(index, float_stream, quantized_stream)
        return float_stream

    def _end_to_end(self, tail: Tail, wanted: Stream) -> None:
        assert self._tokens is not None  # noqa: S101 - there is a stream
        steps = self._config.end_to_end_steps
        report = EndToEnd(
            self._source,
            self._config,
            self._store,
            self._means,
            tail,
            self,
            self._tokens,
            wanted,
            self._ranges,
            lambda step, loss: self._progress.end_to_end(step, steps, loss),
        ).run()
        self._report.end_to_end = report
        self._report.memory.append((time.monotonic() - self._begin_s, get_cpu_memory()))
        if report.best_step and self._source.folder is None:
            for block, name in zip(self._source.blocks, self._source.block_names, strict=True):
                layers = block_layers(block, name, self._config)
                self._source.take_over({layer.name: self._store.read(layer.name) for layer, _ in layers})

    @property
    def _samples(self) -> int:
        return 0 if self._tokens is None else len(self._tokens)

    def _batches(self) -> Iterator[Sequence[int]]:
        return batches(list(range(self._samples)), self._means.micro_batch)

    def _embedded(self, tokens: Tensor) -> Stream:
        """Return what goes into the first block."""
        stream: Stream | None = None
        with ExitStack() as undo, self._source.callable_head():
            first: list[Call] | None = None
            for batch in self._batches():
                hidden, calls = self._capture.run(tokens[batch])
                if not all_finite(hidden):
                    raise QuantizationError(
                        f"the embeddings of {self._source.kind} give NaN or infinity for samples {batch[0]} "
                        f"to {batch[-1]} of the calibration; the checkpoint's embeddings are damaged."
                    )
                if stream is None:
                    shape = hidden.shape[1:]
                    stream = Stream(len(tokens), shape, self._means.dtype, self._means.spill_folder)
                    undo.callback(stream.close)
                stream.write(batch, hidden)
                if len(batch) not in self._calls:
                    self._calls[len(batch)] = self._moved(calls)
                if first is not None and len(batch) == self._means.micro_batch:
                    differing = same_calls(first, calls)
                    if differing is not None:
                        raise QuantizationError(
                            f"{self._source.block_names[differing]} is called with arguments that differ "
                            "from sample to sample; only models whose blocks get the same mask and positions "
                            "for all sequences of one length can be calibrated."
                        )
                first = first or calls
            undo.pop_all()
        assert stream is not None  # noqa: S101 - there is at least one sample
        return stream

    def _copied(self, stream: Stream) -> Stream:
        copy = Stream(*self._like(stream))
        with ExitStack() as undo:
            undo.callback(copy.close)
            for batch in self._batches():
                copy.write(batch, stream.read(batch))
            undo.pop_all()
        return copy

    def _moved(self, calls: list[Call]) -> list[Call]:
        return [call.to(self._means.device, self._means.dtype) for call in calls]

    def embed(self, samples: Sequence[int]) -> Tensor:
        """Return what goes into the first block for some samples; runs within `callable_head`."""
        assert self._tokens is not None  # noqa: S101
        return self._capture.run(self._tokens[list(samples)])[0]

    def prepare(self, sizes: Set[int]) -> None:
        """Find out how blocks are called with batches of these sizes."""
        for size in sizes - self._calls.keys():
            assert self._tokens is not None  # noqa: S101
            with self._source.callable_head():
                _, calls = self._capture.run(self._tokens[:size])
            self._calls[size] = self._moved(calls)

    def _hides_from_compilers(self) -> bool:
        """Return whether compiling a block would fail, or would take the first block's roundings for all."""
        rounds = self._config.act_bits < 16
        return rounds or any(parameter.ndim > 2 for parameter in self._source.blocks[0].parameters())

    def call(self, index: int, block: nn.Module, hidden: Tensor) -> Tensor:
        """Return what a block makes of hidden states [batch, tokens, width]."""
        return self._call(index, len(hidden))(block, hidden)

    def _call(self, index: int, samples: int) -> Call:
        self.prepare({samples})
        return self._calls[samples][index]

    def _block(self, index: int, float_stream: Stream | None, quantized_stream: Stream | None) -> None:
        name = self._source.block_names[index]
        begin_s = time.monotonic()
        if self._means.keeps_heap:
            # Each time: reading what comes before the blocks sets it the other way.
            tune_allocator(_MMAP_BYTES, trim_threshold_bytes=_KEPT_BYTES)
        # Outermost, so that it is given the inputs as whatever is entered later has rounded them.
        with FewShapes(), MemoryTracker(name) as tracker:
            block = self._source.load(index, self._means.device, self._means.dtype)
            layers = block_layers(block, name, self._config)
            if float_stream is None or quantized_stream is None:
                weights, reports = self._without_inputs(layers)
                report = BlockReport(name=name, layers=reports)
            else:
                weights, report = self._with_inputs(index, block, layers, float_stream, quantized_stream)
            if weights:
                self._store.write(f"block-{index:05d}", weights)
            self._source.finish(index, weights)
            del block, layers, weights
        trim_heap()
        wall_s, peak_mb = time.monotonic() - begin_s, tracker.result.cpu.peak_mb
        report = replace(report, wall_s=wall_s, peak_mb=peak_mb)
        self._report.blocks.append(report)
        self._report.memory.append((time.monotonic() - self._begin_s, get_cpu_memory()))
        self._progress.block(index, report)

    def _without_inputs(
        self, layers: Iterable[tuple[Layer, LayerSettings]]
    ) -> tuple[dict[str, QuantizedWeight], tuple[LayerReport, ...]]:
        weights: dict[str, QuantizedWeight] = {}
        reports: list[LayerReport] = []
        for layer, settings in layers:
            weight = self._source.read(layer, self._means.device)
            with layer.named_in_errors():
                weights[layer.name] = quantize_rtn(weight, settings, self._scale_dtype)
            reports.append(layer_report(layer.name, weight, weights[layer.name]))
        return weights, tuple(reports)

    def _outside(self) -> dict[str, QuantizedWeight]:
        """Round the layers outside the blocks that the configuration names, such as the head."""
        weights, reports = self._without_inputs(self._source.outside(self._config))
        if weights:
            self._store.write("outside", weights)
        self._report.outside.extend(reports)
        return weights

    def _with_inputs(
        self,
        index: int,
        block: nn.Module,
        layers: list[tuple[Layer, LayerSettings]],
        float_stream: Stream,
        quantized_stream: Stream,
    ) -> tuple[dict[str, QuantizedWeight], BlockReport]:
        name = self._source.block_names[index]

        def run(hidden: Tensor) -> Tensor:
            return self.call(index, block, hidden)

        statistics = self._statistics(layers, run, quantized_stream)
        # Where blocks are given float inputs there is one stream, and its inputs are needed until the end.
        apart = quantized_stream is not float_stream
        targets = float_stream if apart else Stream(*self._like(float_stream))
        self._pass(run, float_stream, targets, name)
        ranges = (
            {layer.name: statistics.largest(layer) for layer, _ in layers}
            if self._config.has_static_activations
            else None
        )
        self._ranges[index] = ranges or {}
        weights: dict[str, QuantizedWeight] = {}
        loss_before = best_step = None
        losses: tuple[float, ...] = ()
        with rounded_inputs(layers, self._config, ranges):
            if self._config.trains and layers:
                tuned = tune_block(
                    block,
                    layers,
                    lambda layer: self._source.rows(layer, self._means.device),
                    lambda samples: self._call(index, samples),
                    self._loss,
                    quantized_stream,
                    targets,
                    self._samples,
                    self._config,
                    micro_batch=self._means.micro_batch,
                    compiles=self._means.compiles,
                    seed=f"{self._config.seed}:{index}",
                    on_step=lambda step, loss: self._progress.step(index, step, loss),
                )
                weights, loss_before = tuned.weights, tuned.loss_before
                best_step, losses = tuned.best_step, tuned.losses
            else:
                weights, loss_before = self._rounded(layers, statistics, run, quantized_stream, targets)
            loss_after = self._pass(run, quantized_stream, quantized_stream if apart else None, name, targets)
        if not apart:
            for batch in self._batches():
                float_stream.write(batch, targets.read(batch))
            targets.close()
        reports = tuple(
            layer_report(layer.name, self._source.rows(layer, self._means.device), weights[layer.name])
            for layer, _ in layers
        )
        report = BlockReport(
            name=name,
            layers=reports,
            loss_before=loss_before if layers else None,
            loss_after=loss_after if layers else None,
            best_step=best_step,
            step_losses=losses,
        )
        return weights, report

    def _like(self, stream: Stream) -> tuple[int, tuple[int, ...], torch.dtype, Path | None]:
        return self._samples, stream.shape, stream.dtype, self._means.spill_folder

    def _statistics(
        self, layers: list[tuple[Layer, LayerSettings]], run: Callable[[Tensor], Tensor], stream: Stream
    ) -> InputStatistics:
        statistics = InputStatistics([layer for layer, _ in layers])
        if self._config.has_static_activations or self._config.quality == "optimized_rtn":
            with statistics.watching(), torch.no_grad():
                for batch in self._batches():
                    run(stream.read(batch).to(self._means.device))
        return statistics

    def _rounded(
        self,
        layers: list[tuple[Layer, LayerSettings]],
        statistics: InputStatistics,
        run: Callable[[Tensor], Tensor],
        inputs: Stream,
        targets: Stream,
    ) -> tuple[dict[str, QuantizedWeight], float]:
        """Round without training: to nearest, which gives the loss before, and then as the method says."""
        weights: dict[str, QuantizedWeight] = {}
        searches = self._config.quality == "optimized_rtn"
        loss = 0.0
        for searching in (False, True) if searches else (False,):
            for layer, settings in layers:
                weight = self._source.read(layer, self._means.device)
                with layer.named_in_errors():
                    if searching:
                        importance = statistics.importance(layer, weight.shape[1]).to(weight.device)
                        quantized = quantize_optimized_rtn(weight, settings, self._scale_dtype, importance)
                    else:
                        quantized = quantize_rtn(weight, settings, self._scale_dtype)
                weights[layer.name] = quantized
                with torch.no_grad(), layer.open(layer.weight.data) as matrix:
                    matrix.copy_(quantized.dequantize(matrix.dtype))
            if not searching:
                loss = self._pass(run, inputs, None, "", targets)
        return weights, loss

    def _pass(
        self,
        run: Callable[[Tensor], Tensor],
        inputs: Stream,
        outputs: Stream | None,
        name: str,
        targets: Stream | None = None,
    ) -> float:
        """Run the block on all samples; return the mean squared error to the targets, if there are any."""
        error, samples = 0.0, 0
        with torch.no_grad():
            for batch in self._batches():
                output = run(inputs.read(batch).to(self._means.device))
                if not all_finite(output):
                    raise QuantizationError(
                        f"{name} puts out NaN or infinity for samples {batch[0]} to {batch[-1]} of the "
                        "calibration; its weights are damaged, or its activations overflow."
                    )
                if targets is not None:
                    target = targets.read(batch).to(self._means.device)
                    error += float((output.float() - target).square().mean()) * len(batch)
                if outputs is not None:
                    outputs.write(batch, output)
                samples += len(batch)
        return error / max(1, samples)
