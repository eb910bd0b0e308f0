"""What a backend is: it offers candidates for a model, and builds and opens what a candidate describes.

Everything that is the same for all backends is done elsewhere: worker processes, measuring, checks that a
saved model reloads, comparison with the original, reports.
"""

from __future__ import annotations

import shutil
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

from hamerspace._checks import number
from hamerspace._imports import PACKAGES, has, version
from hamerspace._rooms import Room
from hamerspace._trust import NATIVE, seal_of
from hamerspace.artifact import MANIFEST, Manifest, list_files, read_manifest, write_json
from hamerspace.exceptions import (
    ArtifactError,
    BackendUnavailableError,
    ConstraintError,
    UnsupportedError,
)
from hamerspace.models.info import Array, Feeds, ModelInfo, TensorSpec, spec_of
from hamerspace.models.source import ModelSource
from hamerspace.runtimes.base import Runner, RunOptions
from hamerspace.saving import check_free, save_artifact, save_folder

Goal = Literal["quantize", "prune", "graph"]


@dataclass(frozen=True)
class Verdict:
    """Yes or no, with the reason; as a condition it is the yes or no."""

    yes: bool
    reason: str

    def __bool__(self) -> bool:
        return self.yes


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A recipe that turns a model into an artifact."""

    backend: str
    technique: str
    """Such as ``int8-static``; unique within the backend."""
    goal: Goal
    description: str
    """A sentence for people."""
    forms: tuple[str, ...] = ()
    """Endings under which the artifact can stand alone, beside a folder and ``.pt``."""
    needs_calibration: bool = False
    bits: int | None = None
    """Of the stored weights, where they are fewer than 32."""
    expected_speed: float = 1.0
    """A guess of how many times faster than the original it is, which only orders the work."""
    options: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """Plain data that `BaseBackend.build` reads: each option with its default."""
    tolerance: float = 1e-3
    """How far outputs of the reloaded artifact may be from those before it was saved: the largest difference
    as a share of the largest magnitude.
    """
    time_limit_s: float | None = None
    """For building, where it takes longer than other candidates; such a one is tried only by a user who names
    its backend.
    """

    @property
    def name(self) -> str:
        """Backend and technique, as ``openvino/int8-static``."""
        return f"{self.backend}/{self.technique}"

    def with_options(self, options: Mapping[str, Any]) -> Candidate:
        """Return the recipe with other values of its options.

        Raises:
            ConstraintError: it has no such option, or one of another kind.
        """
        given = dict(self.options)
        for name, value in options.items():
            if name not in given:
                known = ", ".join(given) or "none"
                raise ConstraintError(f"{self.name} has no option {name!r}; it has {known}")
            given[name] = _like(self.options[name], f"{self.name}: {name}", value)
        return replace(self, options=given)

    def to_dict(self) -> dict[str, Any]:
        """Return plain data."""
        return {
            "backend": self.backend,
            "technique": self.technique,
            "goal": self.goal,
            "options": dict(self.options),
        }


def _like(default: Any, name: str, value: Any) -> Any:
    """Return a value of the kind that an option has."""
    if isinstance(default, (bool, str)):
        if type(value) is not type(default):
            raise ConstraintError(f"{name} is {value!r}; {type(default).__name__} is wanted, as {default!r}")
        return value
    if isinstance(default, int):
        return int(number(name, value, lambda n: n % 1 == 0, f"an integer is wanted, as {default}"))
    if isinstance(default, float):
        return number(name, value, lambda _: True, f"a number is wanted, as {default:g}")
    return value


@dataclass(frozen=True, kw_only=True)
class BuildContext:
    """What a backend is given to build with, in a process of its own."""

    source: ModelSource
    candidate: Candidate
    folder: Path
    """Empty; the artifact's files go here."""
    shared: Path
    """Kept for the whole run: conversions that several candidates need lie here."""
    calibration: Sequence[Feeds] | None = None
    """Batches of arrays by input name, of the model's dtypes and its fixed batch; None where there are
    none."""
    threads: int = 1
    device: str = "cpu"
    evaluate: Callable[[Runner], float] | None = None
    """Accuracy of a runner on the caller's data, where that can be told."""
    max_accuracy_drop: float | None = None
    cache: Path | None = None
    """Outlives the run; for what took long to find, such as tuning records."""
    seed: int = 0
    time_limit_s: float | None = None
    """Seconds after which the build is ended from outside."""

    @property
    def info(self) -> ModelInfo:
        """The model's."""
        return self.source.info

    def example(self, batch: int = 1) -> dict[str, Array]:
        """One batch of the calibration data, else inputs that are drawn; ``batch`` where it is free."""
        if self.calibration:
            return dict(self.calibration[0])
        return self.info.draw(batch, self.seed)

    def once(self, name: str, make: Callable[[Path], None]) -> Path:
        """Return a file or folder of `shared`, made by the first candidate that needs it.

        ``make`` gets a path with the same name to write to. A run that was cut short leaves nothing half
        made.
        """
        target = self.shared / name
        if not target.exists():
            room = Path(tempfile.mkdtemp(prefix=".making-", dir=self.shared))
            try:
                make(room / name)
                for made in sorted(room.iterdir(), key=lambda path: path.name == name):
                    if not (self.shared / made.name).exists():
                        made.rename(self.shared / made.name)
            finally:
                shutil.rmtree(room, ignore_errors=True)
        return target


