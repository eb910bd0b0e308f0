"""The page of a quantisation, taken apart with lxml, and looked at in a browser."""

import dataclasses
import math
import re
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from auto_round.config_manager import AutoRoundConfig, LayerSettings
from auto_round.quantization._report import BlockReport, EndToEndReport, LayerReport, QuantizationReport
from auto_round.report import report_html, save_html
from hypothesis import given, settings
from hypothesis import strategies as st

html = pytest.importorskip("lxml.html", reason="lxml takes pages apart")

EVIL = "</script></style><img src=x onerror=\"document.title='owned'\">&amp;'"
W2 = LayerSettings(bits=2, group_size=32, symmetric=False, weight_dtype="int")
KINDS = ("self_attn.q_proj", "self_attn.k_proj", "mlp.down_proj")


def layer(name: str, sqnr_db: float = 12.0, weights: int = 4096, stored_bits: float = 2.5625) -> LayerReport:
    figures = {"weights": weights, "sqnr_db": sqnr_db, "loss": 1.25e-3, "stored_bits": stored_bits}
    return LayerReport(name=name, settings=W2, **figures)


def block(index: int, kinds: tuple[str, ...] = KINDS, **values: object) -> BlockReport:
    name = f"model.layers.{index}"
    layers = tuple(layer(f"{name}.{kind}", 10 + k + index / 100) for k, kind in enumerate(kinds))
    known = {"loss_before": 2e-3 * (index + 1), "loss_after": 1e-3 * (index + 2), "best_step": 40}
    steps = {
        "step_losses": tuple(1 - step / 100 for step in range(50)),
        "wall_s": 10.0,
        "peak_mb": 400.0 + index,
    }
    return BlockReport(**{"name": name, "layers": layers, **known, **steps, **values})


def report_of(blocks: list[BlockReport], **values: object) -> QuantizationReport:
    configuration = AutoRoundConfig(
        model_path="small", quantization={"bits": 2, "group_size": 32}, memory={"max_ram_mb": 450}
    ).to_dict()
    memory = [(10.0 * (index + 1), 300.0 + index) for index in range(len(blocks))]
    given = {"model": "small", "configuration": configuration, "blocks": blocks, "memory": memory}
    return QuantizationReport(**{**given, **values})


@pytest.fixture
def report() -> QuantizationReport:
    """Eight blocks of three layers, one of them far below its kind, and one layer outside."""
    blocks = [block(index) for index in range(8)]
    first = blocks[2].layers[0]
    blocks[2] = dataclasses.replace(
        blocks[2], layers=(dataclasses.replace(first, sqnr_db=4.0), *blocks[2].layers[1:])
    )
    outside = [
        LayerReport(
            name="lm_head",
            settings=LayerSettings(bits=8, group_size=-1, symmetric=True, weight_dtype="int"),
            weights=32_000,
            sqnr_db=44.125,
            loss=3.5e-7,
            stored_bits=8.5,
        )
    ]
    return report_of(blocks, outside=outside, notes=["Activations are kept on disk."])


def parsed(report: QuantizationReport):
    return html.document_fromstring(report_html(report))


def rows(page, table: str) -> list[list[str]]:
    found = page.xpath(f"//table[@id='{table}']/tbody/tr")
    return [[cell.text_content().strip() for cell in row] for row in found]


def words(page) -> str:
    return " ".join(page.text_content().split())


def dots(page, style: str) -> list[tuple[int, int]]:
    path = "".join(page.xpath(f"//path[contains(concat(' ', @class, ' '), ' {style} ')]/@d"))
    return [(int(x), int(y)) for x, y in re.findall(r"M(\d+) (\d+)h0", path)]


def test_every_layer_is_there_with_its_numbers(report):
    shown = rows(parsed(report), "layers")
    assert [row[0] for row in shown] == [one.name for one in report.layers]
    for row, one in zip(shown, report.layers, strict=True):
        assert float(row[1]) == pytest.approx(one.sqnr_db, abs=0.0051)
        assert row[2] == str(one.settings.bits)
        assert float(row[6]) == pytest.approx(one.stored_bits, abs=5.1e-4)
        assert int(row[7].replace(",", "")) == one.weights
        assert float(row[8]) == one.loss
    assert shown[0][2:6] == ["2", "32", "int", "yes"]
    assert shown[-1][2:6] == ["8", "row", "int", "no"]


