import dataclasses
import math
import re

import pytest
from llm_trainer.exceptions import ConfigurationError
from llm_trainer.training import HistoryRecord, TrainingHistory
from llm_trainer.training._report_charts import Scale, _thinned, charts_of, compact, readable, x_scale
from llm_trainer.training._report_page import report_html, summary
from llm_trainer.training.plots import save_loss_curve, save_run_report


def history_of(*records: dict) -> TrainingHistory:
    history = TrainingHistory()
    for number, changes in enumerate(records, 1):
        record = HistoryRecord(
            step=number * 10,
            tokens=number * 1000,
            wall_s=number * 30.0,
            tokens_per_s=33.0,
            train_loss=5.0 / number,
            eval_loss=None,
            lr=1e-3,
            grad_norm=1.0,
            skipped_steps=0,
        )
        history.append(dataclasses.replace(record, **changes))
    return history


def test_summary():
    history = history_of({"eval_loss": 2.0}, {"eval_loss": math.log(4)}, {"eval_loss": 2.0})
    assert " ".join(summary(history)) == (
        "30 steps over 3,000 tokens in 1 min 30 s, 33 tokens a second. The training loss ended at 1.6667 "
        "nats a token. The held-out loss ended at 2.0000 (perplexity 7.389); its lowest was 1.3863 "
        "(perplexity 4), after step 20. No step was skipped."
    )
    history = history_of({"train_loss": None}, {"train_loss": None, "eval_loss": 1.0, "skipped_steps": 1})
    sentences = summary(history, [3, 1000])
    assert sentences[1:] == [
        "The held-out loss ended at 1.0000 (perplexity 2.718), its lowest.",
        "1 step had no finite loss or gradient and changed nothing.",
        "Resumed 2 times, after step 3, 1,000.",
    ]
    assert "ended at nan (perplexity nan)." in " ".join(summary(history_of({"eval_loss": math.nan})))
    assert summary(TrainingHistory()) == ["Nothing has been recorded yet."]


@pytest.mark.parametrize(
    ("scale", "expected"),
    [
        (Scale(0, 400), "0: 0, 250: 100, 500: 200, 750: 300, 1000: 400"),
        (Scale(0.25, 0.75), "100: 0.3, 300: 0.4, 500: 0.5, 700: 0.6, 900: 0.7"),
        (Scale(1, 100, log=True), "0: 1, 151: 2, 349: 5, 500: 10, 651: 20, 849: 50, 1000: 100"),
        # Nothing below the stretch is drawn at its edge.
        (Scale(3, 30, log=True), "222: 5, 523: 10, 824: 20"),
        (Scale(1, 1e4, log=True), "0: 1, 250: 10, 500: 100, 750: 1,000, 1000: 10,000"),
    ],
)
def test_ticks(scale, expected):
    assert ", ".join(f"{place:.0f}: {label}" for place, label in scale.ticks(readable)) == expected


@pytest.mark.parametrize(
    ("value", "long", "short"),
    [
        (0, "0", "0"),
        (0.00012345, "1.23e-04", "0.000123"),
        (3.14159, "3.142", "3.14"),
        (123456, "123,456", "123k"),
        (1.5e9, "1.50e+09", "1.5G"),
    ],
)
def test_numbers(value, long, short):
    assert (readable(value), compact(value)) == (long, short)


def test_thinning_keeps_what_stands_out():
    values = [math.sin(i / 50) for i in range(100_000)]
    values[777], values[50_001] = 9.0, -9.0
    kept = _thinned(values)
    assert len(kept) <= 2000
    assert {0, 777, 50_001, 99_999} <= set(kept)
    assert kept == sorted(set(kept))
    assert _thinned(values[:2000]) == list(range(2000))


def test_only_finite_values_are_drawn():
    history = history_of(
        {"train_loss": math.nan, "grad_norm": 0.0}, {"train_loss": 2.0}, {"train_loss": None, "mfu": 0.25}
    )
    charts = {chart.title: chart for chart in charts_of(history)}
    assert charts["Loss"].series[0].values == [2.0]
    assert charts["Gradient norm"].series[0].values == [1.0, 1.0]
    assert charts["Model FLOPs utilisation"].series[0].values == [25.0]
    assert "Memory" not in charts
    page = report_html(history)
    assert not re.search(r"\bNaN|\bInfinity", page.split("<script>")[0])


def test_a_page_without_records_or_of_one():
    assert "Nothing has been recorded" in report_html(TrainingHistory())
    page = report_html(history_of({}))
    assert page.count('class="dots s0"') == page.count("<figure")
    flat = history_of({"wall_s": 0.0, "tokens": 0})
    assert x_scale(flat, "time", log=True).low > 0
    assert "<figure" in report_html(flat)


def test_the_page_without_a_script_shows_the_curve():
    history = history_of({"train_loss": 1.0}, {"train_loss": 3.0}, {"train_loss": 2.0})
    page = report_html(history)
    (path,) = re.findall(r'<path class="line s0" d="M([^"]+)"', page.split("</figure>")[0])
    points = [tuple(map(float, point.split())) for point in path.split("L")]
    # Steps 10, 20, 30 of 0 to 30; losses in 1 to 3 with a twentieth of that to spare on either side.
    assert points == [
        (pytest.approx(1000 * step / 30, abs=0.06), pytest.approx(1000 * (3.1 - loss) / 2.2, abs=0.06))
        for step, loss in ((10, 1), (20, 3), (30, 2))
    ]


def test_all_text_is_escaped():
    evil = "</script><img src=x onerror=alert(1)>\ud800"
    page = report_html(history_of({}), title=evil, settings={evil: {evil: evil}, "plain": evil})
    assert "<img" not in page
    assert page.count("</script>") == 2
    assert page.count("&lt;img src=x") == 6


def test_settings_are_grouped():
    page = report_html(
        history_of({}), settings={"seed": 7, "training": {"betas": (0.9, 0.95), "name": None}, "host": "a"}
    )
    cells = re.findall(r"<summary>(\w+)</summary>|<th scope='row'>(\w+)</th><td>([^<]*)</td>", page)
    assert cells == [
        ("Settings", "", ""),
        ("", "seed", "7"),
        ("", "host", "a"),
        ("Training", "", ""),
        ("", "betas", "[0.9, 0.95]"),
        ("", "name", "null"),
    ]


def test_the_ending_says_the_kind(tmp_path):
    history = history_of({}, {"eval_loss": 2.0})
    save_loss_curve(history, tmp_path / "run.html")
    save_run_report(history, tmp_path / "same.html")
    assert (tmp_path / "run.html").read_text() == (tmp_path / "same.html").read_text()
    assert (tmp_path / "run.html").read_text().startswith("<!doctype html>")
    save_loss_curve(history, tmp_path / "run.png")
    assert (tmp_path / "run.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ConfigurationError, match="must end in"):
        save_loss_curve(history, tmp_path / "run.gif")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run.html", "run.png", "same.html"]