@dataclass(frozen=True, kw_only=True)
class Built:
    """What `BaseBackend.build` has written into the context's folder."""

    runtime: str
    main: str
    options: Mapping[str, Any] = field(default_factory=dict[str, Any])
    alone: tuple[str, ...] = ()
    """The files that stand alone under the endings of `Candidate.forms`, the main one first; none where the
    model needs its folder.
    """
    run: Callable[[Feeds], Mapping[str, Array]] | None = None
    """The model as it was before it was saved; what reloads is compared with it."""
    inputs: tuple[TensorSpec, ...] | None = None
    """Where they differ from the source's, as in shapes that were fixed; names stay the same."""
    notes: tuple[str, ...] = ()
    """What the user should know, such as layers that were left alone."""


class BaseBackend(ABC):
    """A backend.

    A class is made without arguments and holds no state. Heavy libraries are imported inside methods.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    modules: ClassVar[tuple[str, ...]]
    """What has to be installed."""
    distributions: ClassVar[tuple[str, ...]] = ()
    """Whose versions a report names."""
    extra: ClassVar[str] = ""
    """The extra of hamerspace that brings them."""

    def is_available(self) -> Verdict:
        """Whether the libraries are installed, and what installs those that are not; imports none of them."""
        missing = [module for module in self.modules if not has(module)]
        if missing:
            wanted = " ".join(PACKAGES.get(module, module) for module in missing)
            return Verdict(False, f"{', '.join(missing)} not installed; run: pip install {wanted}")
        shown = ", ".join(f"{name} {number}" for name, number in self.versions().items())
        return Verdict(True, shown or "installed")

    def versions(self) -> dict[str, str]:
        """Versions of the libraries that are there."""
        return {name: number for name in self.distributions if (number := version(name)) is not None}

    def require(self) -> None:
        """Raise unless the backend can be used.

        Raises:
            BackendUnavailableError: with what installs it.
        """
        if not (verdict := self.is_available()):
            raise BackendUnavailableError(f"backend {self.name}: {verdict.reason}")

    @abstractmethod
    def supports_model(self, model_info: ModelInfo) -> Verdict:
        """Whether the backend can take models of this kind, and why not."""

    @abstractmethod
    def candidates(self, model_info: ModelInfo, *, hardware: str = "cpu") -> list[Candidate]:
        """Return every recipe that can be tried on a model, the most promising first."""

    @abstractmethod
    def build(self, context: BuildContext) -> Built:
        """Make an artifact's files in ``context.folder``."""

    @abstractmethod
    def open(self, manifest: Manifest, folder: Path, options: RunOptions) -> Runner:
        """Open an artifact that this backend made."""

    def quantize(
        self,
        model: Any,
        model_info: ModelInfo | None = None,
        *,
        technique: str | None = None,
        calibration_data: Any = None,
        output: str | Path | None = None,
        **options: Any,
    ) -> Artifact:
        """Quantise a model and save it.

        Args:
            model: a model of torch, Keras, or a path, or a `ModelSource`.
            model_info: what `hamerspace.Optimizer` found out about it; needed for a live model.
            technique: one of the backend's; by default the first that needs no calibration, or, with
                calibration data, the first of all.
            calibration_data: inputs, in any form that `Optimizer.optimize` takes.
            output: the artifact's folder, which appears whole or not at all; a temporary one by default,
                which goes with the returned object.
            options: in place of the technique's own, which `Candidate.options` lists.

        Raises:
            UnsupportedError: there is no such technique for this model.
            BackendUnavailableError: libraries are missing.
            ConstraintError: the technique has no such option, or one of another kind.
            FileExistsError: ``output`` is a folder with other things in it.
        """
        return self._apply("quantize", model, model_info, technique, calibration_data, output, options)

    def prune(
        self,
        model: Any,
        model_info: ModelInfo | None = None,
        *,
        technique: str | None = None,
        output: str | Path | None = None,
        **options: Any,
    ) -> Artifact:
        """Prune a model and save it; arguments and exceptions are those of `quantize`."""
        return self._apply("prune", model, model_info, technique, None, output, options)

    def optimize_graph(
        self,
        model: Any,
        model_info: ModelInfo | None = None,
        *,
        technique: str | None = None,
        output: str | Path | None = None,
        **options: Any,
    ) -> Artifact:
        """Optimise a model's graph and save it; arguments and exceptions are those of `quantize`."""
        return self._apply("graph", model, model_info, technique, None, output, options)

    def save(self, artifact: Artifact, path: str | Path) -> Path:
        """Save an artifact under a name whose ending chooses the form; see `Artifact.save`."""
        return artifact.save(path)

    def load(self, path: str | Path, options: RunOptions | None = None) -> Runner:
        """Open an artifact's folder that this backend made.

        Raises:
            ArtifactError: it is damaged, or another backend's.
        """
        folder = Path(path)
        manifest = read_manifest(folder)
        if manifest.backend != self.name:
            raise ArtifactError(f"{folder} was made by backend {manifest.backend}, not by {self.name}")
        self.require()
        return self.open(manifest, folder, options or RunOptions())

    def _apply(
        self,
        goal: Goal,
        model: Any,
        model_info: ModelInfo | None,
        technique: str | None,
        calibration_data: Any,
        output: str | Path | None,
        options: dict[str, Any],
    ) -> Artifact:
        from hamerspace.measure.data import calibration_batches

        self.require()
        source = ModelSource.of(model, model_info)
        if not (verdict := self.supports_model(source.info)):
            raise UnsupportedError(f"backend {self.name}: {verdict.reason}")
        offered = [one for one in self.candidates(source.info) if one.goal == goal]
        calibrated = calibration_data is not None
        if technique is None:
            usable = [one for one in offered if calibrated or not one.needs_calibration]
        else:
            usable = [one for one in offered if one.technique == technique]
        if not usable:
            names = [one.technique for one in offered]
            raise UnsupportedError(
                f"backend {self.name} has {names or 'nothing'} to {goal} this model with"
                + (f", and no {technique!r}" if technique else "; all of these need calibration data")
            )
        chosen = usable[0].with_options(options)
        if chosen.needs_calibration and not calibrated:
            raise UnsupportedError(f"{chosen.name} needs calibration_data")
        batches = calibration_batches(calibration_data, source.info) if calibrated else None
        if output is not None:
            check_free(Path(output))
        room = Room()
        with Room() as shared:
            context = BuildContext(
                source=source, candidate=chosen, folder=room.path, shared=shared, calibration=batches
            )
            manifest = build_artifact(self, context)[0]
        if output is None:
            return Artifact(room.path, manifest, room)
        with room:
            return Artifact(save_folder(room.path, Path(output)), manifest)


