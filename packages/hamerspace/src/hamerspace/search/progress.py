"""What is shown while candidates are tried."""

from __future__ import annotations

import sys
from typing import Any


class Progress:
    """One line a candidate that is done, and a bar with the time that is gone, on standard error.

    Args:
        steps: how many there are.
        shown: None shows them where standard error is a terminal.
    """

    def __init__(self, steps: int, *, shown: bool | None = None) -> None:
        self._steps = steps
        self._shown = sys.stderr.isatty() if shown is None else shown
        self._bar: Any = None
        self._task: Any = None

    def __enter__(self) -> Progress:
        if self._shown:
            from rich.console import Console
            from rich.progress import (
                BarColumn,
                MofNCompleteColumn,
                SpinnerColumn,
                TextColumn,
                TimeElapsedColumn,
            )
            from rich.progress import Progress as Bar

            self._bar = Bar(
                SpinnerColumn(),
                BarColumn(bar_width=24),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TextColumn("{task.description}", markup=False),
                console=Console(stderr=True),
                transient=True,
            )
            self._bar.start()
            self._task = self._bar.add_task("", total=self._steps)
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def begin(self, what: str) -> None:
        """Say what is tried now."""
        if self._bar is not None:
            self._bar.update(self._task, description=what)

    def end(self, outcome: str) -> None:
        """Say what became of it."""
        if self._bar is not None:
            self._bar.console.print(outcome, markup=False, highlight=False, soft_wrap=True)
            self._bar.advance(self._task)
