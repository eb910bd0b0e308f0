"""The page in a real browser: it draws, answers, and lets nothing in or out."""

import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from av_memory.recording import Recording, ScopeRecord, Series, Usage
from av_memory.report import save_report

pytestmark = pytest.mark.browser

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright drives the browser")
ARGUMENTS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
EVIL = "</script><img src=x onerror=\"document.title='owned'\">"


@pytest.fixture(scope="module")
def browser(chromium: str) -> Iterator["sync_api.Browser"]:
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=ARGUMENTS)
        yield browser
        browser.close()


@pytest.fixture
def show(browser: "sync_api.Browser", tmp_path: Path) -> Iterator[Callable[..., "sync_api.Page"]]:
    """Open a recording's page; a console message, an error or a request beyond the file fails the test."""
    complaints: list[str] = []
    contexts: list[sync_api.BrowserContext] = []

    def open_page(recording: Recording, *, sections: dict[str, str] | None = None, **options: object):
        path = tmp_path / "page.html"
        save_report(recording, path, title="Test", sections=sections)
        context = browser.new_context(**options)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: complaints.append(f"console: {message.text}"))
        page.on("pageerror", lambda error: complaints.append(f"error: {error}"))
        page.on(
            "request",
            lambda request: (
                None if request.url == path.as_uri() else complaints.append(f"request: {request.url}")
            ),
        )
        page.goto(path.as_uri())
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert complaints == []


def scope(name: str, start: float, wall: float, depth: int = 0, thread: str = "MainThread") -> ScopeRecord:
    return ScopeRecord(name, thread, depth, start, wall, Usage(100, 140, 300))


@pytest.fixture
def recording() -> Recording:
    """Ten seconds: a ramp from 100 to 200 MB with a spike of 300 MB at 4 s."""
    times = [i * 0.005 for i in range(2001)]
    values = [100 + 10 * t for t in times]
    values[800] = 300.0
    scopes = [
        scope("train", 1, 8),
        scope("step", 3, 2, 1),
        scope("step", 6, 2, 1),
        scope("load", 0, 5, 0, "loader"),
    ]
    return Recording(1.7e9, 10.0, [Series("cpu", times, values)], scopes, limits={"limit_mb": 400.0})


def plot_box(page: "sync_api.Page") -> dict[str, float]:
    box = page.locator("#plot > svg").bounding_box()
    assert box is not None
    return box


def path_points(page: "sync_api.Page") -> list[tuple[float, float]]:
    drawn = page.locator("#plot > svg path.curve").first.get_attribute("d")
    assert drawn is not None
    return [(float(x), float(y)) for x, y in re.findall(r"[ML]([\d.-]+) ([\d.-]+)", drawn)]


def time_labels(page: "sync_api.Page") -> list[str]:
    return page.locator("#plot text.time").all_text_contents()


def test_the_curve_fills_the_plot_and_keeps_the_spike(show, recording) -> None:
    page = show(recording, viewport={"width": 1200, "height": 800})
    points = path_points(page)
    box = plot_box(page)
    assert len(points) > 500
    assert min(x for x, _ in points) == pytest.approx(68, abs=1)
    assert max(x for x, _ in points) == pytest.approx(box["width"] - 14, abs=1)
    spike_x, spike_y = min(points, key=lambda point: point[1])
    assert (spike_x - 68) / (box["width"] - 82) == pytest.approx(0.4, abs=0.002)
    # 260 pixels stand for 1.08 times the limit of 400 MB, which is near enough to be shown.
    assert spike_y == pytest.approx(270 - 260 * 300 / 432, abs=0.2)
    assert page.locator("#plot text.limit-name").text_content() == "limit 400 MB"
    assert time_labels(page)[-1] == "10 s"
    assert page.locator("#plot g.scope").count() == 4


def test_hover_shows_the_value_and_the_scopes(show, recording) -> None:
    page = show(recording, viewport={"width": 1200, "height": 800})
    box = plot_box(page)
    page.mouse.move(box["x"] + 68 + (box["width"] - 82) * 0.7, box["y"] + 100)
    tip = page.locator(".tip")
    assert tip.is_visible()
    text = tip.inner_text()
    assert "7.00 s" in text
    assert "Process (RSS): 170 MB" in text
    assert "train › step" in text
    assert page.locator("#plot circle.dot").count() == 1
    lane = page.locator("#plot g.scope", has_text="load").bounding_box()
    assert lane is not None
    page.mouse.move(lane["x"] + 20, lane["y"] + 8)
    assert "load: 5.00 s, peak 300 MB, net +40.0 MB" in tip.inner_text()
    page.mouse.move(2, 2)
    assert not tip.is_visible()


