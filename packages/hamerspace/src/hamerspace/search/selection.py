"""Which of the proven candidates is the result, and whether it meets the constraints."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from hamerspace.core.constraints import MIN_COSINE, Constraints
from hamerspace.measure.metrics import ModelMetrics
from hamerspace.search.trials import Trial

Outcome = Literal["satisfied", "violated", "undecided"]


@dataclass(frozen=True, kw_only=True)
class ConstraintVerdict:
    """Whether a constraint is met, and why."""

    constraint: str
    outcome: Outcome
    reason: str

    def to_dict(self) -> dict[str, Any]:
        """Return plain data."""
        return asdict(self)


def verdicts(
    constraints: Constraints, original: ModelMetrics, found: ModelMetrics
) -> list[ConstraintVerdict]:
    """Judge each constraint that is set. What the noise of the machine leaves open is undecided."""
    judged: list[ConstraintVerdict] = []

    def say(constraint: str, outcome: Outcome, reason: str) -> None:
        judged.append(ConstraintVerdict(constraint=constraint, outcome=outcome, reason=reason))

    if constraints.target_size_mb is not None:
        meets = found.size_mb <= constraints.target_size_mb
        say(
            "target_size_mb",
            "satisfied" if meets else "violated",
            f"{found.size_mb:.2f} MB, {constraints.target_size_mb:g} MB allowed",
        )
    if constraints.max_latency_ms is not None:
        limit = constraints.max_latency_ms
        low, high = found.latency_interval_ms or (found.latency_ms, found.latency_ms)
        say(
            "max_latency_ms",
            "satisfied" if high <= limit else "violated" if low > limit else "undecided",
            f"median {found.latency_ms:.3g} ms, within {low:.3g} and {high:.3g} ms; {limit:g} ms allowed",
        )
    if constraints.max_accuracy_drop is not None:
        if original.accuracy is None or found.accuracy is None:
            say(
                "max_accuracy_drop",
                "undecided",
                "accuracy was not measured; give validation_data with labels, or validation_fn",
            )
        else:
            drop = original.accuracy - found.accuracy
            # A drop of a whole number of samples is not to fail for the last bit of a difference.
            meets = drop <= constraints.max_accuracy_drop + 1e-9
            say(
                "max_accuracy_drop",
                "satisfied" if meets else "violated",
                f"{original.accuracy:.4f} to {found.accuracy:.4f}, a drop of {drop:.4f}; "
                f"{constraints.max_accuracy_drop:g} allowed",
            )
    return judged


def rank(
    trial: Trial, constraints: Constraints, original: ModelMetrics, min_cosine: float = MIN_COSINE
) -> tuple[float, ...]:
    """Return what trials are sorted by, the best first.

    First come those that violate the fewest constraints, then those that leave the fewest open, then those
    that are faithful to the original, then the fastest; of equally fast ones the smaller.
    """
    if trial.metrics is None or trial.fidelity is None:
        return (float("inf"),)
    judged = verdicts(constraints, original, trial.metrics)
    violated = sum(one.outcome == "violated" for one in judged)
    undecided = sum(one.outcome == "undecided" for one in judged)
    decided = any(one.constraint == "max_accuracy_drop" and one.outcome == "satisfied" for one in judged)
    unfaithful = 0 if decided else max(0.0, min_cosine - trial.fidelity.cosine)
    speed = trial.speedup.median if trial.speedup else 0.0
    return (violated, undecided, unfaithful, -round(speed, 2), trial.metrics.size_mb)


def choose(
    trials: Sequence[Trial], constraints: Constraints, original: ModelMetrics, min_cosine: float = MIN_COSINE
) -> Trial | None:
    """Return the best of the proven trials, or None where there is none."""
    proven = [trial for trial in trials if trial.proven]
    return min(proven, key=lambda one: rank(one, constraints, original, min_cosine), default=None)
