"""The whole page: a verdict, the timeline, tables, and how it was measured, in one file without links."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import shlex
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from html import escape
from importlib import resources
from string import Template

from av_memory.recording import Recording, write_atomically
from av_memory.report._curve import median_interval_s
from av_memory.report._format import format_mb, format_s
from av_memory.report._plot import Timeline, fill_class, legend_html, plot_data, plot_svg, timeline_of
from av_memory.report._summary import LIMIT_NAMES, series_label, summarise_scopes, verdict

_MOST_NAMES, _MOST_PROCESSES, _LONGEST_COMMAND = 300, 100, 400


def report_html(
    recording: Recording, *, title: str = "Memory", sections: Mapping[str, str] | None = None
) -> str:
    """One HTML page with the recording's timeline and tables.

    It loads nothing, opens from a file, follows the reader's light or dark theme, and can be read
    without a script. A long recording is reduced to what a screen can show: of each short stretch of
    time the smallest and largest samples are kept, so no peak is lost.

    Args:
        recording: what was measured.
        title: heading of the page.
        sections: more to show before the timeline, as heading and trusted HTML (an inline SVG, say).
            The page's policy keeps scripts in it from running and links in it from loading.
    """
    timeline = timeline_of(recording)
    script = _asset("page.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    data = json.dumps(plot_data(timeline), separators=(",", ":"), allow_nan=False)
    page = Template(_asset("page.html")).substitute(
        script_hash=f"sha256-{digest}",
        title=escape(title),
        style=_asset("page.css"),
        verdict=escape(" ".join(verdict(recording))),
        facts=_facts(recording),
        sections="".join(
            f"<section><h2>{escape(heading)}</h2>{body}</section>"
            for heading, body in (sections or {}).items()
        ),
        legend=legend_html(timeline),
        plot=plot_svg(timeline),
        plot_notes=_plot_notes(recording, timeline),
        tables=_scope_table(recording, timeline) + _process_table(recording),
        method=_method(recording),
        # A name such as "</script>" must not end the element.
        data=data.replace("<", "\\u003c"),
        script=script,
    )
    # A name from a file can hold half of a surrogate pair, which no encoding of a page can.
    return page.encode("utf-8", "replace").decode("utf-8")


def save_report(
    recording: Recording,
    path: str | os.PathLike[str],
    *,
    title: str = "Memory",
    sections: Mapping[str, str] | None = None,
) -> None:
    """Write :func:`report_html` to a file, whole or not at all. Raises ``OSError``."""
    write_atomically(path, report_html(recording, title=title, sections=sections))


def _asset(name: str) -> str:
    return resources.files("av_memory.report").joinpath(name).read_text(encoding="utf-8")


def _facts(recording: Recording) -> str:
    try:
        began = datetime.fromtimestamp(recording.created_unix_s, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
    except (OverflowError, OSError, ValueError):
        began = "an unknown time"
    facts = [f"Began {began}", f"lasted {format_s(recording.wall_s)}"]
    for key, name in LIMIT_NAMES.items():
        if recording.limits.get(key, 0) > 0:
            facts.append(f"{name} {format_mb(recording.limits[key])}")
    text = escape("; ".join(facts)) + "."
    if recording.command:
        command = shlex.join(recording.command)
        shown = command if len(command) <= _LONGEST_COMMAND else command[:_LONGEST_COMMAND] + " …"
        text += f" Command: <code>{escape(shown)}</code>"
    return text


def _plot_notes(recording: Recording, timeline: Timeline) -> str:
    notes = [
        "Drag to zoom in time, or hold Ctrl or Shift and turn the wheel; double-click to see everything.",
        "A name in the table below shows where that scope ran." if recording.scopes else "",
        "Dotted stretches were not sampled." if timeline.curves else "",
        f"{timeline.left_out_curves} smaller curves are not drawn." if timeline.left_out_curves else "",
        f"{timeline.lanes.left_out} passages are not drawn for want of room."
        if timeline.lanes.left_out
        else "",
    ]
    return " ".join(note for note in notes if note)


def _table(heads: Sequence[str], rows: Sequence[str]) -> str:
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in heads)
    body = f"<thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody>"
    return f'<div class="scroll"><table>{body}</table></div>'


def _share_cell(size_mb: float, most_mb: float) -> str:
    share = max(size_mb, 0) / most_mb if most_mb > 0 else 0
    return f'<td class="bar-cell" style="--share:{min(share, 1):.0%}">{format_mb(size_mb)}</td>'


def _scope_table(recording: Recording, timeline: Timeline) -> str:
    if not recording.scopes:
        return ""
    summaries = summarise_scopes(recording.scopes)
    gpus = sorted({index for summary in summaries for index in summary.gpu_peaks_mb})
    tree = any(summary.tree_peak_mb is not None for summary in summaries)
    failed = any(summary.errors for summary in summaries)
    heads = ["Scope", "Peak, max", "Peak, mean", "Net, mean", "Count", "Wall, total", "Wall, mean"]
    heads += [f"GPU {index} peak" for index in gpus] + (
        ["Tree peak (RSS)", "Tree peak (PSS)"] if tree else []
    )
    heads += ["CPU peak is", *(["Errors"] if failed else [])]
    rows: list[str] = []
    for summary in summaries[:_MOST_NAMES]:
        number = timeline.names[summary.name]
        optional = [summary.gpu_peaks_mb.get(index) for index in gpus]
        optional += [summary.tree_peak_mb, summary.tree_pss_peak_mb] if tree else []
        errors = ", ".join(f"{name} × {count}" for name, count in summary.errors.most_common(5))
        cells = [
            f'<td><button type="button" class="name {fill_class(number)}" aria-pressed="false" '
            f'data-name="{number}" title="{escape(summary.name)}">{escape(summary.name)}</button></td>',
            _share_cell(summary.peak_mb, summaries[0].peak_mb),
            f"<td>{format_mb(summary.peak_sum_mb / summary.count)}</td>",
            f"<td>{_signed_mb(summary.net_sum_mb / summary.count)}</td>",
            f"<td>{summary.count}</td>",
            f"<td>{format_s(summary.wall_s)}</td>",
            f"<td>{format_s(summary.wall_s / summary.count)}</td>",
            *(f"<td>{'–' if value is None else format_mb(value)}</td>" for value in optional),
            f"<td>{summary.exactness}</td>",
            *([f"<td>{escape(errors)}</td>"] if failed else []),
        ]
        rows.append(f"<tr>{''.join(cells)}</tr>")
    notes = ""
    if len(summaries) > _MOST_NAMES:
        notes += f"<p class='hint'>The {_MOST_NAMES} names with the largest peaks, of {len(summaries)}.</p>"
    if recording.dropped_scopes:
        notes += (
            f"<p class='hint'>{recording.dropped_scopes} older passages were not kept one by one and are "
            "not in this table.</p>"
        )
    return f'<section id="scopes"><h2>Scopes</h2>{_table(heads, rows)}{notes}</section>'


def _signed_mb(size_mb: float) -> str:
    text = format_mb(size_mb)
    return f"+{text}" if size_mb > 0 else text.replace("-", "−")


def _process_table(recording: Recording) -> str:
    if not recording.processes:
        return ""
    processes = sorted(recording.processes, key=lambda process: -process.peak_rss_mb)
    rows = [
        f"<tr><td>{escape(process.name)}</td><td>{process.pid}</td>"
        f"{_share_cell(process.peak_rss_mb, processes[0].peak_rss_mb)}</tr>"
        for process in processes[:_MOST_PROCESSES]
    ]
    left_out = len(processes) - len(rows)
    note = f"<p class='hint'>and {left_out} smaller ones.</p>" if left_out else ""
    table = _table(["Name", "PID", "Peak RSS"], rows)
    return f'<section id="processes"><h2>Processes</h2>{table}{note}</section>'


def _method(recording: Recording) -> str:
    items = [
        "MB is 2<sup>20</sup> bytes and GB 2<sup>30</sup> bytes. RSS is the memory that is resident in RAM, "
        "shared pages included; in the sum over a process tree a shared page counts once for each process. "
        "PSS divides each shared page among the processes that use it.",
        "The curves come from a sampler that reads every 5 ms unless told otherwise; PSS is read at most "
        "four times a second. A peak between two samples can be missed, so a sampled peak is a lower bound. "
        "On Linux the counter that is read can be off by some hundred kB, as each processor folds its share "
        "in only now and then.",
    ]
    if recording.scopes:
        items.append(
            "The process is sampled only while a scope is open. An <em>exact</em> peak is the kernel's own "
            "high-water mark, a <em>sampled</em> one the largest sample."
        )
    if any(series.name.startswith("cuda:") for series in recording.series):
        items.append(
            "GPU curves show what torch's allocator has given to tensors, not its cache or the driver's own."
        )
    counts = [
        f"{escape(series_label(series.name))} {len(series.times_s)}, "
        f"typically {format_s(median_interval_s(series.times_s))} apart"
        for series in recording.series
        if series_label(series.name) != series.name and len(series.times_s) > 1
    ]
    if counts:
        items.append(f"Samples kept: {'; '.join(counts)}.")
    return "".join(f"<li>{item}</li>" for item in items)