def test_every_block_is_there_with_its_numbers(report):
    shown = rows(parsed(report), "blocks")
    assert [row[0] for row in shown] == [one.name for one in report.blocks]
    for row, one in zip(shown, report.blocks, strict=True):
        assert float(row[2]) == pytest.approx(one.loss_before, rel=1e-3)
        assert float(row[3]) == pytest.approx(one.loss_after, rel=1e-3)
        share = 100 * (one.loss_before - one.loss_after) / one.loss_before
        assert float(row[4].rstrip("%")) == pytest.approx(share, abs=0.051)
        assert row[1::4] == ["3", "40"]
        assert [float(row[6]), float(row[7])] == [one.wall_s, one.peak_mb]


def test_it_says_what_was_done_in_figures(report):
    page = parsed(report)
    shown = dict(zip(page.xpath("//dt/text()"), page.xpath("//dd/text()"), strict=True))
    bits = (8 * 3 * 4096 * 2.5625 + 32_000 * 8.5) / (8 * 3 * 4096 + 32_000)
    assert float(shown["Bits a weight"]) == pytest.approx(bits, abs=5e-4)
    assert shown["Time in blocks"] == "1 min 20 s"
    assert shown["Peak memory"] == "407 MB"
    assert shown["Lowest SQNR"] == "4.00 dB"
    # Block i keeps (i + 2) / (2 (i + 1)) of its loss; the middle two of eight are i = 3 and 4.
    assert float(shown["Loss taken back, median"].rstrip("%")) == pytest.approx(
        100 * (0.375 + 0.4) / 2, abs=0.06
    )
    verdict = page.xpath("string(//p[@class='verdict'])")
    assert "25 layers of together 130,304 weights, in 8 blocks and 1 outside them" in verdict
    assert "int2, groups of 32, asymmetric, and 1 other kind of settings" in verdict
    assert "quality signround, 200 steps a block, 128 samples of 2,048 tokens" in verdict
    assert "(0.0% to 43.8%)" in verdict
    assert "at most 407 MB, 90% of its limit of 450 MB" in verdict
    assert "Activations are kept on disk." in words(page)
    assert ["max_ram_mb", "450"] in [
        [cell.text for cell in row] for row in page.xpath("//table[caption]//tr")
    ]


def test_the_layer_that_is_far_below_its_kind_is_ringed_and_named(report):
    page = parsed(report)
    assert (
        "1 layer, ringed, is far below others of its kind: model.layers.2.self_attn.q_proj (4.00 dB)"
        in words(page)
    )
    assert dots(page, "ring") == [max(dots(page, "c0"), key=lambda dot: dot[1])]
    assert [row[0] for row in rows(page, "kinds")] == [*KINDS, "lm_head"]
    assert page.xpath("//tr[@class='low']/th")[0].text.strip() == "model.layers.2.self_attn.q_proj"
    report.blocks[2] = block(2)
    assert "No layer is far below others of its kind." in words(parsed(report))


@pytest.mark.parametrize("below", [True, False])
def test_far_below_is_more_than_one_and_a_half_times_the_middle_halfs_width(below):
    usual = [10.0, 11.0, 12.0, 13.0, 14.0, 15.0, 16.0, 17.0, 18.0]
    # With the odd one among them as the lowest, whatever it is, the quartiles are those of any low value.
    first, third = np.percentile([*usual, 0.0], [25, 75])
    odd = first - 1.5 * (third - first) + (-0.01 if below else 0.01)
    blocks = [
        block(n, layers=(layer(f"model.layers.{n}.up", value),)) for n, value in enumerate([*usual, odd])
    ]
    assert len(dots(parsed(report_of(blocks)), "ring")) == below


def test_the_dots_are_where_they_belong(report):
    page = parsed(report)
    before, after = dots(page, "before"), dots(page, "after")
    # Half a block is left free on either side.
    assert (
        [x for x, _ in before]
        == [round(1000 * (index + 0.5) / 8) for index in range(8)]
        == [x for x, _ in after]
    )
    heights = [1000 - y for _, y in before + after]
    losses = [one.loss_before for one in report.blocks] + [one.loss_after for one in report.blocks]
    # From 0, with room of 6% of the largest above.
    assert heights == pytest.approx([1000 * loss / (1.06 * max(losses)) for loss in losses], abs=1)
    shares = [1 - one.loss_after / one.loss_before for one in report.blocks]
    bars = [1000 - y for _, y in dots(page, "unseen")[:8]]
    assert bars == pytest.approx([1000 * share / (1.06 * max(shares)) for share in shares], abs=1)


