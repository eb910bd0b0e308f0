import inspect
import io
import os
import re
import select
import signal
import subprocess
import sys
import time

import pytest
from auto_round.exceptions import AutoRoundError
from auto_round.quantization._progress import RichProgress, SilentProgress
from auto_round.quantization._report import BlockReport
from auto_round.quantization._walk import Progress
from rich.console import Console

CONTROL = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
HIDDEN, SHOWN = "\x1b[?25l", "\x1b[?25h"


def block(name: str = "model.layers.0", before: float | None = None, after: float | None = None):
    return BlockReport(name=name, layers=(), loss_before=before, loss_after=after, wall_s=12.34)


@pytest.fixture
def clock(monkeypatch):
    now = [100.0]
    monkeypatch.setattr("auto_round.quantization._progress.time.perf_counter", lambda: now[0])
    monkeypatch.setattr("auto_round.quantization._progress.get_cpu_memory", lambda: 412.4)
    return now


def terminal(width: int = 120) -> tuple[io.StringIO, Console]:
    out = io.StringIO()
    return out, Console(file=out, force_terminal=True, width=width, color_system=None, _environ={})


def seen(progress: RichProgress, out: io.StringIO) -> list[str]:
    """The lines that the next refresh draws."""
    out.truncate(out.seek(0))
    progress._live.refresh()
    return [line.rstrip() for line in CONTROL.sub("", out.getvalue()).replace("\r", "").split("\n")]


@pytest.mark.parametrize("kind", [RichProgress, SilentProgress])
@pytest.mark.parametrize("name", ["begin", "step", "block", "end_to_end"])
def test_both_are_what_the_walk_calls(kind, name):
    def parameters(owner: type) -> list[tuple[str, object]]:
        given = inspect.signature(getattr(owner, name)).parameters.values()
        return [(one.name, one.kind) for one in given]

    assert parameters(kind) == parameters(Progress)


def test_a_line_a_block_where_there_is_no_terminal(clock):
    out = io.StringIO()
    with RichProgress(Console(file=out, width=40)) as progress:
        progress.begin(4, 100)
        progress.step(0, 0, 0.9)
        clock[0] += 30
        progress.block(0, block("model.layers.0", 2e-4, 1.5e-4))
        clock[0] += 20
        progress.block(1, block("[bold]odd[/bold]\x1b[2J\n", 1e-4, 2e-4))
        progress.block(2, block("no loss"))
        progress.block(3, block("none", 0.0, 0.0))
    # After one of four blocks in 30 s there are 90 s to go, after two in 50 s there are 50 s.
    assert out.getvalue().splitlines() == [
        "block 1/4 model.layers.0, loss 0.0002 -> 0.00015 (25.0% less), 12.3 s, 412 MB, 1 min 30 s to go",
        "block 2/4 [bold]odd[/bold]\\x1b[2J\\n, loss 0.0001 -> 0.0002 (100.0% more), 12.3 s, 412 MB,"
        " 50.0 s to go",
        "block 3/4 no loss, 12.3 s, 412 MB, 16.7 s to go",
        "block 4/4 none, loss 0 -> 0, 12.3 s, 412 MB",
    ]


def test_three_lines_on_a_terminal(clock):
    out, console = terminal()
    with RichProgress(console) as progress:
        progress.begin(8, 200)
        first, second = seen(progress, out)
        assert first.endswith("0/8   0.0 s, 412 MB")
        assert second.endswith("0/200")
        clock[0] += 60
        progress.step(1, 99, 0.6123)
        first, second = seen(progress, out)
        # A block and a half of eight in a minute.
        assert re.fullmatch(r"blocks .+ 1/8 +1 min 00 s, 4 min 20 s to go, 412 MB", first)
        assert re.fullmatch(r"steps .+ 100/200 loss 61\.2% of rounding to nearest", second)
        progress.block(1, block("a.b", 4.0, 1.0))
        first, second, last = seen(progress, out)
        assert "2/8" in first
        assert re.fullmatch(r"steps .+ 0/200", second)
        assert last == "last: a.b, loss 4 -> 1 (75.0% less), 12.3 s"
        progress.block(7, block("a.c"))
        first, last = seen(progress, out)
        assert first.endswith(" 8/8 1 min 00 s, 412 MB")
        assert last == "last: a.c, 12.3 s"


def test_without_training_there_are_no_steps(clock):
    out, console = terminal()
    with RichProgress(console) as progress:
        progress.begin(8, 0)
        progress.block(0, block())
        assert [line.split()[0] for line in seen(progress, out)] == ["blocks", "last:"]


def test_training_of_all_scales_has_a_line_of_its_own(clock):
    out, console = terminal()
    with RichProgress(console) as progress:
        progress.begin(1, 0)
        progress.block(0, block())
        progress.end_to_end(6, 200, 0.123456)
        blocks, scales, _ = seen(progress, out)
        assert "1/1" in blocks
        assert re.fullmatch(r"scales .+ 7/200 0\.123 nats a token from the float model", scales)
        progress.begin(1, 0)
        assert len(seen(progress, out)) == 1


def test_a_tenth_of_the_steps_of_training_all_scales_is_a_line(clock):
    out = io.StringIO()
    with RichProgress(Console(file=out, width=40)) as progress:
        progress.begin(1, 0)
        for step in range(50):
            progress.end_to_end(step, 50, 1 / (step + 1))
    lines = out.getvalue().splitlines()
    assert len(lines) == 10
    assert lines[0] == "scales 5/50, 0.2 nats a token from the float model, 412 MB"
    assert lines[-1].startswith("scales 50/50, 0.02 nats")


