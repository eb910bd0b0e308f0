"""Tries candidates: builds each in a process of its own, proves it in another, and measures it there."""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np

from hamerspace.artifact import Manifest, manifest_from_dict, read_manifest
from hamerspace.backends.base import Candidate
from hamerspace.exceptions import BackendError, HamerspaceError, ModelError
from hamerspace.measure.comparison import metrics, one_round, side_by_side
from hamerspace.measure.data import Batch, cut
from hamerspace.measure.fidelity import Fidelity, compare, largest_difference
from hamerspace.measure.metrics import ModelMetrics
from hamerspace.measure.statistics import Ratio
from hamerspace.measure.worker import Worker
from hamerspace.models.info import Array, Feeds, ModelInfo
from hamerspace.models.source import ModelSource
from hamerspace.runtimes.base import RunOptions
from hamerspace.runtimes.callable import LoadedModel
from hamerspace.search.scoring import Scoring
from hamerspace.utils.logger import get_logger

_log = get_logger(__name__)
STEP_LIMIT_S: Final = 600.0
_PROBES = 16
_MOST_FIDELITY_SAMPLES = 256


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a worker may take, and how much is measured."""

    time_s: float | None = None
    """Of each step of a candidate; None is the candidate's own limit, or `STEP_LIMIT_S`."""
    memory_mb: float | None = None
    """Of a worker and its children; None is no limit."""
    rounds: int = 9
    """That the original and a candidate run in turn."""
    threads: int = 1

    def step_s(self, candidate: Candidate | None = None) -> float:
        """Seconds that a step may take."""
        own = None if candidate is None else candidate.time_limit_s
        return self.time_s or own or STEP_LIMIT_S


@dataclass(frozen=True, kw_only=True)
class Baseline:
    """The original, measured."""

    metrics: ModelMetrics
    outputs: list[dict[str, Array]]
    """On the inputs that fidelity is measured on."""
    outputs_of_probes: list[dict[str, Array]]


@dataclass(kw_only=True)
class Trial:
    """A candidate and what became of it."""

    candidate: Candidate
    folder: Path | None = None
    """Of the artifact; None where it failed or was let go."""
    manifest: Manifest | None = None
    failure: str | None = None
    """Why it is no result."""
    metrics: ModelMetrics | None = None
    original: ModelMetrics | None = None
    """The original, timed in turn with this one."""
    fidelity: Fidelity | None = None
    speedup: Ratio | None = None
    """In CPU time on a CPU, in wall time on a GPU."""
    wall_speedup: Ratio | None = None
    reload_difference: float | None = None
    """Between outputs before saving and after reloading, as a share of the largest magnitude."""
    notes: list[str] = field(default_factory=list[str])
    build_s: float = 0.0

    @property
    def proven(self) -> bool:
        """Whether it was saved, reloaded in a fresh process, and measured there."""
        return self.failure is None and self.metrics is not None


