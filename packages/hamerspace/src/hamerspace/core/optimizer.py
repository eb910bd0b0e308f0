"""`Optimizer`: from a model to the best of its proven forms."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from hamerspace._checks import above_0, number, positive_integer
from hamerspace._imports import version
from hamerspace._rooms import Room
from hamerspace.backends.base import Candidate
from hamerspace.backends.registry import Backend, backend_names, get_backend, offers
from hamerspace.core.config import OptimizationConfig, hash_of
from hamerspace.core.constraints import MIN_COSINE, Constraints
from hamerspace.core.goals import OptimizationGoal, goal_of
from hamerspace.core.report import CandidateReport, CompressionReport
from hamerspace.core.result import OptimizationResult
from hamerspace.exceptions import BackendError, ConstraintError, ModelError, UnsupportedError
from hamerspace.measure.benchmarker import Benchmarker, batched, hardware_of, reshaped
from hamerspace.measure.data import Batch, cut, read_batches
from hamerspace.measure.metrics import ModelMetrics
from hamerspace.models.info import ModelInfo
from hamerspace.models.reading import read_as
from hamerspace.models.source import ModelSource
from hamerspace.search.progress import Progress
from hamerspace.search.scoring import Scoring, scoring_of
from hamerspace.search.selection import choose, rank, verdicts
from hamerspace.search.trials import STEP_LIMIT_S, Limits, Trial, Trials

_GOALS: Final = {
    OptimizationGoal.QUANTIZE: ("quantize",),
    OptimizationGoal.PRUNE: ("prune",),
    OptimizationGoal.AUTO: ("quantize", "graph"),
}


@dataclass(frozen=True, kw_only=True)
class _Plan:
    """What is tried, and what is not and why."""

    candidates: list[Candidate]
    skipped: list[CandidateReport]


class Optimizer:
    """Optimises one model.

    Args:
        model: a module of torch, TorchScript, an exported program, a Keras model, or a path.
        model_info: what the model takes and gives; the class methods find it out.
        input_shape: shapes in place of those of ``model_info``; None is an axis of any length.

    Raises:
        ConstraintError: ``input_shape`` does not fit.
    """

    def __init__(self, model: Any, model_info: ModelInfo, input_shape: Any = None) -> None:
        info = reshaped(model_info, input_shape)
        found = ModelSource.of(model, info)
        self._source = replace(found, info=info)
        self._config: OptimizationConfig | None = None

    @classmethod
    def _of(cls, source: ModelSource) -> Optimizer:
        made = cls.__new__(cls)
        made._source, made._config = source, None
        return made

    @property
    def model(self) -> Any:
        """The live model, or the path of one that is read where it is needed."""
        return self._source.model if self._source.model is not None else self._source.path

    @property
    def model_info(self) -> ModelInfo:
        """What the model takes and gives."""
        return self._source.info

    def __repr__(self) -> str:
        info = self.model_info
        return (
            f"Optimizer({info.name}, {info.framework}, {info.parameters:,} parameters, {info.size_mb:.2f} MB)"
        )

    @classmethod
    def from_pytorch(
        cls,
        model_path: Any,
        input_shape: Any = None,
        *,
        example_inputs: Any = None,
        model: Any = None,
        allow_pickle: bool = False,
    ) -> Optimizer:
        """Take a model of PyTorch.

        Args:
            model_path: a module, TorchScript, an exported program, or a file of one; a state dict or a file
                of one, with ``model``; or a folder of transformers.
            input_shape: ``[batch, channels, height, width]`` or the like; a list of shapes or shapes by
                name for several inputs; None is an axis of any length. May be left out where the model tells.
                The first axis is that of samples, along which inputs may be cut up and filled up.
            example_inputs: a tensor, a tuple of them, or tensors by name, in place of shapes; they tell
                dtypes.
            model: the module that a state dict is for.
            allow_pickle: read a file that holds a pickled module. That can execute anything; only for files
                of people whom you trust.

        Raises:
            ModelNotFoundError: there is no such file.
            ModelError: it is no model, is damaged, or does not take such inputs.
            UnsafeModelError: the file holds a pickled module.
            ConstraintError: ``input_shape`` is no shape.
        """
        from hamerspace.models import pytorch

        return cls._of(
            pytorch.read(
                model_path,
                input_shape=input_shape,
                example_inputs=example_inputs,
                into=model,
                allow_pickle=allow_pickle,
            )
        )

    @classmethod
    def from_tensorflow(
        cls, model_path: Any, input_shape: Any = None, *, example_inputs: Any = None
    ) -> Optimizer:
        """Take a model of TensorFlow: a Keras model, a ``.keras`` or ``.h5`` file, or a SavedModel's folder.

        Raises:
            ModelNotFoundError: there is no such file.
            ModelError: it is no model, or is damaged.
            UnsafeModelError: the file holds code.
        """
        from hamerspace.models import tensorflow

        return cls._of(tensorflow.read(model_path, input_shape=input_shape, example_inputs=example_inputs))

    @classmethod
    def from_onnx(cls, model_path: str | Path, input_shape: Any = None) -> Optimizer:
        """Take an ONNX file. ``input_shape`` fixes axes of any length.

        Raises:
            ModelNotFoundError: there is no such file.
            ModelError: it is no ONNX model, or is damaged.
        """
        from hamerspace.models import onnx

        return cls._of(onnx.read(model_path, input_shape=input_shape))

    @classmethod
    def from_config(cls, path: str | Path, model: Any = None, *, allow_pickle: bool = False) -> Optimizer:
        """Take a saved optimisation, which `apply` repeats.

        Args:
            path: what `OptimizationResult.save_config` wrote.
            model: the model, where it came from memory or lies elsewhere now; the module, where the
                file holds a state dict.
            allow_pickle: see `from_pytorch`.

        Raises:
            ModelNotFoundError: the configuration or its model is not there.
            ModelError: the model is not the one that the configuration is of.
            UnsafeModelError: the model's file holds a pickled module.
        """
        config = OptimizationConfig.load(path)
        known = config.model
        options: dict[str, Any] = {"allow_pickle": allow_pickle} if known.framework == "pytorch" else {}
        if model is None and known.path is None:
            raise ModelError(f"{path} is of a model that came from memory; give it as model=")
        if model is None and known.needs_module:
            raise ModelError(f"{known.path} holds weights alone; give the module that they are for as model=")
        given = known.path if model is None else model
        if known.needs_module and not isinstance(model, (str, Path)):
            given, options["into"] = known.path, model
        source = read_as(given, known, **options)
        found = source.info
        if None not in (config.model_hash, found.path) and hash_of(found.path) != config.model_hash:
            raise ModelError(
                f"{found.path} is not the model that {path} was saved with, or has changed since"
            )
        if found.parameters != known.parameters:
            raise ModelError(
                f"the model has {found.parameters:,} parameters, and {path} is of one with "
                f"{known.parameters:,}"
            )
        made = cls._of(source)
        made._config = config
        return made

    def optimize(
        self,
        goal: OptimizationGoal | str,
        constraints: Constraints | None = None,
        validation_data: Any = None,
        validation_fn: Callable[[Any], float] | None = None,
        preferred_backends: Sequence[Backend | str] | Backend | str | None = None,
        *,
        techniques: Sequence[str] | None = None,
        time_limit_s: float | None = None,
        memory_limit_mb: float | None = None,
        rounds: int = 9,
        threads: int = 1,
        min_cosine: float = MIN_COSINE,
        seed: int = 0,
        form: str | None = None,
        progress: bool | None = None,
    ) -> OptimizationResult:
        """Find the best form of the model.

        Every candidate is built in a process of its own, saved, opened in a fresh process, compared with the
        original there, and timed in turn with it. One that crashes, hangs, takes too much memory, does not
        reload or gives NaN is a failed candidate, and the report says why.

        Chosen is what violates the fewest constraints; then what leaves the fewest undecided; then what is
        faithful; then the fastest; then the smallest.

        Args:
            goal: ``quantize`` and ``prune`` try such candidates, ``auto`` quantised ones and graph
                optimisations.
            constraints: limits, and how it is measured.
            validation_data: inputs, with or without labels, as an array, arrays by name, ``(inputs,
                labels)``, or an iterable of batches such as a DataLoader. The first
                ``constraints.calibration_samples`` serve for calibration. Without it, only candidates that
                need none are tried, and fidelity is measured on random inputs.
            validation_fn: takes a model and returns its accuracy. The model is a callable that takes and
                gives tensors of the original's framework, whatever runs it. A function that cannot be
                pickled runs in this process, others beside the model.
            preferred_backends: only these are tried. Those that take minutes (TVM) are tried only if named.
            techniques: only these are tried, as ``int8-static``; each has to be one of a backend's.
            time_limit_s: for each step of a candidate; 600 by default, and more for those that take minutes.
            memory_limit_mb: for the process of a candidate, in MB of 2**20 bytes.
            rounds: that the original and a candidate run in turn, 5 at the least.
            threads: of each runtime.
            min_cosine: what counts as faithful where accuracy is not limited or cannot be measured.
            seed: of inputs that are drawn.
            form: ending under which the result is to be saved, as ``.onnx``; only what can be is tried. Each
                can be a folder or ``.pt``.
            progress: show it; by default where standard error is a terminal.

        Raises:
            ConstraintError: an argument is out of range, or two contradict each other.
            ModelInputError: the data does not fit the model.
            UnsupportedError: no backend can do this to this model.
            BackendUnavailableError: a backend that was named is not installed.
            BackendError: every candidate failed; the message has each one's reason.
        """
        start = time.monotonic()
        wanted = goal_of(goal)
        limits = constraints or Constraints()
        if not isinstance(limits, Constraints):
            raise ConstraintError(f"constraints is {type(limits).__name__}; hamerspace.Constraints is wanted")
        if wanted is OptimizationGoal.DISTILL:
            raise UnsupportedError(
                "distillation is not there yet; train a smaller model on this one's outputs"
            )
        rounds = positive_integer("rounds", rounds)
        if rounds < 5:
            raise ConstraintError(f"rounds is {rounds}; a median wants 5 at the least")
        worker_limits = Limits(
            time_s=above_0("time_limit_s", time_limit_s),
            memory_mb=above_0("memory_limit_mb", memory_limit_mb),
            rounds=rounds,
            threads=positive_integer("threads", threads),
        )
        min_cosine = number("min_cosine", min_cosine, lambda n: -1 <= n <= 1, "it lies between -1 and 1")
        seed = int(
            number("seed", seed, lambda n: 0 <= n < 2**63 and n % 1 == 0, "it is an integer, 0 or above")
        )
        preferred = _named(preferred_backends)
        if form is not None and not (isinstance(form, str) and Path("model" + form).suffix == form):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise ConstraintError(f"form is {form!r}; it is an ending, such as .onnx")
        if validation_fn is not None and not callable(validation_fn):
            raise ConstraintError(f"validation_fn is {validation_fn!r}; a function of a model is wanted")
        info = batched(self.model_info, limits.batch_size)
        source = replace(self._source, info=info)
        hardware = hardware_of(limits.target_hardware)
        data, calibration = _data(validation_data, info, limits)
        plan = _plan(info, wanted, preferred, techniques, hardware, calibration is not None, form)
        return self._run(
            source,
            plan,
            goal=wanted,
            constraints=limits,
            data=data,
            calibration=calibration,
            scoring=scoring_of(info.framework, validation_fn, data),
            worker_limits=worker_limits,
            min_cosine=min_cosine,
            preferred=preferred,
            seed=seed,
            progress=progress,
            start=start,
        )

    def apply(
        self,
        validation_data: Any = None,
        validation_fn: Callable[[Any], float] | None = None,
        *,
        time_limit_s: float | None = None,
        progress: bool | None = None,
    ) -> OptimizationResult:
        """Repeat the optimisation of `from_config`: the one recipe that was chosen, measured anew.

        Args:
            validation_data: needed if the recipe was calibrated; see `optimize`.
            validation_fn: see `optimize`.
            time_limit_s: for each step, in place of what was saved.
            progress: see `optimize`.

        Raises:
            ConstraintError: this optimizer was not made by `from_config`, or data is missing.
            BackendError: the recipe fails now.
        """
        start = time.monotonic()
        config = self._config
        if config is None or config.backend is None or config.technique is None:
            raise ConstraintError(
                "apply() repeats a saved optimisation; make the optimizer by from_config(path)"
            )
        if config.calibrated and validation_data is None:
            raise ConstraintError(f"{config.backend}/{config.technique} was calibrated; give validation_data")
        backend = get_backend(config.backend)
        backend.require()
        info = self.model_info
        hardware = hardware_of(config.constraints.target_hardware)
        offered = backend.candidates(info, hardware=hardware)
        chosen = next((one for one in offered if one.technique == config.technique), None)
        if chosen is None:
            raise UnsupportedError(
                f"backend {config.backend} has no {config.technique!r} for this model any more"
            )
        chosen = chosen.with_options(config.options)
        data, calibration = _data(validation_data, info, config.constraints)
        return self._run(
            self._source,
            _Plan(candidates=[chosen], skipped=[]),
            goal=config.goal,
            constraints=config.constraints,
            data=data,
            calibration=calibration,
            scoring=scoring_of(info.framework, validation_fn, data),
            worker_limits=Limits(
                time_s=above_0("time_limit_s", time_limit_s) or config.time_limit_s,
                memory_mb=config.memory_limit_mb,
                rounds=config.rounds,
                threads=config.threads,
            ),
            min_cosine=config.min_cosine,
            preferred=config.preferred_backends,
            seed=config.seed,
            progress=progress,
            start=start,
        )

    def benchmark(
        self, hardware: str = "cpu", num_runs: int = 100, batch_size: int = 1, *, threads: int = 1
    ) -> ModelMetrics:
        """Measure the model as it is, in a fresh process; see `Benchmarker.benchmark_model`."""
        info = batched(self.model_info, batch_size)
        return Benchmarker(threads=threads).benchmark_model(
            replace(self._source, info=info), info, hardware, None, batch_size, num_runs
        )

    def _run(
        self,
        source: ModelSource,
        plan: _Plan,
        *,
        goal: OptimizationGoal,
        constraints: Constraints,
        data: list[Batch] | None,
        calibration: Any,
        scoring: Scoring | None,
        worker_limits: Limits,
        min_cosine: float,
        preferred: tuple[str, ...],
        seed: int,
        progress: bool | None,
        start: float,
    ) -> OptimizationResult:
        room = Room()
        tried: list[Trial] = []
        kept: Trial | None = None
        trials = Trials(
            source,
            room.path,
            limits=worker_limits,
            hardware=hardware_of(constraints.target_hardware),
            data=data,
            calibration=calibration,
            scoring=scoring,
            max_accuracy_drop=constraints.max_accuracy_drop,
            seed=seed,
        )
        with trials, Progress(len(plan.candidates) + 1, shown=progress) as shown:
            shown.begin("the original")
            baseline = trials.measure_original()
            shown.end(f"original: {baseline.metrics.latency_ms:.3g} ms, {baseline.metrics.size_mb:.2f} MB")
            for number, candidate in enumerate(plan.candidates):
                shown.begin(candidate.name)
                trial = trials.attempt(candidate, number)
                tried.append(trial)
                shown.end(_told(trial))
                best = choose(tried, constraints, baseline.metrics, min_cosine)
                for one in (kept, trial):
                    if one is not None and one is not best:
                        _let_go(one)
                kept = best
        if kept is None or kept.manifest is None or kept.folder is None or kept.metrics is None:
            reasons = "; ".join(f"{one.candidate.name}: {one.failure}" for one in tried)
            raise BackendError(f"no candidate came through. {reasons}")
        ordered = sorted(tried, key=lambda one: rank(one, constraints, baseline.metrics, min_cosine))
        config = OptimizationConfig(
            goal=goal,
            constraints=constraints,
            model=source.info,
            model_hash=hash_of(source.info.path),
            backend=kept.candidate.backend,
            technique=kept.candidate.technique,
            options=dict(kept.candidate.options),
            preferred_backends=preferred,
            calibrated=kept.candidate.needs_calibration,
            threads=worker_limits.threads,
            rounds=worker_limits.rounds,
            time_limit_s=worker_limits.time_s,
            memory_limit_mb=worker_limits.memory_mb,
            min_cosine=min_cosine,
            seed=seed,
            versions={"hamerspace": version("hamerspace") or "", **kept.manifest.versions},
        )
        original = kept.original or baseline.metrics
        original = replace(original, accuracy=baseline.metrics.accuracy, memory_mb=baseline.metrics.memory_mb)
        reports = [
            *(
                CandidateReport.of(one, "chosen" if one is kept else "proven")
                for one in ordered
                if one.proven
            ),
            *(CandidateReport.of(one, "failed") for one in tried if not one.proven),
            *plan.skipped,
        ]
        report = CompressionReport(
            original_metrics=original,
            optimized_metrics=kept.metrics,
            optimization_config=config,
            backend_used=kept.candidate.backend,
            technique_used=kept.candidate.technique,
            execution_time_seconds=time.monotonic() - start,
            verdicts=tuple(verdicts(constraints, original, kept.metrics)),
            fidelity=kept.fidelity,
            speedup=kept.speedup,
            accuracy_basis=scoring.basis if scoring else None,
            candidates=tuple(reports),
            notes=(*_notes(kept, min_cosine, constraints), *kept.notes),
            environment={
                "cores": os.cpu_count(),
                "load_average": os.getloadavg(),
                "threads": worker_limits.threads,
            },
        )
        return OptimizationResult(kept.folder, kept.manifest, report, config, room)


def _named(preferred: Sequence[Backend | str] | Backend | str | None) -> tuple[str, ...]:
    if preferred is None:
        return ()
    given = [preferred] if isinstance(preferred, str) else list(preferred)
    names = [one.value if isinstance(one, Backend) else str(one).lower() for one in given]
    if unknown := [name for name in names if name not in backend_names()]:
        raise ConstraintError(f"backends {unknown} are not known; there are {', '.join(backend_names())}")
    return tuple(dict.fromkeys(names))


def _data(
    validation_data: Any, info: ModelInfo, constraints: Constraints
) -> tuple[list[Batch] | None, list[dict[str, Any]] | None]:
    if validation_data is None:
        return None, None
    data = read_batches(validation_data, info)
    limit = constraints.calibration_samples
    return data, cut([one.feeds for one in _first(data, limit)], info, limit=limit)


def _first(data: list[Batch], samples: int) -> list[Batch]:
    taken: list[Batch] = []
    for batch in data:
        left = samples - sum(one.samples for one in taken)
        if left <= 0:
            break
        feeds = {name: array[:left] if array.ndim else array for name, array in batch.feeds.items()}
        taken.append(Batch(feeds=feeds))
    return taken


def _plan(
    info: ModelInfo,
    goal: OptimizationGoal,
    preferred: tuple[str, ...],
    techniques: Sequence[str] | None,
    hardware: str,
    calibrated: bool,
    form: str | None,
) -> _Plan:
    candidates: list[Candidate] = []
    skipped: list[CandidateReport] = []
    known: set[str] = set()

    def skip(backend: str, technique: str, reason: str) -> None:
        skipped.append(
            CandidateReport(backend=backend, technique=technique, outcome="skipped", reason=reason)
        )

    techniques = [techniques] if isinstance(techniques, str) else techniques
    for name in preferred or backend_names():
        if preferred:
            get_backend(name).require()
        offered, reason = offers(name, info, hardware)
        if reason:
            skip(name, "*", reason)
        known |= {one.technique for one in offered}
        for one in offered:
            if one.goal not in _GOALS[goal] or (techniques is not None and one.technique not in techniques):
                continue
            if form is not None and form not in (".pt", *one.forms):
                skip(name, one.technique, f"cannot be saved as {form}")
            elif one.needs_calibration and not calibrated:
                skip(name, one.technique, "needs calibration data; give validation_data")
            elif (one.time_limit_s or 0) > STEP_LIMIT_S and not preferred:
                skip(
                    name, one.technique, f"takes minutes; name {name} in preferred_backends to have it tried"
                )
            else:
                candidates.append(one)
    if unknown := [one for one in techniques or () if one not in known]:
        there = ", ".join(sorted(known)) or "none"
        raise ConstraintError(f"techniques {unknown} are not known for this model; there are {there}")
    if not candidates:
        reasons = "; ".join(f"{one.name}: {one.reason}" for one in skipped) or "no backend offers it"
        named = f" by {', '.join(techniques)}" if techniques else ""
        raise UnsupportedError(f"nothing can {goal.value} this model{named}. {reasons}")
    candidates.sort(key=lambda one: -one.expected_speed)
    return _Plan(candidates=candidates, skipped=skipped)


def _let_go(trial: Trial) -> None:
    """Delete an artifact that is not to be the result."""
    if trial.folder is not None:
        shutil.rmtree(trial.folder, ignore_errors=True)
        trial.folder = None


def _told(trial: Trial) -> str:
    if trial.failure is not None or trial.metrics is None or trial.speedup is None:
        return f"{trial.candidate.name}: failed, {trial.failure}"
    cosine = f", cosine {trial.fidelity.cosine:.4f}" if trial.fidelity else ""
    return f"{trial.candidate.name}: {trial.speedup.median:.2f}x, {trial.metrics.size_mb:.2f} MB{cosine}"


def _notes(trial: Trial, min_cosine: float, constraints: Constraints) -> list[str]:
    notes: list[str] = []
    if trial.fidelity is not None and trial.fidelity.cosine < min_cosine:
        notes.append(
            f"the result's outputs are far from the original's (cosine {trial.fidelity.cosine:.3f}, "
            f"{min_cosine:g} wanted): no candidate that meets as many constraints is nearer"
        )
    if trial.candidate.goal == "prune" and trial.metrics is not None:
        notes.append("pruned weights are zeros that are still stored: such a model is no faster by itself")
    if constraints.target_hardware in ("edge", "arm"):
        notes.append(f"measured on this machine, not on a device of the kind {constraints.target_hardware!r}")
    return notes
