"""The page of a run in a real browser: it draws, answers, and loads nothing."""

import dataclasses
import math
import re
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path

import pytest
from llm_trainer.training import HistoryRecord, TrainingHistory
from llm_trainer.training.plots import save_run_report

pytestmark = pytest.mark.browser

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright drives the browser")
EVIL = "</script><img src=x onerror=\"document.title='owned'\">"
DESKTOP = {"viewport": {"width": 1200, "height": 900}}


@pytest.fixture(scope="module")
def browser(chromium: str) -> Iterator["sync_api.Browser"]:
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=chromium, args=["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run"]
        )
        yield browser
        browser.close()


@pytest.fixture
def history() -> TrainingHistory:
    """Steps 1, 2, 4, ... 1024 with 1000 tokens and half a second each, and losses that fall by one each."""
    history = TrainingHistory()
    for power in range(11):
        step = 2**power
        record = HistoryRecord(
            step=step,
            tokens=1000 * step,
            wall_s=0.5 * step,
            tokens_per_s=2000.0,
            train_loss=12.0 - power,
            eval_loss=None,
            lr=1e-3,
            grad_norm=1.0 + power,
            skipped_steps=0,
        )
        history.append(dataclasses.replace(record, eval_loss=3.25) if power in (5, 10) else record)
    return history


@pytest.fixture
def show(browser: "sync_api.Browser", tmp_path: Path, history) -> Iterator[Callable[..., "sync_api.Page"]]:
    """Open the history's page; a console message, an error or a request beyond the file fails the test."""
    complaints: list[str] = []
    contexts: list[sync_api.BrowserContext] = []

    def open_page(*, page_of: dict | None = None, **options: object):
        path = tmp_path / "page.html"
        save_run_report(history, path, **(page_of or {}))
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


def xs(page: "sync_api.Page") -> list[float]:
    drawn = page.locator(".line.s0").first.get_attribute("d")
    return [float(x) for x in re.findall(r"[ML]([\d.]+) ", drawn)]


def ticks(page: "sync_api.Page") -> list[str]:
    return page.locator(".chart").first.locator(".x").all_text_contents()


def test_the_axes_can_be_chosen(show):
    page = show(**DESKTOP)
    linear = [1000 * 2**power / 1024 for power in range(11)]
    even = [100.0 * power for power in range(11)]
    assert xs(page) == pytest.approx(linear, abs=0.1)
    assert ticks(page) == ["0", "200", "400", "600", "800", "1k"]
    page.get_by_role("button", name="Logarithmic").click()
    assert xs(page) == pytest.approx(even, abs=0.1)
    assert ticks(page) == ["1", "10", "100", "1k"]
    page.get_by_role("button", name="Tokens").click()
    assert xs(page) == pytest.approx(even, abs=0.1)
    assert ticks(page) == ["1k", "10k", "100k", "1M"]
    page.get_by_role("button", name="Time").click()
    page.get_by_role("button", name="Logarithmic").click()
    assert xs(page) == pytest.approx(linear, abs=0.1)
    assert ticks(page)[-1] == "8.33 min"
    pressed = page.locator("button[aria-pressed=true]").all_text_contents()
    assert pressed == ["Time"]


def test_the_curve_is_where_it_belongs_on_the_screen(show):
    page = show(**DESKTOP)
    box = page.locator(".plot").first.bounding_box()
    curve = page.locator(".line.s0").first.bounding_box()
    assert curve["x"] == pytest.approx(box["x"] + box["width"] / 1024, abs=3)
    assert curve["x"] + curve["width"] == pytest.approx(box["x"] + box["width"], abs=3)
    # The losses run from 2 to 12, with half a unit to spare on either side.
    assert curve["height"] == pytest.approx(box["height"] * 10 / 11, abs=4)


def test_pointing_tells_the_values(show):
    page = show(**DESKTOP)
    box = page.locator(".plot").first.bounding_box()
    tip = page.locator(".tip").first
    assert not tip.is_visible()
    page.mouse.move(box["x"] + box["width"] * 0.52, box["y"] + 60)
    assert tip.inner_text().split("\n") == ["training 3", "step 512, 512k tokens, 4 min 16 s"]
    page.mouse.move(box["x"] + box["width"] - 2, box["y"] + 60)
    assert tip.inner_text().split("\n")[:2] == ["training 2", "held out 3.25"]
    shown = tip.bounding_box()
    assert shown["x"] + shown["width"] <= box["x"] + box["width"]
    page.mouse.move(2, 2)
    assert not tip.is_visible()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_both_themes_have_contrast(show, scheme):
    page = show(color_scheme=scheme, **DESKTOP)

    def luminance(selector: str, name: str) -> float:
        script = "([selector, name]) => getComputedStyle(document.querySelector(selector))[name]"
        colour = re.findall(r"[\d.]+", page.evaluate(script, [selector, name]))
        linear = [
            c / 12.92 if (c := int(part) / 255) <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4
            for part in colour[:3]
        ]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    def contrast(first: float, second: float) -> float:
        return (max(first, second) + 0.05) / (min(first, second) + 0.05)

    panel = luminance(".chart", "backgroundColor")
    assert (panel < 0.1) == (scheme == "dark")
    assert contrast(luminance("body", "color"), luminance("body", "backgroundColor")) >= 7
    assert contrast(luminance(".x", "color"), panel) >= 4.5
    for curve in (".line.s0", ".line.s1"):
        assert contrast(luminance(curve, "stroke"), panel) >= 3


def test_a_phone_needs_no_scrolling_aside(show):
    options = {"viewport": {"width": 360, "height": 700}, "has_touch": True}
    settings = {"training": {"a_name_of_some_length_in_words": "x" * 200}}
    page = show(page_of={"settings": settings, "title": "y" * 100}, **options)
    assert page.evaluate("document.documentElement.scrollWidth") == 360
    charts = page.locator(".chart")
    boxes = [charts.nth(number).bounding_box() for number in range(charts.count())]
    assert len({box["x"] for box in boxes}) == 1
    page.locator(".plot").first.tap(position={"x": 100, "y": 50})
    tip = page.locator(".tip").first
    shown = tip.bounding_box()
    assert shown["x"] >= 0
    assert shown["x"] + shown["width"] <= 360
    page.locator("h1").tap()
    assert not tip.is_visible()
    labels = [box.bounding_box() for box in charts.first.locator(".x").all()]
    assert all(left["x"] + left["width"] < right["x"] for left, right in pairwise(labels))


def test_hostile_text_stays_text(show):
    page = show(page_of={"title": EVIL, "settings": {EVIL: {EVIL: EVIL}}})
    assert page.title() == EVIL
    assert page.locator("h1").inner_text() == EVIL
    assert page.locator("img").count() == 0


def test_without_a_script_it_can_be_read(show, history):
    page = show(java_script_enabled=False, page_of={"resumed_after": [512]}, **DESKTOP)
    assert not page.locator(".controls").is_visible()
    assert page.locator(".line").count() == 5
    assert math.isclose(float(page.locator(".resumed").first.get_attribute("d")[1:].split()[0]), 500)
    assert "Resumed once, after step 512." in page.locator(".summary").inner_text()
    page.locator("summary").first.click()
    first = page.locator("tbody tr").first.locator("td").all_text_contents()
    assert first == ["1,024", "1.02M", "8 min 32 s", "3.2500", "25.79"]
