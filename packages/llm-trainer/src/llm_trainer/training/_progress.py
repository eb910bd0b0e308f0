"""Progress on the terminal, or in lines where there is none."""

from __future__ import annotations

import math
import time

import av_memory
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from llm_trainer.training._history import HistoryRecord


class ProgressReport:
    """A bar with the loss, tokens a second, memory and time to go; plain lines, one a record, elsewhere."""

    def __init__(self, total_steps: int, console: Console | None = None, *, first_step: int = 0) -> None:
        """Prepare; nothing is shown yet.

        Args:
            total_steps: Steps of the run.
            console: Where to show it; standard error by default.
            first_step: Steps that were taken before this sitting, which say nothing of its speed.
        """
        self._console = console or Console(stderr=True)
        self._total = total_steps
        self._first = first_step
        self._began = time.perf_counter()
        self._live: Progress | None = None
        self._evaluation: TaskID | None = None
        if self._console.is_terminal:
            self._live = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[status]}", markup=False),
                TimeRemainingColumn(),
                console=self._console,
            )
            self._task = self._live.add_task("training", total=total_steps, completed=first_step, status="")

    def start(self) -> None:
        """Take hold of the terminal, until `close`."""
        self._began = time.perf_counter()
        if self._live is not None:
            self._live.start()

    def step(self, step: int, loss: float | None, tokens_per_s: float, mfu: float | None = None) -> None:
        """Show a step on the bar; without a terminal, nothing."""
        if self._live is not None:
            self._end_evaluation()
            status = _status(loss, tokens_per_s, mfu, av_memory.get_cpu_memory())
            self._live.update(self._task, description="training", completed=step, status=status)

    def evaluating(self, done: int, total: int | None) -> None:
        """Show how many batches of an evaluation are done, of how many if that is known; without a terminal,
        nothing.
        """
        if self._live is None:
            return
        if self._evaluation is None:
            self._evaluation = self._live.add_task("evaluating", total=total, status="")
        self._live.update(self._evaluation, completed=done)
        if done == total:
            self._end_evaluation()

    def saving(self) -> None:
        """Show that a checkpoint is being written, until the next step; without a terminal, nothing."""
        if self._live is not None:
            self._end_evaluation()
            self._live.update(self._task, description="saving", refresh=True)

    def message(self, text: str) -> None:
        """Print a line, above the bar where there is one."""
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def record(self, record: HistoryRecord) -> None:
        """Print a record: all of them without a terminal, evaluations with one."""
        self._end_evaluation()
        if self._live is not None and record.eval_loss is None:
            return
        memory_mb = av_memory.get_cpu_memory() if record.rss_mb is None else record.rss_mb
        status = _status(record.train_loss, record.tokens_per_s, record.mfu, memory_mb)
        line = f"step {record.step}/{self._total}  {status}  lr {record.lr:.2e}{self._to_go(record.step)}"
        self.message(line + ("" if record.eval_loss is None else f"  held-out loss {record.eval_loss:.4f}"))

    def close(self) -> None:
        """Leave the terminal as it was."""
        if self._live is not None:
            self._end_evaluation()
            self._live.stop()

    def _end_evaluation(self) -> None:
        if self._live is not None and self._evaluation is not None:
            self._live.remove_task(self._evaluation)
            self._evaluation = None

    def _to_go(self, step: int) -> str:
        taken = step - self._first
        if taken < 1:
            return ""
        seconds = (time.perf_counter() - self._began) / taken * (self._total - step)
        return f"  {format_duration(seconds)} to go"


def format_duration(seconds: float) -> str:
    """Return a duration for people: `7 s`, `2 min 05 s`, `1 h 07 min`, `3 d 04 h`."""
    if not math.isfinite(seconds):
        return "unknown time"
    whole = max(0, round(seconds))
    for size, name, part, part_name in ((86400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s")):
        if whole >= size:
            return f"{whole // size} {name} {whole % size // part:02d} {part_name}"
    return f"{whole} s"


def _status(loss: float | None, tokens_per_s: float, mfu: float | None, memory_mb: float) -> str:
    shown = "skipped" if loss is None else f"loss {loss:.4f}"
    share = "" if mfu is None else f"  MFU {mfu:.1%}"
    return f"{shown}  {tokens_per_s:,.0f} tokens/s{share}  {memory_mb:,.0f} MB"
