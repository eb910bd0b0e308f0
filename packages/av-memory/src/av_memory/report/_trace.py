"""The recording as trace events, for https://ui.perfetto.dev and chrome://tracing.

The format is Google's "Trace Event Format": complete events (``X``), counters (``C``) and metadata
(``M``), with times in microseconds.
"""

from __future__ import annotations

import heapq
import json
import os
from typing import Any

from av_memory.recording import Recording, ScopeRecord, Usage, write_atomically

_PID = 1
_US_PER_S = 1e6
_EPSILON_S = 1e-9


def trace_events(recording: Recording) -> dict[str, Any]:
    """The recording in Chrome's trace event format.

    Scopes become complete events, one track a thread; a second track is opened for a thread whose
    scopes overlap without one holding the other, as those of an event loop's tasks do, since the
    viewers draw only nested events. Series become counters in MB of 2**20 bytes.
    """
    process = " ".join(recording.command) or "Python"
    events: list[dict[str, Any]] = [_metadata("process_name", 0, process)]
    threads: dict[str, _Tracks] = {}
    ids: dict[tuple[str, int], int] = {}
    for scope in sorted(recording.scopes, key=lambda scope: (scope.start_s, scope.depth, -scope.wall_s)):
        tracks = threads.setdefault(scope.thread, _Tracks())
        number = tracks.place(scope.start_s, scope.start_s + scope.wall_s)
        events.append(_complete(scope, ids.setdefault((scope.thread, number), len(ids) + 1)))
    for (thread, number), tid in ids.items():
        events.append(_metadata("thread_name", tid, f"{thread} ({number + 1})" if number else thread))
    for series in recording.series:
        events.extend(
            {
                "name": series.name,
                "cat": "memory",
                "ph": "C",
                "ts": round(time_s * _US_PER_S, 3),
                "pid": _PID,
                "args": {"MB": round(value_mb, 3)},
            }
            for time_s, value_mb in zip(series.times_s, series.values_mb, strict=True)
        )
    return {
        "traceEvents": events,
        "displayTimeUnit": "ms",
        "otherData": {
            "created_unix_s": recording.created_unix_s,
            "limits": recording.limits,
            "exit_code": recording.exit_code,
            "dropped_scopes": recording.dropped_scopes,
        },
    }


def save_trace(recording: Recording, path: str | os.PathLike[str]) -> None:
    """Write :func:`trace_events` as JSON, whole or not at all. Raises ``OSError``."""
    write_atomically(path, json.dumps(trace_events(recording), allow_nan=False))


class _Tracks:
    """The rows of one thread; each event goes to the first row where it is nested or alone.

    A tournament tree holds for each row the latest end that fits in: ``_fits[1]`` is the largest of all,
    and row ``i`` is the leaf ``i`` of the lower half. So a row is found in the logarithm of their number.
    """

    def __init__(self) -> None:
        self._open: list[list[float]] = [[]]
        """Ends of the events that are open on each row, the innermost last."""
        self._fits = [float("inf"), float("inf")]
        self._ending: list[tuple[float, int]] = []

    def place(self, start: float, end: float) -> int:
        """The row of the next event, none of which may start before the last one."""
        while self._ending and self._ending[0][0] <= start:
            row = heapq.heappop(self._ending)[1]
            ends = self._open[row]
            while ends and ends[-1] <= start:
                ends.pop()
            self._update(row)
        row = self._first_that_fits(end)
        self._open[row].append(end)
        heapq.heappush(self._ending, (end, row))
        self._update(row)
        return row

    def _first_that_fits(self, end: float) -> int:
        if self._fits[1] < end:
            self._double()
        node, leaves = 1, len(self._open)
        while node < leaves:
            node = 2 * node if self._fits[2 * node] >= end else 2 * node + 1
        return node - leaves

    def _update(self, row: int) -> None:
        ends = self._open[row]
        node = row + len(self._open)
        self._fits[node] = ends[-1] + _EPSILON_S if ends else float("inf")
        while node > 1:
            node //= 2
            self._fits[node] = max(self._fits[2 * node], self._fits[2 * node + 1])

    def _double(self) -> None:
        leaves = self._fits[len(self._open) :]
        self._open.extend([] for _ in leaves[:])
        levels = [leaves + [float("inf")] * len(leaves)]
        while len(levels[0]) > 1:
            below = levels[0]
            levels.insert(0, [max(pair) for pair in zip(below[::2], below[1::2], strict=True)])
        self._fits = [float("inf"), *(fit for level in levels for fit in level)]


def _metadata(name: str, tid: int, value: str) -> dict[str, Any]:
    return {"name": name, "ph": "M", "pid": _PID, "tid": tid, "args": {"name": value}}


def _complete(scope: ScopeRecord, tid: int) -> dict[str, Any]:
    arguments: dict[str, Any] = {"depth": scope.depth, "cpu": _usage(scope.cpu)}
    arguments |= {f"cuda:{index}": _usage(usage) for index, usage in scope.gpus.items()}
    if scope.tree is not None:
        arguments["tree"] = _usage(scope.tree)
    if scope.tree_pss_peak_mb is not None:
        arguments["tree_pss_peak_mb"] = round(scope.tree_pss_peak_mb, 3)
    if scope.error is not None:
        arguments["error"] = scope.error
    return {
        "name": scope.name,
        "cat": "scope",
        "ph": "X",
        "ts": round(scope.start_s * _US_PER_S, 3),
        "dur": round(scope.wall_s * _US_PER_S, 3),
        "pid": _PID,
        "tid": tid,
        "args": arguments,
    }


def _usage(usage: Usage) -> dict[str, Any]:
    return {
        "start_mb": round(usage.start_mb, 3),
        "end_mb": round(usage.end_mb, 3),
        "peak_mb": round(usage.peak_mb, 3),
        "net_mb": round(usage.net_mb, 3),
        "peak_exact": usage.peak_exact,
    }