def test_losses_far_apart_are_drawn_on_a_logarithmic_axis():
    blocks = [block(index, loss_before=10.0**-index, loss_after=0.5 * 10.0**-index) for index in range(6)]
    heights = [y for _, y in dots(parsed(report_of(blocks)), "before")]
    steps = [low - high for high, low in pairwise(heights)]
    assert max(steps) - min(steps) <= 1
    assert min(steps) > 100


def test_the_peak_is_marked_and_the_limit_if_it_is_near(report):
    page = parsed(report)
    texts = page.xpath("//span[contains(@class, 'over')]/text()")
    assert texts == ["peak 407 MB, in model.layers.7", "limit 450 MB"]
    styles = page.xpath("//span[contains(@class, 'over')]/@style")
    tops = [float(re.search(r"top:([\d.]+)%", style)[1]) for style in styles]
    top_mb = 1.12 * 450
    assert tops == pytest.approx([100 - 100 * 407 / top_mb, 100 - 100 * 450 / top_mb], abs=0.1)
    report.memory.insert(3, (35.0, 430.0))
    assert parsed(report).xpath("//span[contains(@class, 'over')]/text()")[0] == "peak 430 MB, at 35.0 s"
    far = dict(report.configuration) | {"memory": {"max_ram_mb": 4000}}
    page = parsed(report_of(report.blocks, configuration=far))
    assert len(page.xpath("//span[contains(@class, 'over')]")) == 1
    assert "The limit is 4,000 MB." in words(page)


def test_a_long_timeline_keeps_its_highest_sample():
    memory = [(number / 10, 300 + number % 7) for number in range(20_000)]
    memory[12_345] = (1234.5, 390.0)
    page = parsed(report_of([block(0, peak_mb=0.0)], memory=memory))
    tips = page.xpath("//path/@data-tips")[0].split("|")
    assert "390 MB at 20 min 34 s" in tips
    assert len(tips) <= 600


def test_training_is_drawn_for_each_block(report):
    page = parsed(report)
    figures = page.xpath("//div[@class='steps']/figure")
    assert [one.xpath("string(.//b)") for one in figures] == [one.name for one in report.blocks]
    line = figures[0].xpath(".//path[@class='line']/@d")[0]
    ys = [int(y) for y in re.findall(r"[ML]\d+ (\d+)", line)]
    assert ys == sorted(ys)  # the losses fall, and places are counted from above
    assert figures[0].xpath(".//figcaption/span/text()") == ["step 40 kept"]


def test_without_calibration_there_is_no_loss_to_show(report):
    bare = {"loss_before": None, "loss_after": None, "best_step": None, "step_losses": ()}
    report.blocks = [dataclasses.replace(one, **bare) for one in report.blocks]
    page = parsed(report)
    heads = page.xpath("//h2/text()")
    assert "Loss of each block" not in heads
    assert "Losses while training" not in heads
    assert "No loss was measured" in words(page)
    assert rows(page, "blocks")[0][2:6] == ["-"] * 4


def test_rounding_to_nearest_took_nothing_back():
    blocks = [block(index, loss_before=0.5, loss_after=0.5, step_losses=()) for index in range(3)]
    page = parsed(report_of(blocks))
    assert "The losses are those of rounding to nearest." in words(page)
    assert page.xpath("//h3") == []