class Artifact:
    """A model that a backend has made: its folder and its manifest."""

    def __init__(self, folder: Path, manifest: Manifest, owner: object = None) -> None:
        self.folder = folder
        self.manifest = manifest
        self._owner = owner

    def __repr__(self) -> str:
        return (
            f"Artifact({self.manifest.backend}/{self.manifest.technique}, {self.manifest.size_bytes:,} bytes)"
        )

    def load(self, device: str = "cpu", threads: int | None = None) -> Any:
        """Open it as one callable, as `hamerspace.load` does."""
        from hamerspace.loading import find

        options = RunOptions(device="cuda" if device == "gpu" else device, threads=threads, allow_native=True)
        return find(self.folder).as_model(options, owner=self)

    def save(self, path: str | Path) -> Path:
        """Save it under a name whose ending chooses the form; see `hamerspace.saving.save_artifact`."""
        return save_artifact(self.folder, self.manifest, Path(path))


def build_artifact(backend: BaseBackend, context: BuildContext) -> tuple[Manifest, Built]:
    """Let a backend build, and write the manifest of what it made."""
    built = backend.build(context)
    info = context.info
    files = list_files(context.folder)
    if built.main != "." and built.main not in files:
        raise ArtifactError(f"{context.candidate.name} said that it wrote {built.main}, and did not")
    inputs = built.inputs or info.inputs
    outputs = info.outputs
    if built.run is not None and not outputs:
        outputs = tuple(spec_of(name, array) for name, array in built.run(context.example()).items())
    manifest = Manifest(
        backend=backend.name,
        technique=context.candidate.technique,
        runtime=built.runtime,
        main=built.main,
        inputs=inputs,
        outputs=outputs,
        structure=info.structure,
        options=dict(built.options),
        forms={ending: built.alone for ending in context.candidate.forms if built.alone},
        versions=backend.versions(),
        files=files,
        seal=seal_of(files[built.main][1]) if built.runtime in NATIVE else None,
    )
    write_json(context.folder / MANIFEST, manifest.to_dict())
    return manifest, built


def merged(batches: Iterable[Feeds]) -> list[dict[str, Array]]:
    """Return batches as plain dictionaries."""
    return [dict(batch) for batch in batches]
