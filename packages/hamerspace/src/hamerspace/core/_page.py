"""The report as one HTML page that needs nothing from anywhere: a picture of all candidates, and tables."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from typing import Any

_STYLE = """
:root { color-scheme: light dark; --line: #8884; --dim: #777; --mark: #2a6fdb }
:root { --bad: #c0392b; --good: #2e8b57 }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem }
h1 { font-size: 1.5rem; overflow-wrap: anywhere } h2 { font-size: 1.15rem; margin-top: 2rem }
.scroll { overflow-x: auto } table { border-collapse: collapse; width: 100% }
th, td { text-align: left; vertical-align: top }
th, td { padding: .3rem .7rem .3rem 0; border-bottom: 1px solid var(--line) }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap }
.satisfied { color: var(--good) } .violated, .failed { color: var(--bad) }
.undecided, .skipped { color: var(--dim) }
tr.chosen td { font-weight: 600 } svg { width: 100%; height: auto; font: 12px system-ui, sans-serif }
svg text { fill: currentColor } .dim { color: var(--dim); font-size: .9rem }
"""
_WIDTH, _HEIGHT = 720, 340
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 24, 16, 44


def smaller(ratio: float) -> str:
    """Say by how much something shrank, of which `ratio` is gone."""
    return f"{ratio:.0%} smaller" if ratio >= 0 else f"{-ratio:.0%} larger"


def page(report: Mapping[str, Any]) -> str:
    """Return the page of a report, given as `CompressionReport.to_dict` gives it."""
    old, new = report["original_metrics"], report["optimized_metrics"]
    config = report["optimization_config"]
    name = f"{config['model']['name']}: {report['backend_used']}/{report['technique_used']}"
    summary = [
        [
            "Size",
            _n(old["size_mb"], "MB"),
            _n(new["size_mb"], "MB"),
            smaller(report["size_reduction_ratio"]),
        ],
        [
            "Latency, median",
            _n(old["latency_ms"], "ms"),
            _n(new["latency_ms"], "ms"),
            f"{report['latency_improvement_ratio']:.2f} times as fast",
        ],
        ["Latency, 90%", _n(old["latency_p90_ms"], "ms"), _n(new["latency_p90_ms"], "ms"), ""],
        ["CPU time a call", _n(old["cpu_ms"], "ms"), _n(new["cpu_ms"], "ms"), ""],
        ["Peak memory", _n(old["memory_mb"], "MB"), _n(new["memory_mb"], "MB"), ""],
        ["Accuracy", _n(old["accuracy"]), _n(new["accuracy"]), report["accuracy_basis"] or "not measured"],
    ]
    parts = [
        f"<h1>{_e(name)}</h1>",
        f"<p class=dim>Found in {report['execution_time_seconds']:.0f} s, measured on this machine's "
        f"{_e(new['hardware'])}; the original and each candidate ran in turn.</p>",
        _table(["", "original", "optimised", ""], summary, numbers=(1, 2)),
        "<h2>Constraints</h2>",
        _verdicts(report["verdicts"]),
        "<h2>Candidates</h2>",
        _plot(report),
        _candidates(report["candidates"]),
    ]
    if report["notes"]:
        parts += ["<h2>Notes</h2><ul>", *(f"<li>{_e(note)}</li>" for note in report["notes"]), "</ul>"]
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{_e(name)}</title><style>{_STYLE}</style></head><body>{''.join(parts)}</body></html>\n"
    )


def _e(text: object) -> str:
    return html.escape(str(text))


def _n(value: float | None, unit: str = "") -> str:
    if value is None or not math.isfinite(value):
        return ""
    return f"{value:.4g} {unit}".strip()


def _table(header: Sequence[str], rows: Sequence[Sequence[str]], *, numbers: Sequence[int]) -> str:
    kinds = ["n" if place in numbers else "" for place in range(len(header))]
    head = "".join(f'<th class="{kind}">{_e(cell)}</th>' for cell, kind in zip(header, kinds, strict=True))
    body = "".join(
        "<tr>"
        + "".join(f'<td class="{kind}">{_e(cell)}</td>' for cell, kind in zip(row, kinds, strict=True))
        + "</tr>"
        for row in rows
    )
    return f"<div class=scroll><table><tr>{head}</tr>{body}</table></div>"


def _verdicts(verdicts: Sequence[Mapping[str, Any]]) -> str:
    if not verdicts:
        return "<p>None were set.</p>"
    return "<ul>" + "".join(
        f'<li><span class="{_e(one["outcome"])}">{_e(one["outcome"])}</span>: {_e(one["constraint"])}, '
        f"{_e(one['reason'])}</li>"
        for one in verdicts
    ) + "</ul>"  # fmt: skip


def _candidates(candidates: Sequence[Mapping[str, Any]]) -> str:
    rows: list[str] = []
    for one in candidates:
        name, outcome = f"{one['backend']}/{one['technique']}", str(one["outcome"])
        metrics, fidelity, speed = one["metrics"], one["fidelity"], one["speedup"]
        cells = (
            [
                f"{speed['median']:.2f}x" if speed else "",
                _n(metrics["size_mb"], "MB"),
                _n(metrics["latency_ms"], "ms"),
                f"{fidelity['cosine']:.4f}" if fidelity else "",
                _n(metrics["accuracy"]),
            ]
            if metrics
            else [""] * 5
        )
        said = f"<br><span class=dim>{_e(one['reason'])}</span>" if one["reason"] else ""
        rows.append(
            f'<tr class="{_e(outcome)}"><td>{_e(name)}{said}</td><td class="{_e(outcome)}">{_e(outcome)}</td>'
            + "".join(f"<td class=n>{_e(cell)}</td>" for cell in cells)
            + "</tr>"
        )
    head = "<tr><th>candidate</th><th></th>" + "".join(
        f"<th class=n>{name}</th>" for name in ("speed", "size", "latency", "cosine", "accuracy")
    )
    return f"<div class=scroll><table>{head}</tr>{''.join(rows)}</table></div>"


def _plot(report: Mapping[str, Any]) -> str:
    """Size against speed of every proven candidate, and of the original."""
    points = [
        (
            one["metrics"]["size_mb"],
            one["speedup"]["median"],
            f"{one['backend']}/{one['technique']}",
            one["outcome"],
        )
        for one in report["candidates"]
        if one["metrics"] and one["speedup"]
    ]
    points.append((report["original_metrics"]["size_mb"], 1.0, "original", "original"))
    widest = max(point[0] for point in points) * 1.08 or 1.0
    tallest = max(point[1] for point in points) * 1.12

    def x(size: float) -> float:
        return _LEFT + size / widest * (_WIDTH - _LEFT - _RIGHT)

    def y(speed: float) -> float:
        return _HEIGHT - _BOTTOM - speed / tallest * (_HEIGHT - _TOP - _BOTTOM)

    marks = [
        f'<line x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y(value):.1f}" y2="{y(value):.1f}" '
        'stroke="var(--line)"/>'
        f'<text x="{_LEFT - 8}" y="{y(value) + 4:.1f}" text-anchor="end">{value:g}x</text>'
        for value in _ticks(tallest)
    ]
    marks += [
        f'<text x="{x(value):.1f}" y="{_HEIGHT - _BOTTOM + 18}" text-anchor="middle">{value:g}</text>'
        for value in _ticks(widest)
    ]
    marks.append(
        f'<text x="{(_LEFT + _WIDTH - _RIGHT) / 2}" y="{_HEIGHT - 6}" text-anchor="middle">size, MB</text>'
        f'<text x="14" y="{_TOP + 8}">speed</text>'
    )
    # Labels keep off the marks of others and off each other.
    taken = [(x(size) - 7, x(size) + 7, y(speed) + 4) for size, speed, _, _ in points]
    for size, speed, label, outcome in sorted(points, key=lambda point: -point[1]):
        colour = {"chosen": "var(--good)", "original": "var(--dim)"}.get(str(outcome), "var(--mark)")
        shown = f"{label}: {speed:.2f}x, {size:.3g} MB"
        marks.append(
            f'<circle cx="{x(size):.1f}" cy="{y(speed):.1f}" r="{6 if outcome == "chosen" else 4}" '
            f'fill="{colour}">'
            f"<title>{_e(shown)}</title></circle>"
        )
        if (spot := _room_for(label, x(size), y(speed), taken)) is not None:
            left, height, anchor = spot
            marks.append(f'<text x="{left:.1f}" y="{height:.1f}" text-anchor="{anchor}">{_e(label)}</text>')
    return (
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="Speed and size of every candidate">'
        f"{''.join(marks)}</svg>"
    )


def _ticks(top: float) -> list[float]:
    step = 10 ** math.floor(math.log10(top))
    step = next((step * part for part in (0.1, 0.2, 0.5, 1, 2) if top / (step * part) <= 6), step * 5)
    return [round(step * number, 10) for number in range(int(top / step) + 1)]


def _room_for(
    label: str, x: float, y: float, taken: list[tuple[float, float, float]]
) -> tuple[float, float, str] | None:
    """Return where a label meets no other, or None; hovering shows those that have no room."""
    width = 6.6 * len(label)
    for side, anchor in ((8, "start"), (-8, "end")):
        for shift in (4, -8, 16):
            left = x + side if anchor == "start" else x + side - width
            height = y + shift
            inside = left >= _LEFT and left + width <= _WIDTH and _TOP <= height <= _HEIGHT - _BOTTOM
            free = all(
                abs(height - other) > 12 or left + width < start or left > end for start, end, other in taken
            )
            if inside and free:
                taken.append((left, left + width, height))
                return x + side, height, anchor
    return None
