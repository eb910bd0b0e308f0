"""`Benchmarker`: size, latency, throughput and memory of one model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from hamerspace._checks import above_0, positive_integer
from hamerspace._rooms import Room
from hamerspace.exceptions import ConstraintError
from hamerspace.loading import find, is_saved
from hamerspace.measure.comparison import metrics, one_round
from hamerspace.measure.metrics import ModelMetrics
from hamerspace.measure.statistics import Round
from hamerspace.measure.worker import Worker
from hamerspace.models.info import ModelInfo, fitted, shapes_of
from hamerspace.models.source import ModelSource
from hamerspace.runtimes.base import RunOptions

HARDWARE = {"cpu": "cpu", "gpu": "cuda", "cuda": "cuda", "edge": "cpu", "arm": "cpu"}
"""What is measured on for a target; ``edge`` and ``arm`` are measured on this machine's processor."""


def hardware_of(target: str) -> str:
    """Say what is measured on: ``cpu`` or ``cuda``.

    Raises:
        ConstraintError: the target is not known.
    """
    found = HARDWARE.get(str(target).lower())
    if found is None:
        raise ConstraintError(f"target_hardware is {target!r}; it may be {', '.join(HARDWARE)}")
    return found


class Benchmarker:
    """Measures models, each in a fresh process.

    Args:
        threads: of the model's runtime; 1 makes CPU time comparable from run to run.
        time_limit_s: for each step.
        memory_limit_mb: of the process.
        allow_native: see `hamerspace.load`.

    Raises:
        ConstraintError: an argument is out of range.
    """

    def __init__(
        self,
        *,
        threads: int = 1,
        time_limit_s: float | None = 600.0,
        memory_limit_mb: float | None = None,
        allow_native: bool = False,
    ) -> None:
        self.threads = positive_integer("threads", threads)
        self.allow_native = allow_native
        self.time_limit_s = above_0("time_limit_s", time_limit_s)
        self.memory_limit_mb = above_0("memory_limit_mb", memory_limit_mb)

    def benchmark_model(
        self,
        model: Any,
        model_info: ModelInfo | None = None,
        target_hardware: str = "cpu",
        input_shape: Any = None,
        batch_size: int = 1,
        num_runs: int = 100,
    ) -> ModelMetrics:
        """Measure a model on random inputs.

        Args:
            model: a model of torch or Keras, a path to a model of any framework, or what hamerspace saved.
            model_info: what `Optimizer` found out; may be left out for a path, and for a module of torch with
                ``input_shape``.
            target_hardware: ``cpu``, ``gpu`` (the same as ``cuda``), ``edge`` or ``arm``; the last two are
                measured on this machine's processor.
            input_shape: in place of the model's own; see `Optimizer.from_pytorch`.
            batch_size: samples a call, where the model takes any number or its shape says so.
            num_runs: calls that are timed, at the least.

        Raises:
            ConstraintError: an argument is out of range.
            ModelError, ModelNotFoundError: it is no model.
            WorkerError: the model fails, crashes, or takes too long.
        """
        batch_size = positive_integer("batch_size", batch_size)
        num_runs = positive_integer("num_runs", num_runs)
        hardware = hardware_of(target_hardware)
        options = RunOptions(device=hardware, threads=self.threads, allow_native=self.allow_native)
        with Room() as folder, self._worker(folder, hardware) as worker:
            saved = Path(model) if isinstance(model, (str, Path)) else None
            if saved is not None and is_saved(saved):
                manifest = find(saved).manifest
                # Whatever it was made from, its shapes are its own now.
                info = ModelInfo(framework="onnx", name=saved.name, inputs=manifest.inputs)
                info = batched(reshaped(info, input_shape), batch_size)
                worker.call("open_artifact", str(saved), options, info)
                size_bytes = manifest.size_bytes
            else:
                source = self._source(model, model_info, input_shape)
                info = batched(reshaped(source.info, input_shape), batch_size)
                info = info.with_batch(batch_size)
                source = replace(source, info=info).stage(folder)
                worker.call("open_original", source, options)
                size_bytes = info.size_bytes
            feeds = info.draw(batch_size)
            calls = worker.call("prepare", feeds)
            rounds: list[Round] = []
            while len(rounds) < 5 or sum(len(one.wall_s) for one in rounds) < num_runs:
                rounds.append(one_round(worker, min(calls, max(1, num_runs // 5))))
            return metrics(
                rounds,
                size_bytes=size_bytes,
                batch_size=next((len(array) for array in feeds.values() if array.ndim), 1),
                hardware=hardware,
                accuracy=None,
                memory_mb=worker.call("peak_mb"),
            )

    def benchmark_batches(
        self,
        model: Any,
        model_info: ModelInfo | None = None,
        target_hardware: str = "cpu",
        input_shape: Any = None,
        batch_sizes: Sequence[int] = (1, 8, 32),
        num_runs: int = 100,
    ) -> list[ModelMetrics]:
        """Measure a model at several numbers of samples a call, which shows what batches gain in throughput.

        Arguments and exceptions are those of `benchmark_model`.
        """
        return [
            self.benchmark_model(model, model_info, target_hardware, input_shape, size, num_runs)
            for size in batch_sizes
        ]

    def _worker(self, folder: Path, hardware: str) -> Worker:
        return Worker(
            folder / "log.txt",
            threads=self.threads,
            device=hardware,
            time_limit_s=self.time_limit_s,
            memory_limit_mb=self.memory_limit_mb,
        )

    def _source(self, model: Any, info: ModelInfo | None, input_shape: Any) -> ModelSource:
        if info is None and not isinstance(model, (str, Path, ModelSource)):
            from hamerspace.models import pytorch

            return pytorch.read(model, input_shape=input_shape)
        return ModelSource.of(model, info, input_shape)


def reshaped(info: ModelInfo, input_shape: Any) -> ModelInfo:
    """Return the model with shapes given anew, if they are.

    A module's shapes are those that it was last tried with, and any others may do; other models have their
    own.

    Raises:
        ConstraintError: there are more or fewer shapes than inputs, or one does not fit.
    """
    if info.framework != "pytorch" or info.form == "exported":
        return replace(info, inputs=fitted(info.inputs, input_shape))
    shapes = shapes_of(input_shape, [spec.name for spec in info.inputs])
    if shapes is None:
        return info
    if len(shapes) != len(info.inputs):
        raise ConstraintError(
            f"input_shape has {len(shapes)} shapes, and the model takes {[one.name for one in info.inputs]}"
        )
    inputs = tuple(replace(spec, shape=shape) for spec, shape in zip(info.inputs, shapes, strict=True))
    return replace(info, inputs=inputs)


def batched(info: ModelInfo, batch_size: int) -> ModelInfo:
    """Give a model a number of samples a call, where it is not the model's own to say.

    Raises:
        ConstraintError: the model takes another number.
    """
    if batch_size == 1:
        return info
    fixed = {spec.batch for spec in info.inputs if spec.batch is not None}
    if fixed <= {batch_size}:
        return info.with_batch(batch_size)
    if info.framework == "pytorch" and info.form != "exported" and fixed == {1}:
        return replace(info, inputs=tuple(spec.with_batch(batch_size) for spec in info.inputs))
    raise ConstraintError(
        f"batch_size is {batch_size}, and the model takes {sorted(fixed)} samples a call; leave it at that, "
        "or give the model an axis of any length there"
    )
