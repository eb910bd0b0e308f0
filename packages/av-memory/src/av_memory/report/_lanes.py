"""Scopes laid out in rows: one block of rows a thread, one row a depth."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from av_memory.recording import ScopeRecord

_EPSILON_S = 1e-9


@dataclass(frozen=True, slots=True)
class Lanes:
    """Where each scope is drawn."""

    threads: list[str]
    """For each row the thread it belongs to."""
    placed: list[tuple[ScopeRecord, int]]
    """Scopes in order of their start, with their row."""
    left_out: int
    """Scopes for which there was no room."""


def lay_out(scopes: Sequence[ScopeRecord], *, most_rows: int, most_scopes: int) -> Lanes:
    """Give each scope a row in which nothing else is at that time.

    Tasks of one event loop share a thread and a depth and may overlap; such a scope moves to the next
    row that is free. If there are too many scopes the longest are kept.
    """
    kept = sorted(scopes, key=lambda scope: scope.wall_s, reverse=True)[:most_scopes]
    kept.sort(key=lambda scope: (scope.start_s, scope.depth, -scope.wall_s))
    ends: dict[str, list[float]] = {}
    rows: list[tuple[ScopeRecord, str, int]] = []
    for scope in kept:
        lane_ends = ends.setdefault(scope.thread, [])
        row = max(scope.depth, 0)
        while row < min(len(lane_ends), most_rows) and lane_ends[row] > scope.start_s + _EPSILON_S:
            row += 1
        if row >= most_rows:
            continue
        lane_ends.extend([float("-inf")] * (row + 1 - len(lane_ends)))
        lane_ends[row] = scope.start_s + scope.wall_s
        rows.append((scope, scope.thread, row))
    # A thread that entered below another scope's depth (a copied context) leaves rows above it empty.
    used = {(thread, row) for _, thread, row in rows}
    order = [(thread, row) for thread in ends for row in range(len(ends[thread])) if (thread, row) in used]
    position = {key: index for index, key in enumerate(order[:most_rows])}
    placed = [(scope, position[thread, row]) for scope, thread, row in rows if (thread, row) in position]
    return Lanes([thread for thread, _ in order[:most_rows]], placed, len(scopes) - len(placed))
