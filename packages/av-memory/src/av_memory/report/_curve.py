"""A curve made smaller without losing what can be seen of it, and its breaks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import median

_LEAST_GAP_S = 0.25
_GAP_IN_INTERVALS = 20


@dataclass(frozen=True, slots=True)
class Curve:
    """Points to be joined by a line, except where two neighbours are more than ``gap_s`` apart."""

    times_s: list[float]
    values_mb: list[float]
    gap_s: float


def median_interval_s(times_s: Sequence[float]) -> float:
    """Half of the samples follow their predecessor within this time; 0 for less than two samples."""
    return median(b - a for a, b in pairwise(times_s)) if len(times_s) > 1 else 0.0


def reduce_curve(times_s: Sequence[float], values_mb: Sequence[float], columns: int) -> Curve:
    """Keep the first, smallest, largest and last point of each of ``columns`` equal stretches of time.

    These four draw the same line as all points do, as long as a column is at most a pixel wide
    (Jugel et al., "M4", VLDB 2014). A curve that is small enough is kept whole.
    """
    gap_s = max(_LEAST_GAP_S, _GAP_IN_INTERVALS * median_interval_s(times_s))
    count = len(times_s)
    if count <= 4 * columns:
        return Curve(list(times_s), list(values_mb), gap_s)
    width_s = (times_s[-1] - times_s[0]) / columns
    if width_s <= 0:
        lowest, highest = min(values_mb), max(values_mb)
        return Curve([times_s[0], times_s[0]], [lowest, highest], gap_s)
    kept: list[int] = []
    first = lowest = highest = column = 0
    for index in range(1, count + 1):
        now = columns if index == count else min(int((times_s[index] - times_s[0]) / width_s), columns - 1)
        if now != column:
            kept.extend(sorted({first, lowest, highest, index - 1}))
            first = lowest = highest = index
            column = now
        elif values_mb[index] < values_mb[lowest]:
            lowest = index
        elif values_mb[index] > values_mb[highest]:
            highest = index
    return Curve([times_s[i] for i in kept], [values_mb[i] for i in kept], max(gap_s, width_s))
