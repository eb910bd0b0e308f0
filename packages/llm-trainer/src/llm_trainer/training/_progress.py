"""Progress on the terminal, or in lines where there is none."""

from __future__ import annotations

import av_memory
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from llm_trainer.training._history import HistoryRecord


class ProgressReport:
    """A bar with the loss, tokens a second, time to go and memory; plain lines, one a record, elsewhere."""

    def __init__(self, total_steps: int, console: Console | None = None) -> None:
        self._console = console or Console(stderr=True)
        self._total = total_steps
        self._live: Progress | None = None
        if self._console.is_terminal:
            self._live = Progress(
                TextColumn("training"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[status]}"),
                TimeRemainingColumn(),
                console=self._console,
            )
            self._task = self._live.add_task("training", total=total_steps, status="")

    def start(self) -> None:
        """Take hold of the terminal, until `close`."""
        if self._live is not None:
            self._live.start()

    def step(self, step: int, loss: float | None, tokens_per_s: float) -> None:
        """Show a step on the bar; without a terminal, nothing."""
        if self._live is not None:
            self._live.update(self._task, completed=step, status=_status(loss, tokens_per_s))

    def record(self, record: HistoryRecord) -> None:
        """Print a record: all of them without a terminal, evaluations with one."""
        if self._live is not None and record.eval_loss is None:
            return
        to_go = record.wall_s / record.step * (self._total - record.step)
        held_out = "" if record.eval_loss is None else f"  held-out loss {record.eval_loss:.4f}"
        self._console.print(
            f"step {record.step}/{self._total}  {_status(record.train_loss, record.tokens_per_s)}"
            f"  lr {record.lr:.2e}  {to_go:.0f} s to go{held_out}",
            highlight=False,
            soft_wrap=True,
        )

    def close(self) -> None:
        """Leave the terminal as it was."""
        if self._live is not None:
            self._live.stop()


def _status(loss: float | None, tokens_per_s: float) -> str:
    shown = "skipped" if loss is None else f"loss {loss:.4f}"
    return f"{shown}  {tokens_per_s:,.0f} tokens/s  {av_memory.get_cpu_memory():,.0f} MB"