def test_drag_zooms_and_double_click_and_button_show_all(show, recording) -> None:
    page = show(recording, viewport={"width": 1200, "height": 800})
    whole = time_labels(page)
    box = plot_box(page)

    def drag(start: float, end: float) -> None:
        left, width = box["x"] + 68, box["width"] - 82
        page.mouse.move(left + width * start, box["y"] + 80)
        page.mouse.down()
        page.mouse.move(left + width * (start + end) / 2, box["y"] + 90)
        page.mouse.move(left + width * end, box["y"] + 90)
        page.mouse.up()

    drag(0.39, 0.41)
    labels = time_labels(page)
    assert labels != whole
    assert all(3.89 <= float(label.removesuffix(" s")) <= 4.11 for label in labels)
    xs = [x for x, _ in path_points(page)]
    assert 40 <= len(xs) <= 50, "0.2 s of samples 5 ms apart"
    page.get_by_role("button", name="Reset").click()
    assert time_labels(page) == whole
    drag(0.2, 0.8)
    assert time_labels(page) != whole
    page.mouse.dblclick(box["x"] + 300, box["y"] + 100)
    assert time_labels(page) == whole
    page.mouse.move(box["x"] + 300, box["y"] + 100)
    page.keyboard.down("Control")
    page.mouse.wheel(0, -100)
    page.keyboard.up("Control")
    page.wait_for_function(
        "whole => document.querySelector('#plot text.time').textContent !== whole", arg=whole[0]
    )
    page.locator("#plot").press("0")
    assert time_labels(page) == whole
    page.locator("#plot").press("+")
    assert len(path_points(page)) > 500
    assert time_labels(page) != whole


def test_a_name_in_the_table_highlights_its_scopes(show, recording) -> None:
    page = show(recording)
    button = page.locator("table").get_by_role("button", name="step")
    button.click()
    assert page.locator("#plot g.scope.picked").count() == 2
    assert page.locator("#plot rect.band").count() == 2
    button.click()
    assert page.locator("#plot rect.band").count() == 0


def test_a_curve_can_be_switched_off(show, recording) -> None:
    page = show(recording)
    page.locator(".key").first.click()
    assert page.locator("#plot > svg path.curve").count() == 0
    page.locator(".key").first.click()
    assert page.locator("#plot > svg path.curve").count() == 1


def test_a_stretch_without_samples_is_not_drawn_as_measured(show) -> None:
    times = [i * 0.005 for i in range(200)] + [8 + i * 0.005 for i in range(200)]
    page = show(Recording(1.7e9, 9.0, [Series("cpu", times, [50.0] * 400)], []))
    drawn = page.locator("#plot > svg path.curve").get_attribute("d")
    assert drawn.count("M") == 2
    assert page.locator("#plot > svg path.gap").get_attribute("d").count("M") == 1


def test_the_theme_follows_the_reader(show, recording) -> None:
    back = "getComputedStyle(document.body).backgroundColor"
    assert show(recording, color_scheme="light").evaluate(back) == "rgb(255, 255, 255)"
    dark = show(recording, color_scheme="dark").evaluate(back)
    assert all(int(part) < 60 for part in re.findall(r"\d+", dark))


def test_a_phone_needs_no_sideways_scrolling(show, recording) -> None:
    page = show(recording, viewport={"width": 360, "height": 700})
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    assert plot_box(page)["width"] > 300
    assert len(time_labels(page)) >= 2


def test_it_reads_without_script(show, recording) -> None:
    page = show(recording, java_script_enabled=False)
    assert page.locator("#plot > svg path.curve").count() == 1
    assert page.locator("#plot g.scope").count() == 4
    assert page.locator("#scopes tbody tr").count() == 3
    assert not page.locator(".zoom").is_visible()


def test_a_hostile_name_stays_text(show) -> None:
    hostile = Recording(
        1.7e9, 2.0, [Series(EVIL, [0, 1, 2], [1, 5, 2])], [scope(EVIL, 0, 2, thread=EVIL)], command=[EVIL]
    )
    page = show(hostile, sections={EVIL: "<svg id='mine' width='9' height='9'></svg>"})
    box = plot_box(page)
    page.mouse.move(box["x"] + 200, box["y"] + 80)
    assert EVIL in page.locator(".tip").inner_text()
    page.locator("table .name").first.click()
    assert page.title() == "Test"
    assert page.locator("img").count() == 0
    assert page.locator("#mine").count() == 1
    assert page.locator("table .name").inner_text() == EVIL


@pytest.mark.parametrize(
    "odd",
    [
        Recording(1.7e9, 0.0, [], []),
        Recording(1.7e9, 1.0, [Series("cpu", [0.5], [10.0])], []),
        Recording(1.7e9, 1.0, [], [scope("alone", 0, 0)]),
    ],
)
def test_odd_recordings_draw_without_complaint(show, odd: Recording) -> None:
    page = show(odd)
    box = plot_box(page)
    page.mouse.move(box["x"] + 100, box["y"] + 80)
    page.get_by_role("button", name="+").click()
    assert "NaN" not in page.locator("#plot").inner_html()


def test_a_long_recording_is_small_and_opens(show) -> None:
    count = 200_000
    times = [i * 0.005 for i in range(count)]
    values = [500 + (i * 7919 % 101) / 3 for i in range(count)]
    scopes = [scope(f"batch_{i}", i * 0.1, 0.09) for i in range(10_000)]
    page = show(Recording(1.7e9, 1000.0, [Series("cpu", times, values)], scopes))
    assert len(page.content()) < 2e6
    assert (
        page.evaluate("performance.timing.domContentLoadedEventEnd - performance.timing.responseEnd") < 5000
    )
    assert len(path_points(page)) > 500
