"""The tables of the page: blocks, kinds of layers, layers, settings."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from statistics import median
from typing import Any, cast

from auto_round._text import count, figure, printable, recovered
from auto_round.quantization._report import BlockReport
from auto_round.report._entries import Entry, by_kind, colour_classes, described

_LAYER_BYTES, _BLOCK_BYTES, _SETTING_BYTES = 1_900_000, 150_000, 100_000
_MOST_KINDS = 60
_LONGEST_NAME, _LONGEST_VALUE = 160, 600
_SHOWN_LEFT_OUT = "The report as JSON has them all."


def block_table(blocks: Sequence[BlockReport]) -> str:
    """Return a table with a row a block, in order."""
    heads = (
        "Block",
        "Layers",
        "Loss before",
        "Loss after",
        "Taken back",
        "Step kept",
        "Time, s",
        "Peak, MB",
    )
    every: list[str] = []
    for block in blocks:
        share = recovered(block.loss_before, block.loss_after)
        cells = (
            f"{len(block.layers):,}",
            figure(block.loss_before, 4),
            figure(block.loss_after, 4),
            "-" if share is None else f"{share:.1%}",
            "-" if block.best_step is None else f"{block.best_step:,}",
            f"{block.wall_s:.1f}",
            f"{block.peak_mb:,.0f}",
        )
        every.append(_row(block.name, cells))
    rows = fitting(every, _BLOCK_BYTES)
    more = len(blocks) - len(rows)
    note = f"{count(more, 'more block')} not shown. {_SHOWN_LEFT_OUT}" if more else ""
    return _table("blocks", heads, rows, note)


def with_room(entries: Sequence[Entry]) -> tuple[list[Entry], str]:
    """Return the layers for which a page has room, in order, and the table of them.

    Where there are too many, those with the highest SQNR are left out.
    """
    rows = [_layer_row(entry) for entry in entries]
    worst_first = sorted(range(len(rows)), key=lambda number: _rank(entries[number].layer.sqnr_db))
    kept = sorted(worst_first[: len(fitting([rows[number] for number in worst_first], _LAYER_BYTES))])
    more = len(rows) - len(kept)
    note = (
        f"{count(more, 'layer')} with the highest SQNR are neither drawn nor in this table. {_SHOWN_LEFT_OUT}"
        if more
        else ""
    )
    heads = ("Layer", "SQNR, dB", "Bits", "Group", "Type", "Zero point", "Bits stored", "Weights", "Loss")
    return [entries[number] for number in kept], _table("layers", heads, [rows[n] for n in kept], note)


def kind_table(entries: Sequence[Entry]) -> str:
    """Return a table with a row a kind of layer, which is the legend of the chart as well."""
    colours = colour_classes(entries)
    heads = ("Kind of layer", "Layers", "SQNR, lowest", "Median", "Highest", "Bits stored", "Settings")
    rows: list[str] = []
    kinds = by_kind(entries)
    for kind, members in list(kinds.items())[:_MOST_KINDS]:
        ratios = [entry.layer.sqnr_db for entry in members if not math.isnan(entry.layer.sqnr_db)]
        weights = sum(entry.layer.weights for entry in members)
        stored = sum(entry.layer.weights * entry.layer.stored_bits for entry in members) / max(weights, 1)
        settings = list(dict.fromkeys(described(entry.layer) for entry in members))
        other = f" and {count(len(settings) - 1, 'other')}" if len(settings) > 1 else ""
        low, middle, high = (min(ratios), median(ratios), max(ratios)) if ratios else (None, None, None)
        cells = (
            f"{len(members):,}",
            *("-" if value is None else decibels(value) for value in (low, middle, high)),
            f"{stored:.2f}",
            settings[0] + other,
        )
        rows.append(_row(kind, cells, style=f"key {colours[kind]}"))
    more = len(kinds) - len(rows)
    return _table("kinds", heads, rows, f"{count(more, 'more kind')} not shown." if more else "")


def setting_tables(configuration: Mapping[str, Any]) -> str:
    """Return a table of the plain settings, and one of each area."""
    plain = {name: value for name, value in configuration.items() if not isinstance(value, Mapping)}
    areas: dict[str, Mapping[str, Any]] = {"general": plain} if plain else {}
    for name, value in configuration.items():
        if isinstance(value, Mapping):
            areas[str(name)] = cast("Mapping[str, Any]", value)
    tables = [_area(name, area) for name, area in areas.items()]
    shown = fitting(tables, _SETTING_BYTES)
    more = len(tables) - len(shown)
    note = f'<p class="soft">{count(more, "long table")} not shown. {_SHOWN_LEFT_OUT}</p>' if more else ""
    return "".join(shown) + note


def fitting(parts: Sequence[str], room: int) -> list[str]:
    """Return the first parts, as many as fit into so many bytes together."""
    kept: list[str] = []
    for part in parts:
        room -= len(part.encode("utf-8", "replace"))
        if room < 0:
            break
        kept.append(part)
    return kept


def decibels(value: float) -> str:
    """Return an SQNR; infinite is what was kept exactly."""
    return "exact" if value == math.inf else "NaN" if math.isnan(value) else f"{value:.2f}"


def _area(name: str, area: Mapping[str, Any]) -> str:
    rows = "".join(
        f'<tr><th scope="row">{escape(printable(str(key), _LONGEST_NAME))}</th>'
        f"<td>{escape(printable(_plain(value), _LONGEST_VALUE))}</td></tr>"
        for key, value in area.items()
    )
    title = escape(printable(name, 60).capitalize())
    return f"<table><caption>{title}</caption><tbody>{rows}</tbody></table>"


def _plain(value: object) -> str:
    if isinstance(value, str):
        return value
    if value is None:
        return "not set"

    def known(held: object) -> object:
        # What a configuration holds may be a mapping that is no dict, which JSON does not know.
        return dict(cast("Mapping[str, Any]", held)) if isinstance(held, Mapping) else str(held)

    return json.dumps(value, default=known)


def _layer_row(entry: Entry) -> str:
    layer = entry.layer
    settings = layer.settings
    cells = (
        decibels(layer.sqnr_db),
        str(settings.bits),
        "row" if settings.group_size == -1 else str(settings.group_size),
        settings.weight_dtype,
        "no" if settings.symmetric else "yes",
        f"{layer.stored_bits:.3f}",
        f"{layer.weights:,}",
        figure(layer.loss, 3),
    )
    return _row(layer.name, cells, style="low" if entry.stands_out else "")


def _rank(sqnr_db: float) -> float:
    return -math.inf if math.isnan(sqnr_db) else sqnr_db


def _row(name: str, cells: Iterable[str], style: str = "") -> str:
    # Closing tags of cells may be left out in HTML; a page of many thousand rows is a quarter smaller so.
    attribute = f' class="{style}"' if style else ""
    body = "".join(f"<td>{escape(cell)}" for cell in cells)
    return f'<tr{attribute}><th scope="row">{escape(printable(name, _LONGEST_NAME))}{body}\n'


def _table(name: str, heads: Sequence[str], rows: Sequence[str], note: str) -> str:
    head = "".join(f'<th scope="col">{escape(text)}</th>' for text in heads)
    below = f'<p class="soft">{escape(note)}</p>' if note else ""
    return (
        f'<div class="scroll" tabindex="0"><table id="{name}" class="sortable"><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>{below}"
    )
