"""The logs that are one file of records: CSV and JSON Lines."""

from __future__ import annotations

import csv
import io
import json
import logging
import math
from abc import abstractmethod
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, ClassVar, cast

from llm_trainer._files import check_version, write_text
from llm_trainer.training._logs._append import AppendFile
from llm_trainer.training._logs._base import RunLogger

_logger = logging.getLogger(__name__)

Row = tuple[int, dict[str, float]]
"""A step and its figures."""

FORMAT = "llm-trainer-metrics"
FORMAT_VERSION = 1

COLUMNS = (
    "train/loss",
    "eval/loss",
    "eval/perplexity",
    "train/lr",
    "train/grad_norm",
    "train/tokens",
    "train/tokens_per_s",
    "train/mfu",
    "train/epoch",
    "train/wall_s",
    "train/skipped_steps",
    "memory/rss_mb",
)
"""Columns that every CSV log begins with, so that the files of two runs stand beside each other."""


class TableLogger(RunLogger):
    """One file of rows; at a resume it is rewritten without those after the resumed step."""

    file_name: ClassVar[str]

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.path = folder / self.file_name
        self._run_info: dict[str, Any] = {}
        self._file: AppendFile | None = None

    def _start(self, run_info: dict[str, Any], resumed_from_step: int | None) -> None:
        self._close()
        self._run_info = run_info
        rows: list[Row] = []
        if resumed_from_step is not None and self.path.exists():
            rows = [row for row in self._read_back() if row[0] <= resumed_from_step]
        self._rewrite(rows)

    def _rewrite(self, rows: Sequence[Row]) -> None:
        write_text(self.path, self._text(rows))
        self._close()
        self._file = AppendFile(self.path)

    def _read_back(self) -> list[Row]:
        text = self.path.read_bytes().decode("utf-8", errors="replace")
        # A process that was killed may have left half a line.
        whole = text[: text.rfind("\n") + 1]
        rows, unreadable = self._parse(whole)
        if unreadable:
            aside = self.path.with_name(self.path.name + ".damaged")
            write_text(aside, text)
            _logger.warning(
                "%s has %d lines that cannot be read; it goes on without them, as it was is in %s.",
                self.path,
                unreadable,
                aside.name,
            )
        return rows

    def _log(self, step: int, values: dict[str, float]) -> None:
        if self._file is None:
            raise ValueError("the log is not open")
        self._file.write(self._line(step, values).encode())

    def _close(self) -> None:
        if self._file is not None:
            file, self._file = self._file, None
            file.close()

    @abstractmethod
    def _text(self, rows: Sequence[Row]) -> str:
        """Return the whole file."""

    @abstractmethod
    def _line(self, step: int, values: dict[str, float]) -> str:
        """Return one more row."""

    @abstractmethod
    def _parse(self, text: str) -> tuple[list[Row], int]:
        """Return the rows of a file of whole lines, and how many lines are none."""


class JsonlLogger(TableLogger):
    """`metrics.jsonl`: a line with the format's version and the run's settings, then one a record.

    A figure that is not finite, which JSON does not know, is null.
    """

    name = "jsonl"
    file_name = "metrics.jsonl"

    def _text(self, rows: Sequence[Row]) -> str:
        header = {"format": FORMAT, "version": FORMAT_VERSION, "run": self._run_info}
        return json.dumps(header) + "\n" + "".join(self._line(*row) for row in rows)

    def _line(self, step: int, values: dict[str, float]) -> str:
        finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
        return json.dumps({"step": step, **finite}) + "\n"

    def _parse(self, text: str) -> tuple[list[Row], int]:
        rows: list[Row] = []
        unreadable = 0
        for number, line in enumerate(text.split("\n")[:-1]):
            entry = _json_object(line)
            if number == 0 and entry.get("format") == FORMAT:
                check_version(self.path, entry.get("version"), FORMAT_VERSION)
            elif (row := _row(entry)) is not None:
                rows.append(row)
            else:
                unreadable += 1
        return rows, unreadable


def _json_object(line: str) -> dict[str, Any]:
    """Return the object on a line, an empty one if there is none."""
    try:
        entry: object = json.loads(line)
    except (ValueError, RecursionError):
        return {}
    return cast("dict[str, Any]", entry) if isinstance(entry, dict) else {}


def _row(entry: dict[str, Any]) -> Row | None:
    step = entry.get("step")
    if not isinstance(step, int):
        return None
    try:
        values = {
            name: math.nan if value is None else float(value)
            for name, value in entry.items()
            if name != "step"
        }
    except (TypeError, ValueError):
        return None
    return step, values


class CsvLogger(TableLogger):
    """`metrics.csv`: `COLUMNS`, then those of further figures; an empty cell where a record lacks one.

    A figure with a name that is not in the file yet adds a column: the file is then rewritten.
    """

    name = "csv"
    file_name = "metrics.csv"

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self._columns: list[str] = []

    def _text(self, rows: Sequence[Row]) -> str:
        self._columns = _union(COLUMNS, *(values for _, values in rows))
        return _csv_line(["step", *self._columns]) + "".join(self._line(*row) for row in rows)

    def _log(self, step: int, values: dict[str, float]) -> None:
        if values.keys() <= set(self._columns):
            super()._log(step, values)
        else:
            self._rewrite([*self._read_back(), (step, values)])

    def _line(self, step: int, values: dict[str, float]) -> str:
        cells = (repr(values[name]) if name in values else "" for name in self._columns)
        return _csv_line([str(step), *cells])

    def _parse(self, text: str) -> tuple[list[Row], int]:
        rows: list[Row] = []
        unreadable = 0
        names: list[str] = []
        lines = csv.reader(io.StringIO(text, newline=""))
        try:
            names = next(lines, ["step"])
            for cells in lines:
                try:
                    if names[0] != "step":
                        raise ValueError(names)
                    pairs = zip(names[1:], cells[1:], strict=True)
                    rows.append((int(cells[0]), {name: float(cell) for name, cell in pairs if cell}))
                except (ValueError, IndexError):
                    unreadable += 1
        except csv.Error:
            unreadable += 1
        return rows, unreadable


def _union(*groups: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(name for group in groups for name in group))


def _csv_line(cells: Iterable[str]) -> str:
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="\n").writerow(cells)
    return buffer.getvalue()