def test_a_narrow_terminal_keeps_its_lines(clock):
    out, console = terminal(30)
    with RichProgress(console) as progress:
        progress.begin(8, 200)
        progress.step(0, 0, 0.5)
        progress.block(0, block("a.very.long.name.of.a.block" * 3, 1.0, 0.5))
        lines = seen(progress, out)
    assert len(lines) == 3
    assert max(map(len, lines)) <= 30


@pytest.mark.parametrize("failure", [KeyboardInterrupt, RuntimeError])
def test_whatever_ends_it_shows_the_cursor_again(failure):
    out, console = terminal()
    progress = RichProgress(console)

    def work() -> None:
        with progress:
            progress.begin(8, 200)
            assert out.getvalue().count(HIDDEN) == 1
            raise failure

    with pytest.raises(failure):
        work()
    assert out.getvalue().rstrip().endswith(SHOWN)
    assert progress._live is None


def test_a_second_run_takes_the_first_ones_display_down():
    out, console = terminal()
    with RichProgress(console) as progress:
        for _ in range(2):
            progress.begin(8, 200)
            progress.step(5, 1, 0.5)
    assert out.getvalue().count(HIDDEN) == out.getvalue().count(SHOWN) == 2


@pytest.mark.parametrize("how", ["outside with", "dumb"])
def test_what_could_not_be_taken_down_is_not_put_up(how):
    out = io.StringIO()
    environment = {"TERM": "dumb"} if how == "dumb" else {}
    console = Console(file=out, force_terminal=True, width=200, color_system=None, _environ=environment)
    progress = RichProgress(console)
    if how == "dumb":
        progress.__enter__()
    progress.begin(2, 10)
    progress.block(0, block())
    assert out.getvalue().count("\n") == 1
    assert "\x1b" not in out.getvalue()


def test_standard_error_that_is_no_terminal_gets_lines_even_if_colour_is_forced(capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    with RichProgress() as progress:
        progress.begin(1, 10)
        progress.block(0, block())
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("block 1/1 model.layers.0, 12.3 s, ")
    assert "\x1b" not in captured.err


def test_silence(capsys):
    with SilentProgress() as progress:
        progress.begin(1, 10)
        progress.step(0, 0, 1.0)
        progress.block(0, block())
    assert capsys.readouterr() == ("", "")


def test_without_rich_it_says_what_to_install(monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "rich"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "rich", None)
    with pytest.raises(ImportError, match="pip install rich") as caught:
        RichProgress()
    assert isinstance(caught.value, AutoRoundError)


def test_rich_is_loaded_when_first_used():
    code = (
        "import sys, auto_round.quantization._progress as p; assert 'rich' not in sys.modules;"
        "p.SilentProgress(); assert 'rich' not in sys.modules; p.RichProgress(); assert 'rich' in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


@pytest.mark.skipif(not hasattr(os, "openpty"), reason="needs a pseudo terminal")
def test_ctrl_c_leaves_the_terminal_as_it_was():
    import pty
    import termios

    code = (
        "import time\nfrom auto_round.quantization._progress import RichProgress\n"
        "with RichProgress() as progress:\n"
        "    progress.begin(4, 10)\n    progress.step(1, 4, 0.5)\n    time.sleep(60)\n"
    )
    ours, theirs = pty.openpty()
    before = termios.tcgetattr(theirs)
    environment = {**os.environ, "TERM": "xterm"}
    child = subprocess.Popen([sys.executable, "-c", code], stderr=theirs, env=environment)
    text = b""
    try:
        deadline = time.monotonic() + 60
        while b"50.0%" not in text and time.monotonic() < deadline:
            if select.select([ours], [], [], 1)[0]:
                text += os.read(ours, 65536)
        assert b"50.0%" in text
        child.send_signal(signal.SIGINT)
        child.wait(30)
        while select.select([ours], [], [], 0.2)[0]:
            text += os.read(ours, 65536)
    finally:
        child.kill()
        child.wait()
    drawn = text.decode()
    assert drawn.count(HIDDEN) == 1
    assert drawn.rindex(SHOWN) > drawn.rindex(HIDDEN)
    assert "KeyboardInterrupt" in drawn[drawn.rindex(SHOWN) :]
    assert termios.tcgetattr(theirs) == before
    os.close(ours)
    os.close(theirs)


def test_a_step_costs_less_than_a_hundredth_of_30_ms():
    """A step's share of what is drawn in its time, and its own call; the best of several, on busy cores."""
    _, console = terminal()
    with RichProgress(console) as progress:
        progress.begin(24, 200)
        progress.block(0, block("model.layers.0", 1e-3, 5e-4))
        step_s = refresh_s = 1.0
        for _ in range(5):
            start = time.thread_time()
            for number in range(1000):
                progress.step(1, number, 0.5)
            step_s = min(step_s, (time.thread_time() - start) / 1000)
            start = time.thread_time()
            for _ in range(10):
                progress._live.refresh()
            refresh_s = min(refresh_s, (time.thread_time() - start) / 10)
        assert progress._live.refresh_per_second <= 10
        share = (step_s + refresh_s * progress._live.refresh_per_second * 0.03) / 0.03
    assert share < 0.01
