"""Medians with what they are worth: bootstrap intervals over rounds, and ratios of rounds side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from hamerspace.models.info import Array


@dataclass(frozen=True, kw_only=True)
class Round:
    """One round of calls of one model."""

    cpu_s: float
    """Of the whole process, a call."""
    wall_s: tuple[float, ...]
    """Of each call."""


def interval(
    values: Sequence[float], *, confidence: float = 0.95, draws: int = 2000, seed: int = 0
) -> tuple[float, float]:
    """Percentile bootstrap interval of the median (Efron 1979)."""
    sample = np.asarray(values, float)
    generator = np.random.default_rng(seed)
    medians = np.median(sample[generator.integers(0, len(sample), (draws, len(sample)))], axis=1)
    tail = (1 - confidence) / 2 * 100
    low, high = np.percentile(medians, [tail, 100 - tail])
    return float(low), float(high)


def wall_medians(rounds: Sequence[Round]) -> Array:
    """Median wall time of a call in each round, in seconds."""
    return np.array([np.median(one.wall_s) for one in rounds])


def all_calls(rounds: Sequence[Round]) -> Array:
    """Wall time of every call, in seconds."""
    return np.array([wall for one in rounds for wall in one.wall_s])


@dataclass(frozen=True, kw_only=True)
class Ratio:
    """How many times less time one model takes than another, from rounds in turn."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, slow: Sequence[float], fast: Sequence[float]) -> Ratio:
        """Median and 95% interval of the ratios of rounds that ran one after the other."""
        ratios = [a / max(b, 1e-12) for a, b in zip(slow, fast, strict=True)]
        low, high = interval(ratios)
        return cls(median=float(np.median(ratios)), low=low, high=high)
