"""The recording as trace events, for https://ui.perfetto.dev and chrome://tracing.

The format is Google's "Trace Event Format": complete events (``X``), counters (``C``) and metadata
(``M``), with times in microseconds.
"""

from __future__ import annotations

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
    tracks: dict[tuple[str, int], _Track] = {}
    for scope in sorted(recording.scopes, key=lambda scope: (scope.start_s, scope.depth, -scope.wall_s)):
        number = 0
        while not (track := tracks.setdefault((scope.thread, number), _Track(len(tracks) + 1))).take(scope):
            number += 1
        events.append(_complete(scope, track.tid))
    for (thread, number), track in tracks.items():
        events.append(_metadata("thread_name", track.tid, f"{thread} ({number + 1})" if number else thread))
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


class _Track:
    """One row of the viewer, and the ends of the events that are open on it."""

    def __init__(self, tid: int) -> None:
        self.tid = tid
        self._ends: list[float] = []

    def take(self, scope: ScopeRecord) -> bool:
        end = scope.start_s + scope.wall_s
        open_ends = [other for other in self._ends if other > scope.start_s]
        if open_ends and open_ends[-1] < end - _EPSILON_S:
            return False
        self._ends = [*open_ends, end]
        return True


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