def test_figures_that_are_none_are_said_and_not_drawn():
    bad = (
        block(0),
        block(1, loss_before=math.nan),
        block(2, loss_after=math.inf),
        block(3, loss_before=0.0, loss_after=0.0, step_losses=(math.nan, math.inf, 0.5), wall_s=math.nan),
        block(
            4,
            layers=(layer("exact", math.inf), layer("odd", math.nan, stored_bits=math.nan)),
            peak_mb=math.inf,
        ),
        block(5, layers=(), step_losses=(math.nan,)),
    )
    page = parsed(report_of(list(bad), memory=[(math.nan, 1.0), (1.0, math.inf), (2.0, 300.0)]))
    shown = rows(page, "blocks")
    assert shown[1][2] == "NaN"
    assert shown[2][3] == "inf"
    assert [x for x, _ in dots(page, "before")] == [round(1000 * (i + 0.5) / 6) for i in (0, 3, 4, 5)]
    layers = {row[0]: row[1] for row in rows(page, "layers")}
    assert layers["exact"] == "exact"
    assert layers["odd"] == "NaN"
    assert "2 blocks without a finite loss not drawn." in words(page)
    assert "1 layer kept exactly, at the upper edge. 1 layer whose SQNR is not a number not drawn." in words(
        page
    )
    assert len(page.xpath("//div[@class='steps']/figure")) == 5
    assert not re.search(r"nan|inf", " ".join(page.xpath("//path/@d | //span/@style")))


@pytest.mark.parametrize("blocks", [[], [block(0)], [block(0, layers=())]])
def test_small_reports(blocks):
    page = parsed(report_of(blocks))
    assert len(rows(page, "blocks")) == len(blocks)
    empty = parsed(QuantizationReport(model="", configuration={"memory": None, "odd": 3}))
    assert "No layer was quantised." in words(empty)


def test_hostile_names_stay_text():
    hostile = BlockReport(
        name=EVIL, layers=(layer(f"{EVIL}.x{EVIL}"),), loss_before=1.0, loss_after=0.5, peak_mb=9.0
    )
    page = report_html(
        QuantizationReport(
            model=EVIL,
            configuration={EVIL: EVIL, "memory": {EVIL: [EVIL, {EVIL: EVIL}]}},
            blocks=[hostile],
            memory=[(1.0, 3.0)],
            notes=[EVIL, "\x1b[2J\u202e\ud800"],
        )
    )
    tree = html.document_fromstring(page)
    assert tree.xpath("//img") == []
    assert len(tree.xpath("//script")) == len(tree.xpath("//style")) == 1
    assert tree.xpath("string(//h1)") == f"Quantisation of {EVIL}"
    assert rows(tree, "blocks")[0][0] == EVIL
    assert rows(tree, "layers")[0][0] == f"{EVIL}.x{EVIL}"
    assert [item.text for item in tree.xpath("//li")] == [EVIL, "\\x1b[2J\\u202e\\ud800"]
    assert not set(page) & set("\x1b\u202e\ud800")


def test_it_refers_to_nothing(report):
    page = report_html(report)
    tree = html.document_fromstring(page)
    assert tree.xpath("//@src | //@href | //@srcset | //link | //iframe | //object | //form") == []
    assert "//" not in re.sub(r"(?m)^\s*// .*$", "", page)
    assert "url(" not in page
    assert "@import" not in page
    policy = tree.xpath("//meta[@http-equiv='Content-Security-Policy']/@content")[0]
    assert policy.startswith("default-src 'none';")
    assert "script-src 'sha256-" in policy


def test_a_hundred_blocks_of_thousands_of_layers_stay_small():
    kinds = tuple(f"mlp.experts.{expert}.{part}_proj" for expert in range(100) for part in ("gate", "down"))
    steps = tuple(0.5 + step % 7 / 10 for step in range(300))
    blocks = [block(index, kinds, step_losses=steps) for index in range(100)]
    report = report_of(blocks)
    page = report_html(report)
    assert len(page.encode()) < 3_000_000
    shown = rows(html.document_fromstring(page), "layers")
    left_out = int(
        re.search(r"([\d,]+) layers with the highest SQNR are neither drawn", page)[1].replace(",", "")
    )
    assert len(shown) + left_out == 20_000
    assert len(shown) > 15_000
    assert f"The {left_out:,} layers with the highest SQNR not drawn." in page
    kept = {row[0] for row in shown}
    highest_kept = max(one.sqnr_db for one in report.layers if one.name in kept)
    assert all(one.sqnr_db >= highest_kept for one in report.layers if one.name not in kept)


