"""The whole page: what was done in a few words and figures, drawings, tables, in one file without links."""

from __future__ import annotations

import base64
import hashlib
import math
import os
from collections.abc import Mapping, Sequence
from html import escape
from importlib import resources
from pathlib import Path
from statistics import median
from string import Template
from typing import Any, cast

from auto_round._files import write_atomically
from auto_round._text import count, duration, figure, megabytes, printable, recovered
from auto_round.quantization._report import QuantizationReport
from auto_round.report._charts import Peak, loss_chart, memory_chart, peak_of, share_chart, sqnr_chart
from auto_round.report._entries import Entry, described, entries_of
from auto_round.report._plot import drawable
from auto_round.report._steps import step_charts
from auto_round.report._tables import block_table, decibels, fitting, kind_table, setting_tables, with_room
from auto_round.report._together import together_section, together_sentence

_NOTE_BYTES, _LONGEST_NOTE = 60_000, 1000
_MOST_NAMED = 8


def report_html(report: QuantizationReport) -> str:
    """Return a quantisation as one HTML page.

    It loads nothing, opens from a file, follows the reader's light or dark theme, and can be read without a
    script, which only sorts tables and tells what is pointed at. For up to a thousand blocks it stays below
    3 MB: of more layers than fit (about 16,000) those with the highest SQNR are left out, and the page says
    how many.
    """
    script = _asset("page.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    entries = entries_of(report)
    shown, layers = with_room(entries)
    limit_mb, peak = _limit_of(report.configuration), peak_of(report)
    sections = [
        _section("Notes", _notes(report.notes)),
        _section("Loss of each block", _losses(report)),
        _section("Each layer's signal to quantisation noise", _ratios(report, entries, shown)),
        _section("Losses while training", _steps(report)),
        _section("Training of all scales together", together_section(report.end_to_end)),
        _section("Memory", _memory(report, peak, limit_mb)),
        _section("Blocks", block_table(report.blocks) if report.blocks else ""),
        _section("Layers", layers if entries else ""),
        _section("Settings", f'<div class="settings">{setting_tables(report.configuration)}</div>'),
    ]
    page = Template(_asset("page.html")).substitute(
        script_hash=f"sha256-{digest}",
        title=escape(f"Quantisation of {printable(report.model) or 'a model'}"),
        style=_asset("page.css"),
        verdict=escape(" ".join(_verdict(report, peak, limit_mb))),
        figures=_figures(report, peak),
        sections="".join(sections),
        script=script,
    )
    # Half of a surrogate pair, as a damaged name may hold one, cannot be encoded.
    return page.encode("utf-8", "replace").decode("utf-8")


def save_html(report: QuantizationReport, path: str | os.PathLike[str]) -> None:
    """Write `report_html` to a file, whole or not at all.

    Raises:
        OSError: It cannot be written there.
    """
    page = report_html(report)
    write_atomically(Path(path), lambda temporary: _write(temporary, page))


def _write(path: Path, page: str) -> None:
    path.write_text(page, encoding="utf-8", newline="\n")


def _asset(name: str) -> str:
    return resources.files("auto_round.report").joinpath(name).read_text(encoding="utf-8")


def _section(title: str, body: str) -> str:
    return f"<section><h2>{title}</h2>{body}</section>" if body else ""


def _verdict(report: QuantizationReport, peak: Peak | None, limit_mb: float | None) -> list[str]:
    layers = report.layers
    if not layers:
        return ["No layer was quantised."]
    weights = count(sum(layer.weights for layer in layers), "weight")
    sentences = [
        f"{count(len(layers), 'layer')} of together {weights}, in {count(len(report.blocks), 'block')}"
        + (f" and {len(report.outside):,} outside them" if report.outside else "")
        + f", were quantised to {figure(report.average_bits, 4)} bits a weight, scales included."
    ]
    settings = list(dict.fromkeys(described(layer) for layer in layers))
    more = f", and {count(len(settings) - 1, 'other kind')} of settings" if len(settings) > 1 else ""
    sentences.append(f"Settings: {settings[0]}{more}{_method(report)}.")
    sentences += _loss_sentences(report) + together_sentence(report.end_to_end)
    if peak is not None:
        share = f", {peak.size_mb / limit_mb:.0%} of its limit of {megabytes(limit_mb)}" if limit_mb else ""
        sentences.append(f"The process held at most {megabytes(peak.size_mb)}{share}.")
    return sentences


def _method(report: QuantizationReport) -> str:
    area = report.configuration.get("quantization")
    if not isinstance(area, Mapping):
        return ""
    settings = cast("Mapping[str, Any]", area)
    parts: list[str] = []
    if isinstance(settings.get("quality"), str):
        parts.append(f"quality {printable(settings['quality'], 40)}")
    if isinstance(settings.get("iters"), int) and any(block.step_losses for block in report.blocks):
        parts.append(count(settings["iters"], "step") + " a block")
    samples, tokens = settings.get("nsamples"), settings.get("seqlen")
    if isinstance(samples, int) and isinstance(tokens, int) and _was_calibrated(report):
        parts.append(f"{count(samples, 'sample')} of {count(tokens, 'token')}")
    return "; " + ", ".join(parts) if parts else ""


def _was_calibrated(report: QuantizationReport) -> bool:
    return any(block.loss_before is not None or block.loss_after is not None for block in report.blocks)


def _shares(report: QuantizationReport) -> list[float]:
    shares = (recovered(block.loss_before, block.loss_after) for block in report.blocks)
    return [share for share in shares if share is not None]


def _loss_sentences(report: QuantizationReport) -> list[str]:
    if not _was_calibrated(report):
        return ["No loss was measured, because no calibration went through the blocks."]
    shares = _shares(report)
    if not any(shares):
        return ["The losses are those of rounding to nearest." if shares else "No block has a finite loss."]
    spread = f" ({min(shares):.1%} to {max(shares):.1%})" if len(shares) > 1 else ""
    block = "the median block" if len(shares) > 1 else "the block"
    middle, worse = f"{median(shares):.1%}", sum(share < 0 for share in shares)
    grew = [f"In {count(worse, 'block')} the loss grew."] if worse else []
    return [f"Of what rounding to nearest loses, {middle} was taken back in {block}{spread}.", *grew]


def _figures(report: QuantizationReport, peak: Peak | None) -> str:
    shares = _shares(report)
    ratios = [layer.sqnr_db for layer in report.layers if math.isfinite(layer.sqnr_db)]
    pairs = [
        ("Bits a weight", figure(report.average_bits, 4) if report.layers else "-"),
        ("Time in blocks", duration(report.wall_s)),
        ("Peak memory", "-" if peak is None else megabytes(peak.size_mb)),
        ("Loss taken back, median", f"{median(shares):.1%}" if any(shares) else "-"),
        ("Lowest SQNR", f"{min(ratios):.2f} dB" if ratios else "-"),
    ]
    return "".join(f"<div><dt>{name}</dt><dd>{value}</dd></div>" for name, value in pairs)


def _notes(notes: Sequence[str]) -> str:
    shown = fitting([f"<li>{escape(printable(note, _LONGEST_NOTE))}</li>" for note in notes], _NOTE_BYTES)
    items, more = "".join(shown), len(notes) - len(shown)
    items += f"<li>{count(more, 'more note')} not shown.</li>" if more else ""
    return f"<ul>{items}</ul>" if items else ""


def _losses(report: QuantizationReport) -> str:
    drawing, shares = loss_chart(report.blocks), share_chart(report.blocks)
    pairs = [(block.loss_before, block.loss_after) for block in report.blocks]
    odd = sum(pair != (None, None) and not all(map(drawable, pair)) for pair in pairs)
    if not drawing and not odd:
        return ""
    text = (
        "Mean squared error of each block's output over all calibration samples, by block in order. "
        "The inputs are those that the quantised model would give it, unless the settings say otherwise."
    )
    text += f" {count(odd, 'block')} without a finite loss not drawn." if odd else ""
    keys = '<p class="keys"><span class="key before">rounded to nearest</span>'
    keys += '<span class="key after">as it is now</span></p>'
    below = f"<h3>Share of the loss that was taken back</h3>{shares}" if shares else ""
    return f'<p class="soft">{text}</p>' + (keys + drawing if drawing else "") + below


def _ratios(report: QuantizationReport, entries: Sequence[Entry], shown: Sequence[Entry]) -> str:
    drawing = sqnr_chart(shown, len(report.blocks), outside=bool(report.outside))
    if not drawing:
        return ""
    odd = sum(math.isnan(entry.layer.sqnr_db) for entry in entries)
    exact = sum(entry.layer.sqnr_db == math.inf for entry in entries)
    text = (
        "10 log10 of the weights' sum of squares over that of their errors: higher is better, and 6 dB are "
        "about one bit. One dot a layer, by block in order."
    )
    more = len(entries) - len(shown)
    text += f" The {count(more, 'layer')} with the highest SQNR not drawn." if more else ""
    text += f" {count(exact, 'layer')} kept exactly, at the upper edge." if exact else ""
    text += f" {count(odd, 'layer')} whose SQNR is not a number not drawn." if odd else ""
    return f'<p class="soft">{text}</p>{drawing}{_standing_out(entries)}{kind_table(entries)}'


def _standing_out(entries: Sequence[Entry]) -> str:
    low = sorted((entry for entry in entries if entry.stands_out), key=lambda entry: entry.layer.sqnr_db)
    if not low:
        return '<p class="soft">No layer is far below others of its kind.</p>'
    named = ", ".join(
        f"<b>{escape(printable(entry.layer.name, 120))}</b> ({decibels(entry.layer.sqnr_db)} dB)"
        for entry in low[:_MOST_NAMED]
    )
    more = f" and {len(low) - _MOST_NAMED:,} more" if len(low) > _MOST_NAMED else ""
    are = "is far below others of its kind" if len(low) == 1 else "are far below others of their kind"
    return (
        f'<p class="names">{count(len(low), "layer")}, ringed, {are}: {named}{more}. More bits there, by '
        "<code>layer_config</code>, may be worth their size.</p>"
    )


def _steps(report: QuantizationReport) -> str:
    drawings, left_out = step_charts(report.blocks)
    if not drawings:
        return ""
    text = (
        "The loss of each step's batch as a share of what rounding to nearest loses on that batch: thin "
        "lines join single steps, or the extremes of several, bold ones their means. The dot is the step "
        "whose parameters were kept; the dotted line is rounding to nearest. All blocks share the axis."
    )
    text += f" {count(left_out, 'more block')} not drawn." if left_out else ""
    return f'<p class="soft">{text}</p><div class="steps">{drawings}</div>'


def _memory(report: QuantizationReport, peak: Peak | None, limit_mb: float | None) -> str:
    drawing = memory_chart(report, limit_mb)
    if peak is None:
        return ""
    text = "Resident set of the process, its libraries included, in MB of 2**20 bytes."
    if peak.block:
        size, name = megabytes(peak.size_mb), printable(peak.block, 120)
        text += f" The peak of {size} was in {name}, between two samples of the curve."
    text += f" The limit is {megabytes(limit_mb)}." if limit_mb else " No limit was set."
    return f'<p class="soft">{escape(text)}</p>{drawing}'


def _limit_of(configuration: Mapping[str, Any]) -> float | None:
    area = configuration.get("memory")
    limit: object = cast("Mapping[str, Any]", area).get("max_ram_mb") if isinstance(area, Mapping) else None
    if isinstance(limit, int | float) and not isinstance(limit, bool) and math.isfinite(limit) and limit > 0:
        return float(limit)
    return None
