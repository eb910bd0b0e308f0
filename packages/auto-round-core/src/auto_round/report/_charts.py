"""The drawings of the page: losses of the blocks, SQNR of the layers, memory."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from statistics import median

from auto_round._text import count, duration, megabytes, printable, recovered
from auto_round.quantization._report import BlockReport, QuantizationReport
from auto_round.report._entries import Entry, by_kind, colour_classes, outside_width
from auto_round.report._plot import (
    UNITS,
    Axis,
    around,
    dots,
    drawable,
    framed,
    line,
    logarithmic,
    sizes,
    times,
)
from auto_round.report._tables import decibels

_MOST_SAMPLES = 600
_WIDE_RANGE = 20
_MANY_BLOCKS = 48
_NEAR_LIMIT = 1.6
_WIDEST_BAR = 80
_ROOM_FOR_TEXT = 120


def block_axis(blocks: int, *, outside: bool = False) -> Axis:
    """Return the axis under what is drawn by block, with a place for what is outside the blocks."""
    step = next(f * 10**p for p in range(12) for f in (1, 2, 5) if f * 10**p * 10 >= blocks)
    ticks = [(float(number), str(number)) for number in range(0, blocks, step)]
    end = max(blocks, 1) - 0.5
    if outside:
        end = blocks - 0.5 + outside_width(blocks)
        # The last number would stand too close to this word.
        ticks = [tick for tick in ticks if tick[0] < 0.93 * blocks - 1]
        ticks.append(((blocks - 0.5 + end) / 2, "outside"))
    return Axis(-0.5, end, tuple(ticks))


def loss_chart(blocks: Sequence[BlockReport]) -> str:
    """Return each block's loss rounded to nearest and as it is now, joined; nothing where none is known."""
    drawn = [
        (index, block.loss_before, block.loss_after)
        for index, block in enumerate(blocks)
        if drawable(block.loss_before) and drawable(block.loss_after)
    ]
    if not drawn:
        return ""
    values = [value for _, before, after in drawn for value in (before, after)]
    positive = [value for value in values if value > 0]
    wide = bool(positive) and max(positive) > _WIDE_RANGE * min(positive)
    y = logarithmic(positive) if wide else around(values, from_zero=True)
    x = block_axis(len(blocks))

    def joined(pairs: list[tuple[int, float, float]]) -> str:
        return "".join(
            f"M{x.place(index):.0f} {UNITS - y.place(before):.0f}V{UNITS - y.place(after):.0f}"
            for index, before, after in pairs
        )

    numbers = [index for index, _, _ in drawn]
    before_dots = dots((x.place(index), UNITS - y.place(before)) for index, before, _ in drawn)
    after_dots = dots((x.place(index), UNITS - y.place(after)) for index, _, after in drawn)
    body = (
        f'<path class="join" d="{joined([one for one in drawn if one[2] <= one[1]])}"/>'
        f'<path class="join worse" d="{joined([one for one in drawn if one[2] > one[1]])}"/>'
        f"{_marks('before', before_dots, 'blocks', numbers)}{_marks('after', after_dots, 'blocks', numbers)}"
    )
    label = f"Loss of {count(len(drawn), 'block')}, rounded to nearest and as it is now"
    return framed(body, x=x, y=y, label=label, style=_density(blocks), near_x=True)


def share_chart(blocks: Sequence[BlockReport]) -> str:
    """Return bars of what share of each block's loss was taken back; nothing where that is nothing."""
    shares = {
        index: share
        for index, block in enumerate(blocks)
        if (share := recovered(block.loss_before, block.loss_after)) is not None
    }
    if not any(shares.values()):
        return ""
    # One block that grew much worse must not make all others invisible.
    lowest = min(max(min(shares.values()), -1.0), 0.0)
    y = around([100 * lowest, 100 * min(max(*shares.values(), 0.05), 1.0)], from_zero=True)
    y = Axis(y.low, y.high, tuple((value, f"{text}%") for value, text in y.ticks))
    x = block_axis(len(blocks))
    half = min(0.36 * UNITS / (x.high - x.low), _WIDEST_BAR / 2)
    zero = UNITS - y.place(0.0)
    bars = {True: "", False: ""}
    for index, share in shares.items():
        left, top = x.place(index) - half, UNITS - y.place(100 * share)
        bars[share >= 0] += f"M{left:.1f} {zero:.0f}h{2 * half:.1f}V{top:.0f}h{-2 * half:.1f}z"
    tips = dots((x.place(index), UNITS - y.place(100 * share)) for index, share in shares.items())
    body = (
        f'<path class="bar" d="{bars[True]}"/><path class="bar worse" d="{bars[False]}"/>'
        f'<path class="grid" d="M0 {zero:.0f}h{UNITS}"/>{_marks("unseen", tips, "blocks", list(shares))}'
    )
    middle = median(shares.values())
    label = (
        f"Share of the loss that was taken back in {count(len(shares), 'block')}, {middle:.1%} in the median"
    )
    return framed(body, x=x, y=y, label=label, style="low-frame", near_x=True)


