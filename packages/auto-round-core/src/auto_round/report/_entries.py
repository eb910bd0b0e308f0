"""The layers of a report as a page shows them: of what kind, where, which stand out, and which have room."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Hashable, Iterable
from dataclasses import dataclass
from statistics import quantiles

from auto_round._text import printable
from auto_round.quantization._report import LayerReport, QuantizationReport

COLOURS = 8
_FEWEST_PEERS = 5
_LEAST_DISTANCE_DB = 1.0


@dataclass(frozen=True, slots=True)
class Entry:
    """A layer in its place."""

    layer: LayerReport
    place: float
    """Along the axis of blocks: from i - 0.5 to i + 0.5 for block i; what is outside comes last."""
    kind: str
    """Its name within its block, numbers replaced by `*`."""
    stands_out: bool
    """Its SQNR is far below that of other layers of its kind with the same settings."""


def entries_of(report: QuantizationReport) -> list[Entry]:
    """Return all layers, those of the blocks first."""
    found = [
        (layer, index - 0.4 + 0.8 * (number + 0.5) / len(block.layers), _kind(layer.name, block.name))
        for index, block in enumerate(report.blocks)
        for number, layer in enumerate(block.layers)
    ]
    blocks, room = len(report.blocks), outside_width(len(report.blocks))
    found += [
        (layer, blocks - 0.5 + room * (number + 0.5) / len(report.outside), _kind(layer.name, ""))
        for number, layer in enumerate(report.outside)
    ]
    fences = _fences([(_peers_of(layer, kind), layer.sqnr_db) for layer, _, kind in found])
    return [
        Entry(
            layer=layer,
            place=place,
            kind=kind,
            stands_out=layer.sqnr_db < fences.get(_peers_of(layer, kind), -math.inf),
        )
        for layer, place, kind in found
    ]


def outside_width(blocks: int) -> float:
    """Return how much of the axis of blocks is for layers outside them, in blocks: a place to be seen."""
    return max(1.0, blocks / 16)


def by_kind(entries: Iterable[Entry]) -> dict[str, list[Entry]]:
    """Return the layers of each kind, kinds in the order in which they first appear."""
    kinds: dict[str, list[Entry]] = {}
    for entry in entries:
        kinds.setdefault(entry.kind, []).append(entry)
    return kinds


def colour_classes(entries: Iterable[Entry]) -> dict[str, str]:
    """Return the class of each kind's colour; the most frequent have their own, all others share one."""
    counts = Counter(entry.kind for entry in entries)
    coloured = {kind for kind, _ in counts.most_common(COLOURS)}
    numbers = itertools.count()
    return {kind: f"c{next(numbers)}" if kind in coloured else "cx" for kind in counts}


def described(layer: LayerReport) -> str:
    """Return a layer's settings in short: `int4, groups of 128, symmetric`."""
    settings = layer.settings
    bits = "" if settings.weight_dtype[-1:].isdigit() else str(settings.bits)
    groups = "whole rows" if settings.group_size == -1 else f"groups of {settings.group_size}"
    return f"{settings.weight_dtype}{bits}, {groups}, {'symmetric' if settings.symmetric else 'asymmetric'}"


def _peers_of(layer: LayerReport, kind: str) -> Hashable:
    settings = layer.settings
    return kind, settings.weight_dtype, settings.bits, settings.group_size, settings.symmetric


def _fences(ratios: Iterable[tuple[Hashable, float]]) -> dict[Hashable, float]:
    """Return for each group of peers the SQNR below which one of them stands out.

    That is Tukey's fence, one and a half times the middle half's width below it ("Exploratory Data Analysis",
    1977), and at least 1 dB below it, so that layers that are all alike do not stand out by nothing.
    """
    groups: dict[Hashable, list[float]] = {}
    for peers, sqnr_db in ratios:
        if math.isfinite(sqnr_db):
            groups.setdefault(peers, []).append(sqnr_db)
    fences: dict[Hashable, float] = {}
    for peers, values in groups.items():
        if len(values) >= _FEWEST_PEERS:
            first, _, third = quantiles(values, n=4, method="inclusive")
            fences[peers] = first - max(1.5 * (third - first), _LEAST_DISTANCE_DB)
    return fences


def _kind(name: str, block: str) -> str:
    within = name.removeprefix(f"{block}.") if block else name
    return printable(".".join("*" if part.isdigit() else part for part in within.split(".")), 60)