def test_long_names_do_not_make_it_large():
    layers = tuple(layer('"' * 5000 + str(number)) for number in range(20))
    blocks = [block(number, layers=layers, name='"' * 9000 + str(number)) for number in range(1000)]
    area = {f"{number}{'a' * 9999}": "&" * 9999 for number in range(50)}
    report = report_of(
        blocks, notes=["&" * 9999] * 1000, configuration={str(number): area for number in range(50)}
    )
    page = report_html(report)
    assert len(page.encode()) < 3_000_000
    # What was left out is said: of notes, blocks, layers, drawings and settings.
    said = " ".join(html.document_fromstring(page).text_content().split())
    for what in (
        "more notes not shown",
        "more blocks not shown",
        "nor in this table",
        "blocks not drawn",
        "tables not",
    ):
        assert what in said


numbers = st.one_of(st.none(), st.floats())
figures = st.floats()


@given(
    blocks=st.lists(
        st.builds(
            BlockReport,
            name=st.text(max_size=8),
            layers=st.lists(
                st.builds(layer, st.text(max_size=8), figures, st.integers(0, 9)), max_size=6
            ).map(tuple),
            loss_before=numbers,
            loss_after=numbers,
            best_step=st.one_of(st.none(), st.integers(-1, 9)),
            step_losses=st.lists(figures, max_size=9).map(tuple),
            wall_s=figures,
            peak_mb=figures,
        ),
        max_size=4,
    ),
    memory=st.lists(st.tuples(figures, figures), max_size=5),
    limit=numbers,
)
@settings(max_examples=40, deadline=None)
def test_whatever_the_figures_a_page_comes_out(blocks, memory, limit):
    report = QuantizationReport(
        model="m", configuration={"memory": {"max_ram_mb": limit}}, blocks=blocks, memory=memory
    )
    page = parsed(report)
    assert len(rows(page, "layers")) == len(report.layers)
    assert not re.search(r"nan|inf", " ".join(page.xpath("//path/@d | //@style")))


def test_it_is_written_whole_or_not_at_all(report, tmp_path: Path):
    path = tmp_path / "new" / "report.html"
    save_html(report, str(path))
    assert path.read_text("utf-8") == report_html(report)
    report.blocks.append(None)
    with pytest.raises(AttributeError):
        save_html(report, path)
    assert [one.name for one in path.parent.iterdir()] == ["report.html"]
    assert path.read_text("utf-8").endswith("</html>\n")


@pytest.fixture(scope="module")
def browser(chromium: str) -> Iterator[object]:
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright drives the browser")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=chromium, args=["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run"]
        )
        yield browser
        browser.close()


@pytest.fixture
def show(browser, report, tmp_path: Path) -> Iterator[Callable]:
    """Open the report's page; a console message, an error or a request beyond the file fails the test."""
    complaints: list[str] = []
    contexts = []

    def open_page(**options: object):
        path = tmp_path / "page.html"
        save_html(report, path)
        contexts.append(browser.new_context(**{"viewport": {"width": 1200, "height": 900}, **options}))
        page = contexts[-1].new_page()
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


@pytest.mark.browser
def test_tables_are_sorted_by_their_heads(show, report):
    report.blocks[3] = dataclasses.replace(report.blocks[3], loss_before=math.nan)
    page = show()

    def column(table: str, number: int) -> list[str]:
        return page.locator(f"#{table} tbody tr > :nth-child({number})").all_inner_texts()

    page.locator("#layers th button").nth(1).click()
    rising = [float(text) for text in column("layers", 2)]
    assert rising == sorted(rising)
    assert rising[0] == 4.0
    page.locator("#layers th button").nth(1).click()
    assert [float(text) for text in column("layers", 2)] == rising[::-1]
    assert page.locator("#layers th[aria-sort=descending]").inner_text().startswith("SQNR")
    page.locator("#layers th button").nth(3).click()
    assert column("layers", 4)[-1] == "row"
    page.locator("#blocks th button").nth(2).click()
    assert column("blocks", 3)[-1] == "NaN"
    page.locator("#blocks th button").nth(2).click()
    assert column("blocks", 3)[0] == "0.016"
    assert column("blocks", 3)[-1] == "NaN"


