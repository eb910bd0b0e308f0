"""How far a quantisation is: alive on a terminal, a line a block elsewhere, or not at all."""

from __future__ import annotations

import math
import sys
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Self

from av_memory import get_cpu_memory

from auto_round._text import duration, figure, megabytes, printable, recovered
from auto_round.quantization._calibration_files import optional

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.live import Live

    from auto_round.quantization._report import BlockReport

_REFRESHES_A_SECOND = 4
_BAR_WIDTH = 24


class SilentProgress:
    """Shows nothing."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def begin(self, blocks: int, steps: int) -> None:
        """Take note of nothing."""

    def step(self, block: int, step: int, loss: float) -> None:
        """Take note of nothing."""

    def block(self, index: int, report: BlockReport) -> None:
        """Take note of nothing."""

    def end_to_end(self, step: int, steps: int, loss: float) -> None:
        """Take note of nothing."""


@dataclass
class _Reached:
    """How far the work is."""

    blocks: int = 0
    steps: int = 0
    done: int = 0
    taken: int = 0
    """Steps within the block that is worked on."""
    loss: float = math.nan
    last: BlockReport | None = None
    together: tuple[int, int, float] | None = None
    """Steps in which all scales are trained together: taken, of how many, and the loss of the last."""
    began: float = field(default_factory=lambda: time.perf_counter())

    @property
    def elapsed_s(self) -> float:
        return time.perf_counter() - self.began

    def to_go(self) -> str:
        """Return the time to go, were the rest as fast; nothing before anything was done and at the end."""
        within = min(self.taken / self.steps, 1.0) if self.steps else 0.0
        share = min((self.done + within) / self.blocks, 1.0) if self.blocks else 1.0
        return f"{duration(self.elapsed_s * (1 - share) / share)} to go" if 0 < share < 1 else ""


class RichProgress:
    """Shows the blocks done, the steps within one, losses, memory, and time passed and to go, with rich.

    On a terminal, inside `with`, three lines are kept up to date four times a second, by a thread of rich's;
    leaving the `with`, by Ctrl-C too, gives the terminal back. Without `with` nothing would do that, so then,
    and on a pipe or a terminal that cannot move its cursor, each block is one plain line.

    The time to go takes all blocks for equally long. Losses are mean squared errors of a block's output.

    Args:
        console: Where to show it; standard error if None.

    Raises:
        MissingPackageError: rich is not installed; it is an `ImportError` too.
    """

    def __init__(self, console: Console | None = None) -> None:
        self._console: Console = _standard_error() if console is None else console
        self._reached = _Reached()
        self._within = False
        self._live: Live | None = None

    def __enter__(self) -> Self:
        self._within = True
        return self

    def __exit__(self, *error: object) -> None:
        self._within = False
        self._stop()

    def begin(self, blocks: int, steps: int) -> None:
        """Start to show work on so many blocks, each with so many steps of training."""
        self._stop()
        self._reached = _Reached(blocks=blocks, steps=steps)
        if self._within and self._console.is_interactive:
            from rich.live import Live

            self._live = Live(
                get_renderable=self._view, console=self._console, refresh_per_second=_REFRESHES_A_SECOND
            )
            self._live.start(refresh=True)

    def step(self, block: int, step: int, loss: float) -> None:
        """Note a step, counted from 0, of a block, and its loss relative to rounding to nearest."""
        reached = self._reached
        reached.done, reached.taken, reached.loss = block, step + 1, loss

    def block(self, index: int, report: BlockReport) -> None:
        """Note that the block of this index, counted from 0, is done; without a terminal, print it."""
        reached = self._reached
        reached.done, reached.taken, reached.loss, reached.last = index + 1, 0, math.nan, report
        if self._live is None:
            done = f"block {reached.done}/{reached.blocks} {_outcome(report)}"
            text = _joined(done, megabytes(get_cpu_memory()), reached.to_go())
            self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def end_to_end(self, step: int, steps: int, loss: float) -> None:
        """Note a step, counted from 0, of training all scales; without a terminal, print a tenth of them."""
        self._reached.together = step + 1, steps, loss
        if self._live is None and (step + 1) * 10 // steps > step * 10 // steps:
            text = _joined(f"scales {step + 1}/{steps}", _nats(loss), megabytes(get_cpu_memory()))
            self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def _stop(self) -> None:
        if self._live is not None:
            live, self._live = self._live, None
            live.stop()

    def _view(self) -> RenderableType:
        from rich.console import Group
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        reached = self._reached
        lines = Table.grid(padding=(0, 1))
        for _ in range(4):
            lines.add_column(no_wrap=True)

        def add(name: str, done: int, of: int, status: str) -> None:
            bar = ProgressBar(total=max(of, 1), completed=done, width=_BAR_WIDTH)
            lines.add_row(Text(name), bar, Text(f"{done}/{of}"), Text(status))

        status = _joined(duration(reached.elapsed_s), reached.to_go(), megabytes(get_cpu_memory()))
        add("blocks", reached.done, reached.blocks, status)
        if reached.steps and reached.done < reached.blocks:
            loss = f"loss {reached.loss:.1%} of rounding to nearest" if math.isfinite(reached.loss) else ""
            add("steps", reached.taken, reached.steps, loss)
        if reached.together is not None:
            taken, steps, loss = reached.together
            add("scales", taken, steps, _nats(loss))
        if reached.last is None:
            return lines
        last = Text(f"last: {_outcome(reached.last)}", no_wrap=True, overflow="ellipsis")
        return Group(lines, last)


def _standard_error() -> Console:
    # rich takes a pipe for a terminal where FORCE_COLOR is set, and would move its cursor.
    is_terminal = sys.stderr is not None and sys.stderr.isatty()
    force_terminal = None if is_terminal else False
    return optional("rich.console", "Showing progress").Console(stderr=True, force_terminal=force_terminal)


def _joined(*parts: str) -> str:
    return ", ".join(part for part in parts if part)


def _nats(loss: float) -> str:
    return f"{figure(loss)} nats a token from the float model"


def _outcome(report: BlockReport) -> str:
    """Return what became of a block, on one line."""
    losses = ""
    if report.loss_before is not None or report.loss_after is not None:
        share = recovered(report.loss_before, report.loss_after)
        change = "" if share is None else f" ({abs(share):.1%} {'less' if share >= 0 else 'more'})"
        losses = f"loss {figure(report.loss_before)} -> {figure(report.loss_after)}{change}"
    return _joined(printable(report.name), losses, duration(report.wall_s))