def sqnr_chart(entries: Sequence[Entry], blocks: int, *, outside: bool) -> str:
    """Return a dot a layer, by block and in the colour of its kind; those that stand out have a ring.

    A layer that was kept exactly is at the upper edge. The numbers of `data-rows` are those of `entries`.
    """
    finite = [entry.layer.sqnr_db for entry in entries if drawable(entry.layer.sqnr_db)]
    if not finite and not any(entry.layer.sqnr_db == math.inf for entry in entries):
        return ""
    x, y = block_axis(blocks, outside=outside), around(finite or [0.0])
    y = Axis(y.low, y.high, tuple((value, f"{text} dB") for value, text in y.ticks))
    number_of = {id(entry): number for number, entry in enumerate(entries)}

    def places(some: Sequence[Entry]) -> str:
        return dots((x.place(entry.place), UNITS - y.place(entry.layer.sqnr_db)) for entry in some)

    colours = colour_classes(entries)
    body = ""
    for kind, members in by_kind(entries).items():
        shown = [entry for entry in members if not math.isnan(entry.layer.sqnr_db)]
        body += _marks(colours[kind], places(shown), "layers", [number_of[id(entry)] for entry in shown])
    rings = places([entry for entry in entries if entry.stands_out])
    body = f'<path class="ring" d="{rings}"/><path class="ring-hole" d="{rings}"/>{body}'
    if outside:
        body = f'<path class="part" d="M{x.place(blocks - 0.5):.0f} 0V{UNITS}"/>{body}'
    span = f", from {decibels(min(finite))} to {decibels(max(finite))} dB" if finite else ""
    label = f"SQNR of {count(len(entries), 'layer')} by block{span}"
    many = "many" if blocks > _MANY_BLOCKS or len(entries) > 400 else ""
    return framed(body, x=x, y=y, label=label, style=f"tall {many}")


@dataclass(frozen=True, slots=True)
class Peak:
    """The most memory that is known of."""

    size_mb: float
    block: str
    """In which block, or what came after all blocks; empty where a sample says it."""
    time_s: float | None
    """When, if a sample says it."""


def peak_of(report: QuantizationReport) -> Peak | None:
    """Return the largest of all samples and of the peaks of blocks and training, which lie between."""
    samples = _samples(report)
    peaks = [(block.peak_mb, block.name) for block in report.blocks]
    if report.end_to_end is not None:
        peaks.append((report.end_to_end.peak_mb, "the training of all scales"))
    top = max(samples, key=lambda sample: sample[1], default=None)
    known = [(size_mb, name) for size_mb, name in peaks if drawable(size_mb) and size_mb > 0]
    peak = max(known, key=lambda one: one[0], default=None)
    if peak is not None and (top is None or peak[0] > top[1]):
        return Peak(*peak, None)
    return None if top is None else Peak(top[1], "", top[0])


def memory_chart(report: QuantizationReport, limit_mb: float | None) -> str:
    """Return resident memory over time with its peak, and the limit if that is near."""
    samples, peak = _samples(report), peak_of(report)
    if not samples or peak is None:
        return ""
    span_s = max(samples[-1][0], 1e-3)
    if limit_mb is not None and limit_mb > _NEAR_LIMIT * peak.size_mb:
        limit_mb = None
    top_mb = 1.12 * max(peak.size_mb, limit_mb or 0.0, 1.0)
    x, y = Axis(0.0, span_s, times(span_s)), Axis(0.0, top_mb, sizes(top_mb))
    kept = _thinned(samples)
    points = [(x.place(time_s), UNITS - y.place(size_mb)) for time_s, size_mb in kept]
    tips = "|".join(f"{megabytes(size_mb)} at {duration(time_s)}" for time_s, size_mb in kept)
    at_peak = UNITS - y.place(peak.size_mb)
    body = (
        f'<path class="area" d="{line([(points[0][0], UNITS), *points, (points[-1][0], UNITS)])}z"/>'
        f'<path class="peak" d="M0 {at_peak:.0f}h{UNITS}"/>'
        f'<path class="line" d="{line(points)}"/>'
        f'<path class="dots unseen" d="{dots(points)}" data-tips="{tips}"/>'
    )
    if peak.time_s is not None:
        body += f'<path class="dots top" d="{dots([(x.place(peak.time_s), at_peak)])}"/>'
    where = f"in {printable(peak.block, 60)}" if peak.block else f"at {duration(peak.time_s or 0.0)}"
    said = f"peak {megabytes(peak.size_mb)}, {where}"
    # Below its line, where the limit's line is just above.
    distance = -1 if limit_mb is None else y.place(limit_mb) - y.place(peak.size_mb)
    under = " under" if 0 <= distance < _ROOM_FOR_TEXT else ""
    above = f'<span class="over{under}" style="top:{at_peak / 10:.1f}%">{escape(said)}</span>'
    if limit_mb is not None:
        at_limit = UNITS - y.place(limit_mb)
        body += f'<path class="limit" d="M0 {at_limit:.0f}h{UNITS}"/>'
        said_limit = f"limit {megabytes(limit_mb)}"
        above += f'<span class="over limit-name" style="top:{at_limit / 10:.1f}%">{said_limit}</span>'
    label = f"Resident memory over {duration(span_s)}, {said}"
    return framed(body, x=x, y=y, label=label, above=above, near_x=True)


def _marks(style: str, path: str, table: str, numbers: Sequence[int]) -> str:
    rows = " ".join(map(str, numbers))
    return f'<path class="dots {style}" d="{path}" data-table="{table}" data-rows="{rows}"/>'


def _density(blocks: Sequence[BlockReport]) -> str:
    return "many" if len(blocks) > _MANY_BLOCKS else ""


def _samples(report: QuantizationReport) -> list[tuple[float, float]]:
    return sorted(sample for sample in report.memory if all(map(drawable, sample)))


def _thinned(samples: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return the lowest and the highest of each of so many stretches that a screen shows no difference."""
    length = -(-2 * len(samples) // _MOST_SAMPLES)
    if length <= 2:
        return samples
    kept: list[tuple[float, float]] = []
    for start in range(0, len(samples), length):
        stretch = samples[start : start + length]
        ends = {min(stretch, key=lambda one: one[1]), max(stretch, key=lambda one: one[1])}
        kept += sorted(ends)
    return kept
