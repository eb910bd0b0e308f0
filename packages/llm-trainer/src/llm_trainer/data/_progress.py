"""Showing how far a long preparation is."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from types import TracebackType
from typing import TYPE_CHECKING, Self

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

if TYPE_CHECKING:
    from llm_trainer.data._encode import Encoded


class EncodingProgress:
    """A line on a terminal's standard error with the documents and tokens so far; nothing elsewhere."""

    def __init__(self, show: bool | None) -> None:
        self._documents = self._tokens = 0
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("tokenizing: {task.fields[documents]:,} documents, {task.fields[tokens]:,} tokens"),
            TimeElapsedColumn(),
            console=Console(stderr=True),
            transient=True,
            disable=not (sys.stderr.isatty() if show is None else show),
        )

    def __enter__(self) -> Self:
        self._task = self._progress.add_task("", total=None, documents=0, tokens=0)
        self._progress.start()
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._progress.stop()

    def count(self, parts: Iterable[Encoded]) -> Iterator[Encoded]:
        """Pass the parts on, counted."""
        for part in parts:
            self._documents += len(part.ends)
            self._tokens += len(part.ids)
            self._progress.update(self._task, documents=self._documents, tokens=self._tokens)
            yield part
