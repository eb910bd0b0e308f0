"""What an optimisation found: the original beside the result, every candidate, and each constraint."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from hamerspace.artifact import replacing, write_json
from hamerspace.core._page import page, smaller
from hamerspace.core.config import OptimizationConfig, config_from_dict
from hamerspace.exceptions import ArtifactError, UnsupportedError
from hamerspace.measure.fidelity import Fidelity
from hamerspace.measure.metrics import ModelMetrics
from hamerspace.measure.statistics import Ratio
from hamerspace.search.selection import ConstraintVerdict
from hamerspace.search.trials import Trial

_ENDINGS = (".txt", ".md", ".json", ".html")

_HELP_ACCURACY = (
    "The accuracy constraint is undecided: nothing was given to measure accuracy with. "
    "Give optimize() validation_data with labels, or a validation_fn."
)


@dataclass(frozen=True, kw_only=True)
class CandidateReport:
    """What became of one candidate."""

    backend: str
    technique: str
    outcome: str
    """``chosen``, ``proven``, ``failed`` or ``skipped``."""
    reason: str = ""
    """Why it failed or was skipped."""
    metrics: ModelMetrics | None = None
    fidelity: Fidelity | None = None
    speedup: Ratio | None = None
    reload_difference: float | None = None
    build_s: float = 0.0
    notes: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """Backend and technique."""
        return f"{self.backend}/{self.technique}"

    @classmethod
    def of(cls, trial: Trial, outcome: str) -> CandidateReport:
        """Write a trial down."""
        return cls(
            backend=trial.candidate.backend,
            technique=trial.candidate.technique,
            outcome=outcome,
            reason=trial.failure or "",
            metrics=trial.metrics,
            fidelity=trial.fidelity,
            speedup=trial.speedup,
            reload_difference=trial.reload_difference,
            build_s=trial.build_s,
            notes=tuple(trial.notes),
        )


@dataclass(frozen=True, kw_only=True)
class CompressionReport:
    """The original and the result, compared. Times of the two were taken in turn, in the same minutes."""

    original_metrics: ModelMetrics
    optimized_metrics: ModelMetrics
    optimization_config: OptimizationConfig
    backend_used: str
    technique_used: str
    execution_time_seconds: float
    verdicts: tuple[ConstraintVerdict, ...] = ()
    fidelity: Fidelity | None = None
    speedup: Ratio | None = None
    """How many times less time the result takes: CPU time on a CPU, wall time on a GPU."""
    accuracy_basis: str | None = None
    """What accuracy was measured with; None where it was not."""
    candidates: tuple[CandidateReport, ...] = ()
    notes: tuple[str, ...] = ()
    environment: dict[str, Any] = field(default_factory=dict[str, Any])

    @property
    def size_reduction_ratio(self) -> float:
        """1 - new size / old size: 0.75 is a quarter of the size, and below 0 it grew."""
        old = self.original_metrics.size_mb
        return 1 - self.optimized_metrics.size_mb / old if old else 0.0

    @property
    def latency_improvement_ratio(self) -> float:
        """Old latency / new latency: 2 is twice as fast, below 1 is slower."""
        new = self.optimized_metrics.latency_ms
        return self.original_metrics.latency_ms / new if new else math.inf

    @property
    def accuracy_drop(self) -> float | None:
        """Accuracy of the original less that of the result; None where it was not measured."""
        old, new = self.original_metrics.accuracy, self.optimized_metrics.accuracy
        return None if old is None or new is None else old - new

    @property
    def constraints_satisfied(self) -> bool:
        """Whether every constraint is known to be met; one that is undecided is not."""
        return all(one.outcome == "satisfied" for one in self.verdicts)

    @property
    def constraint_violations(self) -> list[str]:
        """Constraints that are known not to be met, with the figures."""
        return [f"{one.constraint}: {one.reason}" for one in self.verdicts if one.outcome == "violated"]

    @property
    def constraints_undecided(self) -> list[str]:
        """Constraints that could not be decided, with the reason."""
        return [f"{one.constraint}: {one.reason}" for one in self.verdicts if one.outcome == "undecided"]

    def to_dict(self) -> dict[str, Any]:
        """Return plain data."""
        return {
            "format": 1,
            **asdict(self),
            "optimization_config": self.optimization_config.to_dict(),
            "size_reduction_ratio": self.size_reduction_ratio,
            "latency_improvement_ratio": self.latency_improvement_ratio,
            "accuracy_drop": self.accuracy_drop,
            "constraints_satisfied": self.constraints_satisfied,
            "constraint_violations": self.constraint_violations,
            "constraints_undecided": self.constraints_undecided,
        }

    def __str__(self) -> str:
        return "\n".join(_text(self))

    def save(self, path: str | Path) -> Path:
        """Write it; the ending says how: ``.txt``, ``.md``, ``.json`` or ``.html``.

        Raises:
            UnsupportedError: another ending.
        """
        target = Path(path)
        forms: dict[str, Callable[[CompressionReport], str]] = {
            ".txt": lambda report: f"{report}\n",
            ".md": _markdown,
            ".html": lambda report: page(report.to_dict()),
        }
        ending = target.suffix.lower()
        if ending == ".json":
            write_json(target, finite(self.to_dict()))
            return target
        check_ending(target)
        with replacing(target) as temporary:
            temporary.write_text(forms[ending](self), encoding="utf-8")
        return target


def check_ending(path: Path) -> None:
    """Raise unless a report can be written under this name.

    Raises:
        UnsupportedError: its ending is none of a report's.
    """
    if path.suffix.lower() not in _ENDINGS:
        raise UnsupportedError(
            f"a report is written as {', '.join(_ENDINGS)}, not as {path.suffix.lower()!r}"
        )


def finite(value: Any) -> Any:
    """Return plain data without infinities and NaN, which JSON does not have."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {str(key): finite(one) for key, one in value.items()}  # pyright: ignore[reportUnknownVariableType, reportUnknownArgumentType]
    if isinstance(value, (list, tuple)):
        return [finite(one) for one in value]  # pyright: ignore[reportUnknownVariableType]
    return value


