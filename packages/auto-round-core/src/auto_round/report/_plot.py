"""Axes, and the frame around a drawing that is as wide as its place.

Lines and dots are drawn in an SVG of 1000 by 1000 units that is stretched to its frame, with strokes that are
not; what has letters stands beside it as HTML. So letters keep their size on a telephone.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from typing import TypeGuard

UNITS = 1000

Tick = tuple[float, str]
"""A value on an axis and what stands there."""


_LARGEST, _SMALLEST = 1e100, 1e-100


def drawable(value: float | None) -> TypeGuard[float]:
    """Tell whether a value has a place on an axis: a finite number whose logarithm is reasonable, or 0."""
    return value is not None and (value == 0 or _SMALLEST < abs(value) < _LARGEST)


@dataclass(frozen=True, slots=True)
class Axis:
    """A stretch of numbers, linear or logarithmic."""

    low: float
    high: float
    ticks: tuple[Tick, ...] = ()
    log: bool = False

    def place(self, value: float) -> float:
        """Return how far along a value is, from 0 to `UNITS`; what is beyond an end is put there."""
        low, high = self.low, self.high
        if self.log:
            low, high, value = math.log(low), math.log(high), math.log(max(value, low))
        return UNITS * min(max((value - low) / (high - low), 0.0), 1.0)


def around(values: Iterable[float], *, from_zero: bool = False, most: int = 5) -> Axis:
    """Return a linear axis with round ticks and a little room at either end of the values."""
    held = [*values, 0.0] if from_zero else list(values)
    low, high = min(held), max(held)
    # Where all values are the same, an axis needs a width nonetheless.
    room = 0.06 * (high - low) or 0.06 * abs(high) or 1.0
    low, high = (low if from_zero and low >= 0 else low - room), high + room
    return Axis(low, high, tuple((value, f"{value:.6g}") for value in round_values(low, high, most)))


def logarithmic(values: Iterable[float]) -> Axis:
    """Return a logarithmic axis for values above 0."""
    held = list(values)
    low, high = min(held) / 1.3, max(held) * 1.3
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    stride = math.ceil(len(decades) / 6)
    factors = (1, 2, 5) if high < 300 * low else (1,)
    ticks = [factor * 10.0**decade for decade in decades[::stride] for factor in factors]
    return Axis(low, high, tuple((tick, f"{tick:.3g}") for tick in ticks if low <= tick <= high), log=True)


def round_values(low: float, high: float, most: int) -> list[float]:
    """Return up to about `most` multiples of 1, 2 or 5 times a power of ten."""
    rough = (high - low) / most
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * (1 - 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    # Multiplying leaves digits that mean nothing: 3 * 0.1.
    return [round(number * step, 12) if step > 1e-9 else number * step for number in range(first, last + 1)]


def times(span_s: float) -> tuple[Tick, ...]:
    """Return ticks from 0 to a time, in seconds, minutes or hours."""
    unit, name = (1, "s") if span_s < 180 else (60, "min") if span_s < 10_800 else (3600, "h")
    return tuple((value * unit, f"{value:.6g} {name}") for value in round_values(0, span_s / unit, 5))


def sizes(top_mb: float) -> tuple[Tick, ...]:
    """Return ticks from 0 to a size in MB of 2**20 bytes."""
    unit, name = (1024, "GB") if top_mb >= 4096 else (1, "MB")
    return tuple((value * unit, f"{value:.6g} {name}") for value in round_values(0, top_mb / unit, 5))


def line(points: Sequence[tuple[float, float]]) -> str:
    """Return the path of a line through places in units."""
    return "M" + "L".join(f"{x:.0f} {y:.0f}" for x, y in points) if points else ""


def dots(points: Iterable[tuple[float, float]]) -> str:
    """Return the path of dots: lines of no length, which round ends make visible."""
    return "".join(f"M{x:.0f} {y:.0f}h0" for x, y in points)


def framed(
    body: str, *, x: Axis, y: Axis, label: str, above: str = "", style: str = "", near_x: bool = False
) -> str:
    """Return a drawing with its axes.

    Args:
        body: What the SVG holds, in places of the axes, `UNITS` - y downwards.
        x: Axis below.
        y: Axis on the left.
        label: What is drawn, for readers who do not see it.
        above: HTML that lies over the drawing.
        style: Class of the frame.
        near_x: Pointing tells of what is nearest sideways, as fits a curve, and not in both directions.
    """
    grid = "".join(f"M0 {UNITS - y.place(value):.0f}h{UNITS}" for value, _ in y.ticks)
    left = "".join(
        f'<span class="y" style="top:{100 - y.place(value) / 10:.1f}%">{escape(text)}</span>'
        for value, text in y.ticks
    )
    below = "".join(
        f'<span class="x" style="left:{x.place(value) / 10:.1f}%">{escape(text)}</span>'
        for value, text in x.ticks
    )
    return (
        f'<div class="frame {style}"><div class="plot"{" data-near-x" if near_x else ""}>'
        f'<svg viewBox="0 0 {UNITS} {UNITS}" preserveAspectRatio="none" role="img" '
        f'aria-label="{escape(label)}"><path class="grid" d="{grid}"/>{body}</svg>'
        f'<div aria-hidden="true">{left}{below}{above}</div></div></div>'
    )
