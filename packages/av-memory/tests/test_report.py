"""The page as text: what it says, that nothing is lost, and that names do no harm."""

import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from av_memory.recording import Process, Recording, ScopeRecord, Series, Usage
from av_memory.report import report_html, save_report
from av_memory.report._axis import memory_ticks, time_ticks
from av_memory.report._curve import reduce_curve
from av_memory.report._format import format_mb, format_s, one_line
from av_memory.report._lanes import lay_out
from av_memory.report._summary import summarise_scopes, verdict
from hypothesis import given
from hypothesis import strategies as st

EVIL = "</script><img src=x onerror=alert(1)>"


def scope(
    name: str,
    start: float,
    wall: float,
    peak: float = 10,
    depth: int = 0,
    thread: str = "main",
    exact: bool = False,
) -> ScopeRecord:
    return ScopeRecord(name, thread, depth, start, wall, Usage(1, 3, peak, exact))


def recording(**fields: Any) -> Recording:
    return replace(Recording(1.7e9, 10.0, [], []), **fields)


CURVE = Series("cpu", [0, 1, 2, 3, 4], [100, 200, 812, 300, 100])


class _Page(HTMLParser):
    """Collects tags, table cells and text, as a browser without script would show them."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.rows: list[list[str]] = []
        self._in_cell = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
            self._in_cell = True

    def handle_endtag(self, tag: str) -> None:
        if tag in ("td", "th"):
            self._in_cell = False

    def handle_data(self, data: str) -> None:
        if self._in_cell:
            self.rows[-1][-1] += data


def test_the_verdict_names_peak_time_scope_and_limit() -> None:
    scopes = [scope("train", 0, 4), scope("step", 1.5, 1, depth=1), scope("later", 3, 1, depth=1)]
    text = " ".join(verdict(recording(series=[CURVE], scopes=scopes, limits={"cgroup_limit_mb": 1624.0})))
    assert "812 MB at 2.00 s, in train › step." in text
    assert "50% of the control group's limit (1.59 GB)" in text


def test_values_below_what_can_be_seen_are_drawn() -> None:
    for value in (5e-324, 1e-300, 0.009):
        curve = Series("cpu", [0, 5e-324], [value, value])
        page = report_html(recording(series=[curve], wall_s=0.0, limits={"limit_mb": value}))
        assert "NaN" not in page
        assert " MB</text>" in page


def test_an_exact_peak_between_samples_is_the_verdict() -> None:
    scopes = [scope("train", 0, 4, 900, exact=True), scope("step", 3, 0.5, 900, depth=1, exact=True)]
    text = " ".join(verdict(recording(series=[CURVE], scopes=scopes)))
    assert "900 MB between 3.00 s and 3.50 s, in step." in text


def test_statistics_of_a_name_are_those_done_by_hand() -> None:
    scopes = [
        ScopeRecord("a", "t", 0, 0, 2.0, Usage(10, 30, 50, True), {0: Usage(0, 0, 7)}),
        ScopeRecord("a", "t", 0, 2, 4.0, Usage(30, 20, 40), {0: Usage(0, 0, 9)}, error="ValueError"),
        ScopeRecord("b", "t", 0, 6, 1.0, Usage(20, 20, 60), tree=Usage(1, 2, 99), tree_pss_peak_mb=80.0),
    ]
    b, a = summarise_scopes(scopes)
    assert (a.count, a.wall_s, a.peak_mb, a.peak_sum_mb / 2, a.net_sum_mb / 2) == (2, 6.0, 50, 45, 5)
    assert (a.gpu_peaks_mb, a.exactness, dict(a.errors)) == ({0: 9}, "1 of 2 exact", {"ValueError": 1})
    assert (b.peak_mb, b.tree_peak_mb, b.tree_pss_peak_mb, b.exactness) == (60, 99, 80, "sampled")
    header, row_b, row_a = _Page(report_html(recording(scopes=scopes))).rows
    by_head = dict(zip(header, row_a, strict=True))
    assert by_head["Scope"] == "a"
    assert by_head["Peak, max"] == "50.0 MB"
    assert by_head["Peak, mean"] == "45.0 MB"
    assert by_head["Net, mean"] == "+5.0 MB"
    assert by_head["Wall, total"] == "6.00 s"
    assert by_head["GPU 0 peak"] == "9.0 MB"
    assert by_head["Tree peak (RSS)"] == "–"
    assert by_head["Errors"] == "ValueError × 1"
    assert row_b[0] == "b"


@given(
    st.lists(st.tuples(st.floats(0.001, 5), st.floats(0, 1e5)), min_size=1, max_size=400), st.integers(1, 20)
)
def test_reducing_keeps_each_columns_extremes(steps: list[tuple[float, float]], columns: int) -> None:
    times, now = [], 0.0
    for step, _ in steps:
        times.append(now)
        now += step
    values = [value for _, value in steps]
    small = reduce_curve(times, values, columns)
    assert len(small.times_s) <= max(4 * columns, 1)
    points = set(zip(times, values, strict=True))
    kept = list(zip(small.times_s, small.values_mb, strict=True))
    assert points.issuperset(kept)
    assert small.times_s == sorted(small.times_s)
    assert kept[0] == (times[0], values[0])
    assert kept[-1] == (times[-1], values[-1])
    # However the columns are cut, something as high is kept within a column's width of every point.
    width = (times[-1] - times[0]) / columns
    for time, value in points:
        assert max(v for t, v in kept if abs(t - time) <= width * (1 + 1e-9)) >= value


def test_a_long_recording_keeps_its_spike_and_stays_small() -> None:
    count = 200_000
    times = [i * 0.005 for i in range(count)]
    values = [500 + 37.0 * ((i * 7919) % 101) / 101 for i in range(count)]
    values[123_457] = 4321.0
    page = report_html(recording(wall_s=count * 0.005, series=[Series("cpu", times, values)]))
    assert len(page.encode()) < 2e6
    one = data_of(page)["series"][0]
    sums = 0
    levels = [sums := sums + step for step in one["v"]]
    assert max(levels) == 432_100
    assert "4.22 GB at 10 min 17 s" in page


def data_of(page: str) -> dict:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    assert found is not None
    return json.loads(found[1])


@pytest.mark.parametrize(
    "one",
    [
        recording(wall_s=0.0),
        recording(series=[Series("cpu", [], [])]),
        recording(series=[Series("cpu", [0.5], [10.0])]),
        recording(series=[Series("cpu", [0.0, 0.0], [0.0, 0.0])], wall_s=0.0),
        recording(series=[CURVE]),
        recording(scopes=[scope("only", 0, 0)]),
        recording(scopes=[scope("before", -3, 1)], series=[CURVE]),
        recording(command=["true"], exit_code=0),
        recording(series=[CURVE], limits={"limit_mb": 0.0}, created_unix_s=1e15),
        recording(series=[Series("cpu", [0.0, 1e15], [1e15, -1e15])], wall_s=1e15),
        recording(series=[Series("cpu", [0.0, 1e-9], [1e-9, 1e-9])], wall_s=1e-9),
    ],
)
def test_odd_recordings_render(one: Recording) -> None:
    page = report_html(one)
    assert "<svg" in page
    assert not re.search(r"\b(nan|inf|NaN|Infinity)\b", page.split("<script")[0].split("</style>")[1])


def test_an_empty_recording_says_so() -> None:
    page = report_html(recording())
    assert "No memory was sampled." in page
    assert "Nothing was sampled" in page


def test_no_name_becomes_markup() -> None:
    one = recording(
        series=[Series(EVIL, [0, 1], [1, 2])],
        scopes=[ScopeRecord(EVIL, EVIL, 0, 0, 1, Usage(1, 2, 3), error=EVIL)],
        processes=[Process(1, EVIL, 3)],
        command=[EVIL],
        exit_code=0,
    )
    page = report_html(one, title=EVIL, sections={EVIL: "<p id='trusted'>ok</p>"})
    tags = _Page(page).tags
    assert "img" not in {tag for tag, _ in tags}
    assert sum(tag == "script" for tag, _ in tags) == 2
    assert ("p", {"id": "trusted"}) in tags
    assert data_of(page)["names"] == [EVIL]


def test_the_page_refers_to_nothing_outside_itself() -> None:
    tags = _Page(report_html(recording(series=[CURVE], scopes=[scope("a", 0, 1)]))).tags
    assert not [(tag, attrs) for tag, attrs in tags if {"src", "href", "srcset", "action"} & attrs.keys()]
    policy = next(a["content"] for _, a in tags if a.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None
    assert policy.startswith("default-src 'none'")


def test_half_a_surrogate_pair_can_be_written(tmp_path: Path) -> None:
    save_report(recording(scopes=[scope("\ud800", 0, 1)]), tmp_path / "p.html", title="x")
    assert "<title>x</title>" in (tmp_path / "p.html").read_text(encoding="utf-8")


@given(
    st.lists(
        st.tuples(st.integers(0, 30), st.integers(0, 10), st.integers(0, 3), st.sampled_from("xy")),
        max_size=25,
    )
)
def test_no_two_scopes_share_a_row_at_a_time(items: list[tuple[int, int, int, str]]) -> None:
    scopes = [scope("s", start, wall, depth=depth, thread=thread) for start, wall, depth, thread in items]
    lanes = lay_out(scopes, most_rows=100, most_scopes=100)
    assert lanes.left_out == 0
    assert len(lanes.placed) == len(scopes)
    for i, (a, row_a) in enumerate(lanes.placed):
        assert lanes.threads[row_a] == a.thread
        for b, row_b in lanes.placed[i + 1 :]:
            overlap = min(a.start_s + a.wall_s, b.start_s + b.wall_s) - max(a.start_s, b.start_s)
            assert row_a != row_b or overlap <= 0


def test_children_lie_below_their_parents() -> None:
    scopes = [scope("child", 1, 1, depth=1), scope("parent", 0, 3), scope("next", 3, 1)]
    placed = {one.name: row for one, row in lay_out(scopes, most_rows=9, most_scopes=9).placed}
    assert placed == {"parent": 0, "next": 0, "child": 1}


def test_too_many_scopes_keep_the_longest() -> None:
    scopes = [scope(str(i), i, (i % 7) / 10) for i in range(50)]
    lanes = lay_out(scopes, most_rows=9, most_scopes=10)
    assert lanes.left_out == 40
    assert min(one.wall_s for one, _ in lanes.placed) >= 0.5


@given(st.floats(1e-6, 1e15))
def test_memory_ticks_are_even_and_within(top: float) -> None:
    values = [value for value, _ in memory_ticks(top)]
    assert values[0] == 0
    assert 3 <= len(values) <= 8
    assert values[-1] <= top * (1 + 1e-9)


@given(st.floats(0, 1e6), st.floats(1e-4, 1e6))
def test_time_ticks_are_within_and_their_labels_differ(start: float, span: float) -> None:
    ticks = time_ticks(start, start + span)
    assert 1 <= len(ticks) <= 10
    assert all(start - span * 1e-6 <= value <= (start + span) * (1 + 1e-9) for value, _ in ticks)
    assert len({label for _, label in ticks}) == len(ticks)


def test_numbers_read_well() -> None:
    assert [format_mb(x) for x in (0.04, 9.96, 512.4, 1536, 20480)] == [
        "0.0 MB", "10.0 MB", "512 MB", "1.50 GB", "20.0 GB",
    ]  # fmt: skip
    assert [format_s(x) for x in (3e-6, 0.0123, 1.5, 61, 3661)] == [
        "3 µs", "12.3 ms", "1.50 s", "1 min 01 s", "1 h 01 min",
    ]  # fmt: skip
    assert one_line("a\x1b[31m\nb é") == "a\\x1b[31m\\nb é"