def _text(report: CompressionReport) -> list[str]:
    old, new = report.original_metrics, report.optimized_metrics
    lines = [
        f"{report.optimization_config.model.name}: {report.backend_used}/{report.technique_used}, "
        f"found in {report.execution_time_seconds:.0f} s",
        "",
        *_aligned(
            [
                ["", "original", "optimised", ""],
                [
                    "size",
                    f"{old.size_mb:.2f} MB",
                    f"{new.size_mb:.2f} MB",
                    smaller(report.size_reduction_ratio),
                ],
                [
                    "latency, median",
                    f"{old.latency_ms:.3g} ms",
                    f"{new.latency_ms:.3g} ms",
                    f"{report.latency_improvement_ratio:.2f}x",
                ],
                ["latency, 90% / 99%", _tail(old), _tail(new), ""],
                ["CPU time a call", _ms(old.cpu_ms), _ms(new.cpu_ms), _ratio(report.speedup)],
                ["throughput", f"{old.throughput or 0:.4g}/s", f"{new.throughput or 0:.4g}/s", ""],
                ["peak memory", _mb(old.memory_mb), _mb(new.memory_mb), ""],
                [
                    "accuracy",
                    _share(old.accuracy),
                    _share(new.accuracy),
                    report.accuracy_basis or "not measured",
                ],
            ]
        ),
    ]
    if report.fidelity:
        lines += ["", f"Against the original: {report.fidelity}"]
    target = report.optimization_config.constraints.target_hardware
    lines += [f"Measured on this machine's {new.hardware}" + _as_target(target, new.hardware)]
    lines += ["", "Constraints:" if report.verdicts else "No constraints were set."]
    lines += [f"  {one.outcome}: {one.constraint}, {one.reason}" for one in report.verdicts]
    if any(one.constraint == "max_accuracy_drop" and one.outcome == "undecided" for one in report.verdicts):
        lines += [f"  {_HELP_ACCURACY}"]
    lines += ["", "Candidates:", *("  " + line for line in _aligned(_candidate_rows(report.candidates)))]
    reasons = [one for one in report.candidates if one.reason]
    if reasons:
        lines += ["", "Why not:", *(f"  {one.name}: {one.reason}" for one in reasons)]
    lines += [f"Note: {note}" for note in report.notes]
    return lines


def _as_target(target: str, hardware: str) -> str:
    return f", not on a device of the kind {target!r}" if target not in (hardware, "gpu") else ""


