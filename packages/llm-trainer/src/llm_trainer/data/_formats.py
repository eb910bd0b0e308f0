"""Reading the documents of one file."""

from __future__ import annotations

import codecs
import gzip
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

from llm_trainer._files import shown
from llm_trainer.exceptions import DataError, MissingPackageError

TEXT_BYTES = 1 << 24
"""Largest text file that is one document; a larger one is never in memory as a whole."""
# Rows can be long texts.
_ROWS_AT_A_TIME = 128
_BUFFER_BYTES = 1 << 20


def read_file(path: Path, text_column: str) -> Iterator[str]:
    """Yield a file's documents: the rows of `.jsonl`, `.jsonl.gz` and `.parquet`, else its text.

    Raises:
        DataError: The file cannot be read, or holds something else than text.
    """
    if path.name.endswith((".jsonl", ".jsonl.gz")):
        return _read_json_lines(path, text_column)
    if path.suffix == ".parquet":
        return _read_parquet(path, text_column)
    return read_text(path)


def check_file(path: Path, text_column: str) -> None:
    """Find out at little cost whether a file can be read.

    Raises:
        DataError: It is a Parquet file without that column, or not one at all.
        MissingPackageError: It is a Parquet file, and pyarrow is not installed.
    """
    if path.suffix == ".parquet":
        _open_parquet(path, text_column)


def read_text(path: Path) -> Iterator[str]:
    """Yield the text of a UTF-8 file: as one document, or as one for every `TEXT_BYTES` of a larger file.

    Such a file is cut where a line begins that does not begin with a blank, so that no indented block loses
    its head; between two characters where there is no such line in the second half of a piece.

    Raises:
        DataError: It cannot be read or is not text.
    """
    start, rest = 0, b""
    try:
        with path.open("rb") as file:
            while True:
                # One byte more than a piece may have says whether this is the last.
                data = rest + file.read(TEXT_BYTES + 1 - len(rest))
                is_last = len(data) <= TEXT_BYTES
                text, used = _decode(data if is_last else data[: _cut(data)], is_last, path, start)
                yield text if start else text.removeprefix("\ufeff")
                if is_last:
                    return
                start, rest = start + used, data[used:]
    except OSError as error:
        raise _unreadable(path, error) from error


def _cut(data: bytes) -> int:
    end = len(data) - 1
    while (newline := data.rfind(b"\n", len(data) // 2, end)) >= 0:
        if not data[newline + 1 : newline + 2].isspace():
            return newline + 1
        end = newline
    return len(data) - 1


def _decode(data: bytes, is_last: bool, path: Path, start: int) -> tuple[str, int]:
    """Return the text and how many bytes it took: all but those of a last character that goes on."""
    try:
        text, used = codecs.utf_8_decode(data, "strict", is_last)
    except UnicodeDecodeError as error:
        place = start + error.start
        raise DataError(
            f"{path} is not UTF-8 text (byte {place}); convert it, or leave it out with patterns."
        ) from None
    if b"\0" in data:
        raise DataError(f"{path} is not text: it holds a zero byte at {start + data.index(0)}.")
    return text, used


def _read_json_lines(path: Path, text_column: str) -> Iterator[str]:
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            for number, line in enumerate(file, 1):
                where = f"{path}, line {number}"
                if line.strip():
                    text = checked_text(_parse(line, where, text_column), text_column, where)
                    if text is not None:
                        yield text
    except (OSError, EOFError, zlib.error) as error:
        raise _unreadable(path, error) from error


def _parse(line: bytes, where: str, text_column: str) -> object:
    try:
        # A lone surrogate can only come from an escape; it has no encoding.
        row: object = json.loads(line.decode("utf-8-sig"))
        if b"\\ud" in line.lower():
            json.dumps(row, ensure_ascii=False).encode("utf-8")
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where} is not valid JSON: {error}.") from None
    fields = cast("dict[str, object]", row) if isinstance(row, dict) else {}
    if text_column not in fields:
        raise DataError(
            f"{where} has no key {text_column!r} (text_column), but is {shown(cast('object', row))}."
        )
    return fields[text_column]


def checked_text(value: object, text_column: str, where: str) -> str | None:
    """Return a row's text; None where it has none.

    Raises:
        DataError: It is of another type.
    """
    if value is None or isinstance(value, str):
        return value
    raise DataError(
        f"{where}: {text_column!r} is not text but of type {type(value).__name__}: {shown(value)}."
    )


def _read_parquet(path: Path, text_column: str) -> Iterator[str]:
    file = _open_parquet(path, text_column)
    number = 0
    try:
        for batch in file.iter_batches(_ROWS_AT_A_TIME, columns=[text_column], use_threads=False):
            for value in batch.column(0).to_pylist():
                number += 1
                text = checked_text(value, text_column, f"{path}, row {number}")
                if text is not None:
                    yield text
    except (_arrow()[0].ArrowException, OSError, UnicodeDecodeError) as error:
        raise _unreadable(path, error) from error


def _open_parquet(path: Path, text_column: str) -> Any:
    arrow, parquet = _arrow()
    try:
        # By default it would read ahead until it holds the whole file.
        file = parquet.ParquetFile(path, buffer_size=_BUFFER_BYTES, pre_buffer=False)
    except (arrow.ArrowException, OSError) as error:
        raise _unreadable(path, error) from error
    columns: list[str] = file.schema_arrow.names
    if text_column not in columns:
        raise DataError(f"{path} has no column {text_column!r}; text_column can be one of {columns}.")
    return file


def _arrow() -> tuple[Any, Any]:
    try:
        # It starts threads of its own: not before it is needed.
        import pyarrow  # pyright: ignore[reportMissingTypeStubs] - it ships none
        from pyarrow import parquet  # pyright: ignore[reportMissingTypeStubs]
    except ImportError as error:
        raise MissingPackageError("Parquet files need pyarrow: pip install datasets pyarrow") from error
    return pyarrow, parquet


def _unreadable(path: Path, error: Exception) -> DataError:
    reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return DataError(f"{path} cannot be read: {reason}.")
