"""The curves of a run as charts for a page: drawn here once over the steps, redrawn there by a script.

A chart is as wide as its place: what has letters (ticks, labels) stands beside or over an SVG of 1000 by 1000
units that is stretched, with lines whose width is not.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from llm_trainer.training._history import HistoryRecord, TrainingHistory
from llm_trainer.training._progress import format_duration

UNITS = 1000
_MOST_BUCKETS = 500

Tick = tuple[float, str]
"""Where along the axis, from 0 to `UNITS`, and what it says."""


@dataclass(frozen=True)
class Scale:
    """A linear or logarithmic stretch of numbers."""

    low: float
    high: float
    log: bool = False

    def place(self, value: float) -> float:
        """Return how far along `value` is, from 0 to `UNITS`."""
        if self.log:
            return UNITS * math.log(max(value, self.low) / self.low) / math.log(self.high / self.low)
        return UNITS * (value - self.low) / (self.high - self.low)

    def ticks(self, label: Callable[[float], str], most: int = 6) -> list[Tick]:
        """Return up to `most` round values of the stretch, far enough apart to be read."""
        ticks: list[Tick] = []
        for value in self._log_values() if self.log else self._linear_values(most):
            place = self.place(value)
            inside = self.low * (1 - 1e-9) <= value <= self.high * (1 + 1e-9)
            if inside and (not ticks or place - ticks[-1][0] >= UNITS / (2 * most)):
                ticks.append((place, label(value)))
        return ticks

    def _linear_values(self, most: int) -> Iterable[float]:
        rough = (self.high - self.low) / most
        power = 10.0 ** math.floor(math.log10(rough))
        step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * (1 - 1e-9))
        first = math.ceil(self.low / step - 1e-9)
        # A multiple's last digits are noise: 3 * 0.1.
        return (round(number * step, 12) for number in range(first, first + most + 2))

    def _log_values(self) -> Iterable[float]:
        decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
        factors = (1,) if len(decades) > 4 else (1, 2, 5)
        return (factor * 10.0**decade for decade in decades for factor in factors)


@dataclass(frozen=True)
class Series:
    """One curve: the records that have a finite value, and those values."""

    label: str
    records: list[HistoryRecord]
    values: list[float]
    dots: bool = False


@dataclass(frozen=True)
class Chart:
    """Curves that share an axis."""

    title: str
    unit: str
    series: list[Series]
    log: bool = False
    from_zero: bool = True

    def y_scale(self) -> Scale:
        """Return an axis that holds all values."""
        values = [value for one in self.series for value in one.values]
        low, high = min(values), max(values)
        if self.log:
            return Scale(low / 1.2, high * 1.2, log=True)
        margin = 0.05 * (high - low) or 0.05 * abs(high) or 1.0
        return Scale(0.0 if self.from_zero and low >= 0 else low - margin, high + margin)


def charts_of(history: TrainingHistory) -> list[Chart]:
    """Return the charts for which the history has values, the losses first."""
    charts = [
        Chart(
            "Loss",
            "nats a token",
            [
                _series(history, "training", lambda record: record.train_loss),
                _series(history, "held out", lambda record: record.eval_loss, dots=True),
            ],
            from_zero=False,
        ),
        Chart("Learning rate", "", [_series(history, "learning rate", lambda record: record.lr)]),
        Chart(
            "Gradient norm",
            "before clipping, logarithmic",
            [_series(history, "norm", lambda record: record.grad_norm or None)],
            log=True,
        ),
        Chart("Speed", "tokens a second", [_series(history, "tokens/s", lambda record: record.tokens_per_s)]),
        Chart(
            "Model FLOPs utilisation",
            "% of the device's peak",
            [_series(history, "MFU", lambda record: None if record.mfu is None else 100 * record.mfu)],
        ),
        Chart("Memory", "MB resident", [_series(history, "memory", lambda record: record.rss_mb)]),
    ]
    filled = [
        Chart(
            chart.title, chart.unit, [one for one in chart.series if one.values], chart.log, chart.from_zero
        )
        for chart in charts
    ]
    return [chart for chart in filled if chart.series]


def _series(
    history: TrainingHistory,
    label: str,
    value_of: Callable[[HistoryRecord], float | None],
    *,
    dots: bool = False,
) -> Series:
    pairs = [
        (record, value)
        for record in history
        if (value := value_of(record)) is not None and math.isfinite(value)
    ]
    kept = _thinned([value for _, value in pairs])
    return Series(label, [pairs[i][0] for i in kept], [pairs[i][1] for i in kept], dots)


def _thinned(values: Sequence[float]) -> list[int]:
    """Return the positions to draw: of each of many stretches the first, lowest, highest and last."""
    length = -(-len(values) // _MOST_BUCKETS)
    if length <= 4:
        return list(range(len(values)))
    kept: set[int] = set()
    for start in range(0, len(values), length):
        stretch = range(start, min(start + length, len(values)))
        kept |= {
            stretch[0],
            min(stretch, key=lambda i: values[i]),
            max(stretch, key=lambda i: values[i]),
            stretch[-1],
        }
    return sorted(kept)


AXES: dict[str, tuple[str, Callable[[HistoryRecord], float], Callable[[float], str]]] = {
    "steps": ("Steps", lambda record: float(record.step), lambda value: compact(value)),
    "tokens": ("Tokens", lambda record: float(record.tokens), lambda value: compact(value)),
    "time": ("Time", lambda record: record.wall_s, lambda value: _short_time(value)),
}
"""What the curves can be drawn over: its name for people, a record's place, and what a tick says."""


