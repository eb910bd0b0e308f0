"""The timeline as an SVG drawing that needs no script, and as data for the script that redraws it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise
from typing import Any

from av_memory.recording import Recording, ScopeRecord
from av_memory.report._axis import memory_ticks, time_ticks, top_of
from av_memory.report._curve import Curve, reduce_curve
from av_memory.report._format import format_mb, format_s
from av_memory.report._lanes import Lanes, lay_out
from av_memory.report._summary import peak_of, series_label

_WIDTH, _LEFT, _RIGHT, _TOP, _HEIGHT, _AXIS, _ROW = 960, 68, 14, 10, 260, 26, 20
_STATIC_COLUMNS = 440
_MOST_POINTS_A_CURVE, _MOST_POINTS = 40_000, 80_000
_MOST_ROWS, _MOST_SCOPES, _MOST_CURVES = 40, 12_000, 12
_FILLS = 9
"""Colours for scopes in the style sheet."""
_LIMITS = {"limit_mb": "limit", "cgroup_limit_mb": "cgroup", "machine_total_mb": "machine"}
_S_PER_TICK = 1e-5
_MB_PER_STEP = 0.01


@dataclass(frozen=True, slots=True)
class Timeline:
    """What is drawn."""

    curves: list[tuple[str, str, Curve]]
    """Name, CSS class and points of each curve."""
    lanes: Lanes
    limits: list[tuple[str, float]]
    names: dict[str, int]
    """Scope names in order of first appearance; the number picks the colour."""
    span_s: float
    left_out_curves: int


def timeline_of(recording: Recording) -> Timeline:
    """Choose and reduce what is drawn: the main curves first, then the largest processes."""
    series = [one for one in recording.series if one.times_s]
    known = {"cpu": 0, "tree rss": 1, "tree pss": 2}
    series.sort(
        key=lambda one: (known.get(one.name, 3 if one.name.startswith("cuda:") else 4), -peak_of(one)[1])
    )
    shown = series[:_MOST_CURVES]
    points = min(_MOST_POINTS_A_CURVE, _MOST_POINTS // max(len(shown), 1))
    others = 0
    curves: list[tuple[str, str, Curve]] = []
    for one in shown:
        slot = known.get(one.name)
        if slot is None:
            slot, others = 3 + others % 5, others + 1
        kind = "gpu" if one.name.startswith("cuda:") else one.name.replace(" ", "-")
        kind = kind if one.name in known or kind == "gpu" else "one"
        curves.append(
            (one.name, f"curve c{slot} {kind}", reduce_curve(one.times_s, one.values_mb, points // 4))
        )
    lanes = lay_out(recording.scopes, most_rows=_MOST_ROWS, most_scopes=_MOST_SCOPES)
    names: dict[str, int] = {}
    for scope in sorted(recording.scopes, key=lambda scope: scope.start_s):
        names.setdefault(scope.name, len(names))
    ends = [one.times_s[-1] for one in series] + [scope.start_s + scope.wall_s for scope in recording.scopes]
    limits = [
        (label, recording.limits[key]) for key, label in _LIMITS.items() if recording.limits.get(key, 0) > 0
    ]
    span_s = max([recording.wall_s, *ends, 1e-6])
    return Timeline(curves, lanes, limits, names, span_s, len(series) - len(shown))


def fill_class(number: int) -> str:
    """The CSS class with the colour of the scope name with this number."""
    return f"f{number % _FILLS}"


def legend_html(timeline: Timeline) -> str:
    """A button a curve, which the script lets switch the curve on and off."""
    return "".join(
        f'<button type="button" class="key" aria-pressed="true" data-series="{index}">'
        f'<svg width="22" height="10" aria-hidden="true"><path class="{style}" d="M1 5H21"/></svg>'
        f"{escape(series_label(name))}</button>"
        for index, (name, style, _) in enumerate(timeline.curves)
    )


def plot_svg(timeline: Timeline) -> str:
    """The whole timeline at a fixed width."""
    rows = len(timeline.lanes.threads)
    height = _TOP + _HEIGHT + _AXIS + rows * _ROW + 4
    peak_mb = max((max(curve.values_mb) for _, _, curve in timeline.curves), default=0.0)
    top_mb = top_of(peak_mb, [limit for _, limit in timeline.limits])
    bottom, right = _TOP + _HEIGHT, _WIDTH - _RIGHT

    def x(time_s: float) -> str:
        return f"{_LEFT + min(max(time_s / timeline.span_s, 0), 1) * (right - _LEFT):.1f}"

    def y(size_mb: float) -> str:
        return f"{bottom - size_mb / top_mb * _HEIGHT:.1f}"

    parts = [f'<svg viewBox="0 0 {_WIDTH} {height}" role="img" aria-label="Memory over time">']
    for value_mb, label in memory_ticks(top_mb):
        parts.append(f'<path class="grid" d="M{_LEFT} {y(value_mb)}H{right}"/>')
        parts.append(_text("tick", _LEFT - 8, float(y(value_mb)) + 4, label, "end"))
    for time_s, label in time_ticks(0, timeline.span_s):
        parts.append(f'<path class="grid" d="M{x(time_s)} {_TOP}V{bottom}"/>')
        parts.append(_text("tick", float(x(time_s)), bottom + 17, label, "middle"))
    for label, limit_mb in timeline.limits:
        if limit_mb <= top_mb:
            parts.append(f'<path class="limit" d="M{_LEFT} {y(limit_mb)}H{right}"/>')
            label = f"{label} {format_mb(limit_mb)}"
            parts.append(_text("limit-name", right, float(y(limit_mb)) - 4, label, "end"))
    for _, style, curve in reversed(timeline.curves):
        small = reduce_curve(curve.times_s, curve.values_mb, _STATIC_COLUMNS)
        gap_s = max(curve.gap_s, timeline.span_s / _STATIC_COLUMNS)
        parts.append(f'<path class="{style}" d="{_line(small, gap_s, x, y)}"/>')
    if not timeline.curves:
        parts.append(_text("empty", (_LEFT + right) / 2, _TOP + 120, "Nothing was sampled", "middle"))
    parts.append(_lanes_svg(timeline, bottom + _AXIS, x))
    return "".join([*parts, "</svg>"])


def _text(style: str, x: float, y: float, text: str, anchor: str = "start", title: str = "") -> str:
    title = f"<title>{escape(title)}</title>" if title else ""
    place = f'x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"'
    return f'<text class="{style}" {place}>{title}{escape(text)}</text>'


def _shorten(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"


def _line(curve: Curve, gap_s: float, x: Callable[[float], str], y: Callable[[float], str]) -> str:
    path: list[str] = []
    before = float("-inf")
    for time_s, value_mb in zip(curve.times_s, curve.values_mb, strict=True):
        joined = time_s - before <= gap_s
        # A point alone is drawn as a dot: a line of no length with round ends.
        path.append(f"L{x(time_s)} {y(value_mb)}" if joined else f"M{x(time_s)} {y(value_mb)}h0")
        before = time_s
    return "".join(path)


def _lanes_svg(timeline: Timeline, top: int, x: Callable[[float], str]) -> str:
    parts: list[str] = []
    before = None
    for row, thread in enumerate(timeline.lanes.threads):
        if thread != before:
            label_y = top + row * _ROW + 13
            parts.append(_text("tick thread", _LEFT - 8, label_y, _shorten(thread, 8), "end", thread))
        before = thread
    last = [float("-inf")] * len(timeline.lanes.threads)
    for scope, row in timeline.lanes.placed:
        left, right = float(x(scope.start_s)), float(x(scope.start_s + scope.wall_s))
        if right <= last[row] + 0.3:
            continue
        last[row] = right
        above = top + row * _ROW
        size = f'x="{left:.1f}" y="{above}" width="{max(right - left, 0.8):.1f}" height="{_ROW - 2}"'
        title = f"<title>{escape(_describe(scope))}</title>"
        parts.append(f'<g class="scope {fill_class(timeline.names[scope.name])}">{title}<rect {size}/>')
        room = int((right - left - 8) / 6.5)
        if room >= 3:
            parts.append(_text("", left + 4, above + 13, _shorten(scope.name, room)))
        parts.append("</g>")
    return "".join(parts)


def _describe(scope: ScopeRecord) -> str:
    return f"{scope.name}: {format_s(scope.wall_s)}, peak {format_mb(scope.cpu.peak_mb)}"


def plot_data(timeline: Timeline) -> dict[str, Any]:
    """The same for the script: whole numbers, each curve as differences, which are short."""
    scopes = timeline.lanes.placed
    errors = sorted({scope.error for scope, _ in scopes if scope.error is not None})
    number_of = {error: number for number, error in enumerate(errors, 1)}
    return {
        "span": timeline.span_s,
        "tick": _S_PER_TICK,
        "step": _MB_PER_STEP,
        "series": [
            {
                "label": series_label(name),
                "style": style,
                "gap": curve.gap_s,
                "t": _differences(curve.times_s, _S_PER_TICK),
                "v": _differences(curve.values_mb, _MB_PER_STEP),
            }
            for name, style, curve in timeline.curves
        ],
        "limits": [{"label": label, "mb": limit_mb} for label, limit_mb in timeline.limits],
        "threads": timeline.lanes.threads,
        "names": list(timeline.names),
        "errors": errors,
        "scopes": {
            "name": [timeline.names[scope.name] for scope, _ in scopes],
            "row": [row for _, row in scopes],
            "start": [round(scope.start_s * 1e6) for scope, _ in scopes],
            "wall": [round(scope.wall_s * 1e6) for scope, _ in scopes],
            "peak": [round(scope.cpu.peak_mb / _MB_PER_STEP) for scope, _ in scopes],
            "net": [round(scope.cpu.net_mb / _MB_PER_STEP) for scope, _ in scopes],
            "error": [0 if scope.error is None else number_of[scope.error] for scope, _ in scopes],
        },
    }


def _differences(values: Sequence[float], unit: float) -> list[int]:
    whole = [round(value / unit) for value in values]
    return whole[:1] + [b - a for a, b in pairwise(whole)]
