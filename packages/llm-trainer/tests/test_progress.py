import io
import re

import pytest
from llm_trainer.training import HistoryRecord
from llm_trainer.training._progress import ProgressReport, format_duration
from rich.console import Console


def record(step: int, eval_loss: float | None = None, **more: float) -> HistoryRecord:
    return HistoryRecord(
        step=step,
        tokens=step,
        wall_s=1000.0,
        tokens_per_s=1234.5,
        train_loss=2.5,
        eval_loss=eval_loss,
        lr=3e-4,
        grad_norm=1.0,
        skipped_steps=0,
        **more,
    )


@pytest.fixture
def clock(monkeypatch):
    now = [100.0]
    monkeypatch.setattr("llm_trainer.training._progress.time.perf_counter", lambda: now[0])
    return now


def test_lines_where_there_is_no_terminal(clock):
    out = io.StringIO()
    report = ProgressReport(50, Console(file=out, width=40), first_step=40)
    report.start()
    clock[0] += 60
    report.step(42, 2.5, 1234.5)
    report.evaluating(1, 2)
    report.saving()
    report.record(record(42, 2.25, mfu=0.314, rss_mb=512.0))
    report.message("[bold]saved[/bold]")
    report.record(record(50, rss_mb=600.0))
    report.close()
    # 2 of the 10 steps that were left took a minute.
    assert out.getvalue().splitlines() == [
        "step 42/50  loss 2.5000  1,234 tokens/s  MFU 31.4%  512 MB  lr 3.00e-04  4 min 00 s to go"
        "  held-out loss 2.2500",
        "[bold]saved[/bold]",
        "step 50/50  loss 2.5000  1,234 tokens/s  600 MB  lr 3.00e-04  0 s to go",
    ]


def test_a_bar_on_a_terminal():
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=140, color_system=None)
    report = ProgressReport(50, console, first_step=10)
    report.start()

    def seen_after(action) -> str:
        out.truncate(out.seek(0))
        action()
        report._live.refresh()
        return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", out.getvalue())

    assert "10/50" in seen_after(lambda: None)
    shown = seen_after(lambda: report.step(11, 2.5, 1234.5, 0.25))
    assert re.search(r"training .* 11/50 loss 2\.5000  1,234 tokens/s  MFU 25\.0%  [\d,]+ MB", shown)
    assert re.search(r"evaluating .* 3/8", seen_after(lambda: report.evaluating(3, 8)))
    assert "evaluating" not in seen_after(lambda: report.evaluating(8, 8))
    assert re.search(r"evaluating .* 3/\?", seen_after(lambda: report.evaluating(3, None)))
    shown = seen_after(report.saving)
    assert re.search(r"saving .* 11/50", shown)
    assert "evaluating" not in shown
    assert "skipped" in (shown := seen_after(lambda: report.step(12, None, 1.0)))
    assert "saving" not in shown
    assert "held-out loss 2.2500" in seen_after(lambda: report.record(record(12, 2.25)))
    assert "lr" not in seen_after(lambda: report.record(record(12)))
    report.close()
    assert out.getvalue().endswith("\x1b[?25h")


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.4, "0 s"),
        (59.4, "59 s"),
        (59.6, "1 min 00 s"),
        (3599, "59 min 59 s"),
        (4020, "1 h 07 min"),
        (86400 * 3 + 4 * 3600 + 59, "3 d 04 h"),
        (float("inf"), "unknown time"),
    ],
)
def test_durations(seconds, text):
    assert format_duration(seconds) == text