@pytest.mark.browser
def test_pointing_tells_which_layer_it_is_also_after_sorting(show):
    page = show()
    page.locator("#layers th button").nth(1).click()
    plot = page.locator(".tall .plot")
    plot.scroll_into_view_if_needed()
    x, y = page.evaluate(
        "() => { const [x, y] = document.querySelector('.ring').getAttribute('d').match(/\\d+/g);"
        " const box = document.querySelector('.tall .plot').getBoundingClientRect();"
        " return [box.x + box.width * x / 1000, box.y + box.height * y / 1000]; }"
    )
    page.mouse.move(x + 2, y - 2)
    tip = plot.locator(".tip").inner_text().split("\n")
    assert tip[:3] == ["model.layers.2.self_attn.q_proj", "SQNR, dB: 4.00", "Bits: 2"]
    page.mouse.move(1, 1)
    assert not plot.locator(".tip").is_visible()


@pytest.mark.browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_both_themes_have_contrast(show, scheme):
    page = show(color_scheme=scheme)

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

    panel = luminance(".frame", "backgroundColor")
    assert (panel < 0.1) == (scheme == "dark")
    assert contrast(luminance("body", "color"), luminance("body", "backgroundColor")) >= 7
    for text in (".x", ".limit-name"):
        assert contrast(luminance(text, "color"), panel) >= 4.5
    for stroke in (".before", ".after", ".ring", ".line", *(f".c{number}" for number in range(4))):
        assert contrast(luminance(f"path{stroke}", "stroke"), panel) >= 3


@pytest.mark.browser
def test_a_phone_needs_no_scrolling_aside(show, report):
    report.model = "m" * 150
    report.notes.append("n" * 300)
    page = show(viewport={"width": 390, "height": 800}, has_touch=True)
    assert page.evaluate("document.documentElement.scrollWidth") == 390
    page.locator(".tall .plot").tap(position={"x": 250, "y": 100})
    tip = page.locator(".tall .tip").bounding_box()
    assert tip["x"] >= 0
    assert tip["x"] + tip["width"] <= 390


@pytest.mark.browser
def test_without_a_script_it_can_be_read(show, report):
    page = show(java_script_enabled=False)
    assert page.locator("th button").count() == 0
    assert page.locator("#layers tbody tr").count() == len(report.layers)
    assert page.locator(".steps figure").count() == 8
    box = page.locator(".frame.tall").bounding_box()
    assert box["height"] > 200


def together(**values: object) -> EndToEndReport:
    given = {"loss_before": 0.4, "loss_after": 0.3, "samples": 16, "held_out": True, "best_step": 75}
    losses = tuple(0.42 - step / 1000 for step in range(100))
    return EndToEndReport(**{**given, "step_losses": losses, "wall_s": 5.0, "peak_mb": 900.0, **values})


def test_training_of_all_scales_has_its_sentence_and_its_drawing(report: QuantizationReport) -> None:
    title = "Training of all scales together"
    assert title not in report_html(report)
    report.end_to_end = together()
    page = parsed(report)
    verdict = page.xpath("//p[@class='verdict']")[0].text_content()
    assert "from 0.4 to 0.3 nats a token (25.0% less), measured on 16 samples held out for that." in verdict
    assert "held at most 900 MB" in verdict
    (section,) = page.xpath(f"//section[h2='{title}']")
    assert "measured from 0.4 to 0.3 nats" in section.xpath(".//svg/@aria-label")[0]
    (before,), (after,) = (
        section.xpath(f".//path[@class='dots {style}']/@d") for style in ("before", "after")
    )
    assert before.startswith("M0 ")
    assert after.startswith("M750 ")
    # The y axis points down.
    assert int(before.split()[1].rstrip("h0")) < int(after.split()[1].rstrip("h0"))


def test_training_that_did_not_help_is_said(report: QuantizationReport) -> None:
    report.end_to_end = together(best_step=0, loss_after=0.4, held_out=False)
    verdict = parsed(report).xpath("//p[@class='verdict']")[0].text_content()
    assert (
        "did not bring predictions nearer to the float model's, measured on 16 samples: the scales" in verdict
    )


def test_losses_that_are_no_numbers_break_no_page(report: QuantizationReport) -> None:
    for losses in ((), (math.nan,), (0.4, math.inf, math.nan), (0.0,)):
        report.end_to_end = together(step_losses=losses, loss_after=math.nan, peak_mb=math.nan)
        page = parsed(report)
        assert not re.search(r"nan|inf\b", " ".join(page.xpath("//path/@d")))
