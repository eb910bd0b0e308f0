"""The trace, field by field, against Google's description of the Trace Event Format."""

import json
import time
from pathlib import Path

from av_memory.recording import Recording, ScopeRecord, Series, Usage
from av_memory.report import save_trace, trace_events
from hypothesis import given
from hypothesis import strategies as st


def scope(name: str, thread: str, start: float, wall: float, depth: int = 0) -> ScopeRecord:
    return ScopeRecord(name, thread, depth, start, wall, Usage(1, 2, 3.5, True), error=None)


def trace(scopes: list[ScopeRecord], series: list[Series] | None = None) -> list[dict]:
    return trace_events(Recording(1.7e9, 2.0, series or [], scopes))["traceEvents"]


def test_a_scope_is_a_complete_event_in_microseconds() -> None:
    (event,) = [event for event in trace([scope("load", "main", 0.25, 1.5)]) if event["ph"] == "X"]
    usage = {"start_mb": 1, "end_mb": 2, "peak_mb": 3.5, "net_mb": 1, "peak_exact": True}
    assert event == {
        "name": "load",
        "cat": "scope",
        "ph": "X",
        "ts": 250_000.0,
        "dur": 1_500_000.0,
        "pid": 1,
        "tid": 1,
        "args": {"depth": 0, "cpu": usage},
    }


def test_each_thread_has_a_number_and_a_name() -> None:
    events = trace([scope("a", "main", 0, 1), scope("b", "loader", 0, 1), scope("c", "main", 1, 1)])
    names = {e["args"]["name"]: e["tid"] for e in events if e["ph"] == "M" and e["name"] == "thread_name"}
    assert len(set(names.values())) == len(names) == 2
    assert {e["name"]: e["tid"] for e in events if e["ph"] == "X"} == {
        "a": names["main"],
        "b": names["loader"],
        "c": names["main"],
    }
    assert [e["args"]["name"] for e in events if e["name"] == "process_name"] == ["Python"]


def test_a_series_is_a_counter() -> None:
    events = trace([], [Series("cpu", [0.0, 0.005], [100.25, 101.5])])
    assert [e for e in events if e["ph"] == "C"] == [
        {"name": "cpu", "cat": "memory", "ph": "C", "ts": 0.0, "pid": 1, "args": {"MB": 100.25}},
        {"name": "cpu", "cat": "memory", "ph": "C", "ts": 5000.0, "pid": 1, "args": {"MB": 101.5}},
    ]


@given(st.lists(st.tuples(st.integers(0, 20), st.integers(1, 10), st.sampled_from(["x", "y"])), max_size=20))
def test_events_of_a_track_are_nested_or_apart(items: list[tuple[int, int, str]]) -> None:
    events = [e for e in trace([scope("s", t, start, wall) for start, wall, t in items]) if e["ph"] == "X"]
    assert len(events) == len(items)
    for i, a in enumerate(events):
        for b in events[i + 1 :]:
            if a["tid"] == b["tid"]:
                (a0, a1), (b0, b1) = sorted([(e["ts"], e["ts"] + e["dur"]) for e in (a, b)])
                assert b0 >= a1 or b1 <= a1 or a0 == b0


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(0, 12)), max_size=40))
def test_an_event_takes_the_first_track_that_fits(items: list[tuple[int, int]]) -> None:
    tracks: list[list[int]] = []
    expected: list[int] = []
    for start, wall in sorted(items, key=lambda item: (item[0], -item[1])):
        number = 0
        while True:
            if number == len(tracks):
                tracks.append([])
            tracks[number] = [end for end in tracks[number] if end > start]
            if not tracks[number] or tracks[number][-1] >= start + wall:
                break
            number += 1
        tracks[number].append(start + wall)
        expected.append(number + 1)
    events = trace([scope("s", "main", start, wall) for start, wall in items])
    assert [event["tid"] for event in events if event["ph"] == "X"] == expected


def test_many_overlapping_scopes_take_little_time() -> None:
    scopes = [scope("task", "loop", i * 1e-3, 1000.0) for i in range(20_000)]
    began = time.process_time()
    events = trace(scopes)
    assert time.process_time() - began < 5
    assert len({event["tid"] for event in events if event["ph"] == "X"}) == len(scopes)


def test_the_file_is_json_with_the_documented_top_level(tmp_path: Path) -> None:
    path = tmp_path / "t.json"
    save_trace(Recording(1.7e9, 1.0, [], [scope("a", "main", 0, 1)], limits={"limit_mb": 5.0}), path)
    data = json.loads(path.read_text())
    assert set(data) == {"traceEvents", "displayTimeUnit", "otherData"}
    assert data["displayTimeUnit"] in ("ms", "ns")
    required = {"X": {"name", "ph", "ts", "dur", "pid", "tid"}, "M": {"name", "ph", "pid", "args"}}
    assert all(required[event["ph"]] <= event.keys() for event in data["traceEvents"])