class Trials:
    """Tries candidates of one model. To be used in a ``with``, whose end ends all processes.

    Args:
        source: the model, with its shapes as they are to be.
        room: folder for everything; artifacts stay in it.
        limits: for workers.
        hardware: ``cpu`` or ``cuda``.
        data: the caller's samples, if there are any.
        calibration: batches for candidates that need them.
        scoring: how accuracy is found, if it can be.
        max_accuracy_drop: for backends that keep to it by themselves.
        seed: of inputs that are drawn.
        cache: for what outlives the run.
    """

    def __init__(
        self,
        source: ModelSource,
        room: Path,
        *,
        limits: Limits,
        hardware: str = "cpu",
        data: Sequence[Batch] | None = None,
        calibration: Sequence[Feeds] | None = None,
        scoring: Scoring | None = None,
        max_accuracy_drop: float | None = None,
        seed: int = 0,
        cache: Path | None = None,
    ) -> None:
        self._room = room
        self._limits = limits
        self._options = RunOptions(device=hardware, threads=limits.threads, allow_native=True)
        self._calibration, self._scoring = calibration, scoring
        self._max_accuracy_drop, self._seed, self._cache = max_accuracy_drop, seed, cache
        for name in ("source", "shared", "logs", "artifacts"):
            (room / name).mkdir()
        self._source = source.stage(room / "source")
        info = source.info
        self._size = next((spec.batch for spec in info.inputs if spec.batch is not None), 1)
        drawn = -(-_PROBES // self._size)
        self._probes: list[dict[str, Array]] = [info.draw(self._size, seed + place) for place in range(drawn)]
        if data:
            self._inputs = cut([one.feeds for one in data], info, limit=_MOST_FIDELITY_SAMPLES)
            self._probes = [dict(one) for one in self._inputs[: len(self._probes)]]
            self._basis = "samples of your data"
        else:
            self._inputs, self._basis = self._probes, "random inputs"
        self._axes = {spec.name: spec.batch_axis for spec in info.outputs}
        # A model that takes any number of samples is timed on as many as its metrics say.
        free = {spec.name for spec in info.inputs if spec.shape and spec.batch is None}
        self._feeds = {
            name: array[: self._size] if name in free else array for name, array in self._probes[0].items()
        }
        self._original: Worker | None = None
        self._like: LoadedModel | None = None
        self.baseline: Baseline | None = None

    def __enter__(self) -> Trials:
        return self

    def __exit__(self, *_: object) -> None:
        if self._original is not None:
            self._original.close()

    @property
    def _info(self) -> ModelInfo:
        return self._source.info

    def measure_original(self) -> Baseline:
        """Open and measure the original, which stays open beside the candidates.

        Raises:
            ModelError: it gives NaN.
            WorkerError: it cannot be opened in a fresh process, or fails.
        """
        self._original = self._worker("original", self._limits.step_s())
        self._original.call("open_original", self._source, self._options)
        self._like = self._stand_in(self._info)
        outputs = self._original.call("run", self._inputs)
        for found in outputs:
            for name, array in found.items():
                if array.dtype.kind == "f" and np.isnan(array).any():
                    raise ModelError(
                        f"the model gives NaN in {name!r} on {self._basis}; nothing can be compared with that"
                    )
        calls = self._original.call("prepare", self._feeds)
        rounds = [one_round(self._original, calls) for _ in range(self._limits.rounds)]
        memory_mb = self._original.call("peak_mb")
        accuracy = None
        if self._scoring is not None:
            accuracy = self._scoring.of(self._original, self._like)
        self.baseline = Baseline(
            metrics=metrics(
                rounds,
                size_bytes=self._info.size_bytes,
                batch_size=self._size,
                hardware=self._options.device,
                accuracy=accuracy,
                memory_mb=memory_mb,
            ),
            outputs=outputs,
            outputs_of_probes=outputs[: len(self._probes)],
        )
        return self.baseline

    def attempt(self, candidate: Candidate, number: int) -> Trial:
        """Build, prove and measure a candidate; a failure of any kind is told in the trial."""
        if self.baseline is None:
            self.measure_original()
        trial = Trial(candidate=candidate)
        folder = self._room / "artifacts" / f"{number:02d}-{candidate.backend}-{candidate.technique}"
        try:
            self._attempt(trial, folder)
        except (HamerspaceError, ValueError, OSError) as error:
            kind = getattr(error, "kind", "")
            trial.failure = f"{kind}: {error}" if kind else str(error)
            _log.info("%s failed: %s", candidate.name, trial.failure)
            _log.debug("%s", getattr(error, "trace", ""))
            shutil.rmtree(folder, ignore_errors=True)
            trial.folder = None
        return trial

    def _attempt(self, trial: Trial, folder: Path) -> None:
        candidate = trial.candidate
        folder.mkdir()
        start = time.monotonic()
        limit_s = self._limits.step_s(candidate)
        context: dict[str, Any] = {
            "source": self._source,
            "candidate": candidate,
            "folder": folder,
            "shared": self._room / "shared",
            "calibration": self._calibration if candidate.needs_calibration else None,
            "threads": self._limits.threads,
            "device": self._options.device,
            "max_accuracy_drop": self._max_accuracy_drop,
            "cache": self._cache,
            "seed": self._seed,
            "time_limit_s": limit_s,
        }
        score = None
        if self._scoring is not None and self._scoring.portable:
            score = (self._scoring.function, self._scoring.kind)
        with self._worker(folder.name + "-build", limit_s) as worker:
            described, before, notes = worker.call("build", candidate.backend, context, self._probes, score)
        trial.build_s = time.monotonic() - start
        trial.notes += notes
        manifest_from_dict(described, candidate.name)
        manifest = read_manifest(folder)
        with self._worker(folder.name, self._limits.step_s()) as worker:
            worker.call("open_artifact", str(folder), self._options, self._info)
            self._prove(trial, worker, before)
            self._measure(trial, worker, manifest)
        trial.folder, trial.manifest = folder, manifest

    def _prove(self, trial: Trial, worker: Worker, before: list[dict[str, Array]] | None) -> None:
        """Check that what was reloaded gives what was built, and compare it with the original."""
        baseline = self.baseline
        if baseline is None:
            raise BackendError("the original was not measured")
        reloaded = worker.call("run", self._probes)
        if before is not None:
            worst = max(largest_difference(a, b) for a, b in zip(before, reloaded, strict=True))
            trial.reload_difference = worst
            if worst > trial.candidate.tolerance:
                raise BackendError(
                    f"the reloaded model differs from what was saved by {worst:.2g} of its largest output; "
                    f"{trial.candidate.tolerance:.2g} is allowed"
                )
        outputs = reloaded if self._inputs is self._probes else worker.call("run", self._inputs)
        try:
            trial.fidelity = compare(baseline.outputs, outputs, self._basis, self._axes)
        except ValueError as error:
            raise BackendError(str(error)) from error

    def _measure(self, trial: Trial, worker: Worker, manifest: Manifest) -> None:
        if self._original is None or self._like is None:
            raise BackendError("the original was not measured")
        found = side_by_side(self._original, worker, self._feeds, self._limits.rounds)
        memory_mb = worker.call("peak_mb")
        accuracy = None if self._scoring is None else self._scoring.of(worker, self._like)
        common: dict[str, Any] = {"batch_size": self._size, "hardware": self._options.device}
        trial.metrics = metrics(
            found.other, size_bytes=manifest.size_bytes, accuracy=accuracy, memory_mb=memory_mb, **common
        )
        trial.original = metrics(
            found.original, size_bytes=self._info.size_bytes, accuracy=None, memory_mb=None, **common
        )
        trial.speedup = found.speedup(self._options.device)
        trial.wall_speedup = found.wall_speedup()

    def _worker(self, name: str, time_limit_s: float) -> Worker:
        return Worker(
            self._room / "logs" / f"{name}.txt",
            threads=self._limits.threads,
            device=self._options.device,
            time_limit_s=time_limit_s,
            memory_limit_mb=self._limits.memory_mb,
        )

    @staticmethod
    def _stand_in(info: ModelInfo) -> LoadedModel:
        return LoadedModel(dict, info.inputs, info.outputs, info.structure)
