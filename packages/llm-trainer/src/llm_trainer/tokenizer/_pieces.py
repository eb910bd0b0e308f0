"""Feeding texts to training: checked, in pieces of bounded size, with progress."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from llm_trainer.exceptions import TokenizerError
from llm_trainer.tokenizer._special import refuse_surrogates

_PIECE_CHARS = 1 << 18


class Pieces:
    """Texts cut at line breaks into pieces of bounded size, counted."""

    def __init__(self, texts: Iterable[str], report: Reading) -> None:
        if isinstance(texts, str):
            raise TokenizerError("texts is one string; give an iterable of strings, such as [text].")
        self._texts = texts
        self._report = report
        self.count = 0

    def __iter__(self) -> Iterator[str]:
        for text in self._texts:
            if not isinstance(text, str):
                raise TokenizerError(f"Training texts must be strings, not {type(text).__name__}.")
            refuse_surrogates(text)
            start = 0
            while start < len(text):
                end = start + _PIECE_CHARS
                if end < len(text):
                    end = text.rfind("\n", start, end) + 1 or end
                self.count += 1
                yield text[start:end]
                start = end
            self._report.add(len(text))
        self._report.done()


class Reading:
    """How much has been read, shown on a terminal."""

    def __init__(self, live: Progress | None) -> None:
        self._live = live
        self._texts = self._characters = 0
        self._task = None if live is None else live.add_task("reading", status="")

    def add(self, characters: int) -> None:
        """Count a text."""
        self._texts += 1
        self._characters += characters
        if self._live is not None and self._task is not None:
            self._live.update(self._task, status=self._status())

    def done(self) -> None:
        """Say that what remains is work on what was read."""
        if self._live is not None and self._task is not None:
            self._live.update(self._task, description="merging", status=self._status())

    def _status(self) -> str:
        return f"{self._texts:,} texts, {self._characters / 1e6:,.1f}M characters"


@contextmanager
def reading_progress(show: bool | None, console: Console | None = None) -> Generator[Reading]:
    """Show what is read while in the context: if `show`, or by default if standard error is a terminal."""
    console = console or Console(stderr=True)
    if not (console.is_terminal if show is None else show):
        yield Reading(None)
        return
    columns = (
        SpinnerColumn(),
        TextColumn("tokenizer: {task.description}"),
        TextColumn("{task.fields[status]}"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console) as live:
        yield Reading(live)