def _candidate_rows(candidates: Sequence[CandidateReport]) -> list[list[str]]:
    rows = [["candidate", "", "speed", "size", "latency", "cosine", "accuracy"]]
    for one in candidates:
        if one.metrics is None:
            rows.append([one.name, one.outcome, "", "", "", "", ""])
            continue
        rows.append(
            [
                one.name,
                one.outcome,
                f"{one.speedup.median:.2f}x" if one.speedup else "",
                f"{one.metrics.size_mb:.2f} MB",
                f"{one.metrics.latency_ms:.3g} ms",
                f"{one.fidelity.cosine:.4f}" if one.fidelity else "",
                _share(one.metrics.accuracy) if one.metrics.accuracy is not None else "",
            ]
        )
    return rows


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[place]) for row in rows) for place in range(len(rows[0]))]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    ]


def _markdown(report: CompressionReport) -> str:
    def table(rows: Sequence[Sequence[str]]) -> list[str]:
        escaped = [[cell.replace("|", "\\|") for cell in row] for row in rows]
        head, *body = escaped
        return [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *body)]

    old, new = report.original_metrics, report.optimized_metrics
    lines = [
        f"# {report.optimization_config.model.name}: {report.backend_used}/{report.technique_used}",
        "",
        *table(
            [
                ["", "original", "optimised", "ratio"],
                [
                    "size",
                    f"{old.size_mb:.2f} MB",
                    f"{new.size_mb:.2f} MB",
                    smaller(report.size_reduction_ratio),
                ],
                [
                    "latency",
                    _ms(old.latency_ms),
                    _ms(new.latency_ms),
                    f"{report.latency_improvement_ratio:.2f}x",
                ],
                ["CPU time", _ms(old.cpu_ms), _ms(new.cpu_ms), _ratio(report.speedup)],
                ["peak memory", _mb(old.memory_mb), _mb(new.memory_mb), ""],
                [
                    "accuracy",
                    _share(old.accuracy),
                    _share(new.accuracy),
                    report.accuracy_basis or "not measured",
                ],
            ]
        ),
        "",
        *(f"- {one.outcome}: {one.constraint}, {one.reason}" for one in report.verdicts),
        "",
        *table(_candidate_rows(report.candidates)),
        "",
        *(f"- {one.name}: {one.reason}" for one in report.candidates if one.reason),
        *(f"- {note}" for note in report.notes),
    ]
    return "\n".join(lines) + "\n"


def _tail(metrics: ModelMetrics) -> str:
    return f"{metrics.latency_p90_ms or 0:.3g} / {metrics.latency_p99_ms or 0:.3g} ms"


def _ms(value: float | None) -> str:
    return "" if value is None else f"{value:.3g} ms"


def _mb(value: float | None) -> str:
    return "" if value is None else f"{value:.0f} MB"


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def _ratio(ratio: Ratio | None) -> str:
    return "" if ratio is None else f"{ratio.median:.2f}x ({ratio.low:.2f} to {ratio.high:.2f})"


def report_from_dict(data: Mapping[str, Any]) -> CompressionReport:
    """Read what `CompressionReport.to_dict` gave, also after it was JSON.

    Raises:
        ArtifactError: an entry is missing.
    """

    def made(kind: Callable[..., Any], entries: Any) -> Any:
        return None if entries is None else kind(**entries)

    def fidelity(entries: Any) -> Any:
        # JSON has no infinity, which is what the ratio is where nothing differs.
        if entries is not None and entries["sqnr_db"] is None:
            entries = {**entries, "sqnr_db": math.inf}
        return made(Fidelity, entries)

    def candidate(entries: Any) -> CandidateReport:
        read: dict[str, Any] = {
            **entries,
            "metrics": made(ModelMetrics, entries["metrics"]),
            "fidelity": fidelity(entries["fidelity"]),
            "speedup": made(Ratio, entries["speedup"]),
            "notes": tuple(entries["notes"]),
        }
        return CandidateReport(**read)

    try:
        return CompressionReport(
            original_metrics=ModelMetrics(**data["original_metrics"]),
            optimized_metrics=ModelMetrics(**data["optimized_metrics"]),
            optimization_config=config_from_dict(data["optimization_config"], "the report"),
            backend_used=data["backend_used"],
            technique_used=data["technique_used"],
            execution_time_seconds=data["execution_time_seconds"],
            verdicts=tuple(ConstraintVerdict(**one) for one in data["verdicts"]),
            fidelity=fidelity(data["fidelity"]),
            speedup=made(Ratio, data["speedup"]),
            accuracy_basis=data["accuracy_basis"],
            candidates=tuple(candidate(one) for one in data["candidates"]),
            notes=tuple(data["notes"]),
            environment=data["environment"],
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise ArtifactError(f"the report is damaged: {error}") from error