def x_scale(history: TrainingHistory, axis: str, *, log: bool) -> Scale:
    """Return the axis under all charts."""
    places = [AXES[axis][1](record) for record in history]
    high = max(places, default=0.0) or 1.0
    low = min((place for place in places if place > 0), default=high)
    if not log:
        return Scale(0.0, high)
    return Scale(low if low < high else high / 10, high, log=True)


def page_data(history: TrainingHistory, charts: Sequence[Chart]) -> dict[str, Any]:
    """Return what the script needs to draw the charts over another axis and to tell values."""
    scales = {
        f"{axis} {kind}": x_scale(history, axis, log=kind == "log")
        for axis in AXES
        for kind in ("linear", "log")
    }
    return {
        "units": UNITS,
        "axes": {
            name: {
                "low": scale.low,
                "high": scale.high,
                "log": scale.log,
                "ticks": scale.ticks(AXES[name.split()[0]][2]),
            }
            for name, scale in scales.items()
        },
        "charts": [
            [
                {
                    "label": one.label,
                    "dots": one.dots,
                    "x": {
                        axis: [_rounded(place(record)) for record in one.records]
                        for axis, (_, place, _) in AXES.items()
                    },
                    "y": [round(UNITS - chart.y_scale().place(value), 1) for value in one.values],
                    "values": [readable(value) for value in one.values],
                    "at": [
                        f"step {record.step:,}, {compact(record.tokens)} tokens, "
                        f"{format_duration(record.wall_s)}"
                        for record in one.records
                    ],
                }
                for one in chart.series
            ]
            for chart in charts
        ],
    }


def chart_html(history: TrainingHistory, chart: Chart, number: int, resumed_after: Sequence[int]) -> str:
    """Return a chart over the steps."""
    x, y = x_scale(history, "steps", log=False), chart.y_scale()
    y_ticks = [(UNITS - place, label) for place, label in y.ticks(readable, most=5)]
    grid = "".join(f"M0 {place:.1f}H{UNITS}" for place, _ in y_ticks)
    marks = "".join(f"M{x.place(step):.1f} 0V{UNITS}" for step in resumed_after) if number == 0 else ""
    keys = "".join(
        f'<span class="key s{position}">{escape(one.label)}</span>'
        for position, one in enumerate(chart.series)
    )
    lines = "".join(
        f'<path class="line s{position}" d="{_line(x, y, one)}"/>'
        + (
            f'<path class="dots s{position}" d="{_dots(x, y, one)}"/>'
            if one.dots or len(one.values) == 1
            else ""
        )
        for position, one in enumerate(chart.series)
    )
    left = "".join(
        f'<span class="y" style="top:{place / 10:.2f}%">{escape(label)}</span>' for place, label in y_ticks
    )
    below = "".join(
        f'<span class="x" style="left:{place / 10:.2f}%">{escape(label)}</span>'
        for place, label in x.ticks(AXES["steps"][2])
    )
    unit = f' <span class="unit">{escape(chart.unit)}</span>' if chart.unit else ""
    return (
        f'<figure class="chart" data-chart="{number}"><figcaption><b>{escape(chart.title)}</b>{unit}'
        f'<span class="keys">{keys if len(chart.series) > 1 else ""}</span></figcaption>'
        f'<div class="frame">{left}<div class="plot"><svg viewBox="0 0 {UNITS} {UNITS}" '
        f'preserveAspectRatio="none" role="img" aria-label="{escape(chart.title)}">'
        f'<path class="grid" d="{grid}"/><path class="resumed" d="{marks}"/>{lines}</svg>'
        f'<div class="ticks">{below}</div></div></div></figure>'
    )


def _points(x: Scale, y: Scale, series: Series) -> list[tuple[float, float]]:
    return [
        (x.place(record.step), UNITS - y.place(value))
        for record, value in zip(series.records, series.values, strict=True)
    ]


def _line(x: Scale, y: Scale, series: Series) -> str:
    return "M" + "L".join(f"{px:.1f} {py:.1f}" for px, py in _points(x, y, series))


def _dots(x: Scale, y: Scale, series: Series) -> str:
    return "".join(f"M{px:.1f} {py:.1f}h0" for px, py in _points(x, y, series))


def _rounded(value: float) -> float:
    return float(f"{value:.6g}")


def readable(value: float) -> str:
    """Return a number with four digits, the very small and very large ones with a power of ten."""
    if value and not 1e-3 <= abs(value) < 1e7:
        return f"{value:.2e}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def compact(value: float) -> str:
    """Return a number with k, M, G or T for its thousands."""
    for size, name in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g}{name}"
    return f"{value:.3g}"


def _short_time(seconds: float) -> str:
    for size, name in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds / size:.3g} {name}"
    return f"{seconds:.3g} s"
