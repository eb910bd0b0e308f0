"""Calibration text out of files, in parts of bounded size and in random order."""

from __future__ import annotations

import importlib
import json
import math
import os
import random
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple, cast

from auto_round._files import shown
from auto_round.exceptions import CalibrationError, MissingPackageError

PART = 2**17
"""Bytes of a file, or characters of a string, that are one document; what is longer is several."""
_MOST_LINE = 2**26
_MOST_JSON = 2**26
_CONTENT = ("text", "content", "input_ids", "attention_mask")
"""Columns that are read where they are there; see `content_columns`."""


class Element(NamedTuple):
    """One piece of calibration data as it was found."""

    place: int
    """Number of it in the data, from 0."""
    label: str
    """What an error calls it."""
    value: object
    """Text, token ids, or a mapping that holds one of them."""


class _File(NamedTuple):
    path: Path
    parts: int
    read: Callable[[Path, int, random.Random], Iterator[tuple[str, object]]]


def shuffled(total: int, rng: random.Random) -> Iterator[int]:
    """Yield each of `range(total)` once, in random order, in memory that does not grow with `total`."""
    if total <= 2**20:
        yield from rng.sample(range(total), total)
        return
    # A true permutation of billions of rows would not fit. Steps of a length that shares no factor with
    # the total reach every row once as well.
    step = rng.randrange(1, total)
    while math.gcd(step, total) > 1:
        step = rng.randrange(1, total)
    start = rng.randrange(total)
    for place in range(total):
        yield (start + place * step) % total


def content_columns(columns: Sequence[str], strings: Sequence[str], label: str) -> list[str]:
    """Return the columns of a table that hold the calibration data; `strings` are those of text."""
    found = [name for name in _CONTENT if name in columns]
    if found:
        return found
    if len(strings) == 1:
        return list(strings)
    raise CalibrationError(
        f"{label} has no column 'text', 'content' or 'input_ids' and no single column of text; it has "
        f"{shown(list(columns))}. Rename the one that is meant to 'text'."
    )


def optional(name: str, what: str) -> Any:
    """Import a library that only `what` needs.

    Raises:
        MissingPackageError: It is not installed; the message shows how to install it.
    """
    try:
        return importlib.import_module(name)
    except ImportError as failure:
        package = name.partition(".")[0]
        raise MissingPackageError(f"{what} needs another package: pip install {package}") from failure


def is_saved_dataset(folder: Path) -> bool:
    """Tell whether a folder is what the library datasets writes with `save_to_disk`."""
    return (folder / "dataset_dict.json").is_file() or (
        (folder / "state.json").is_file() and (folder / "dataset_info.json").is_file()
    )


def file_elements(paths: Sequence[Path], rng: random.Random) -> Iterator[Element]:
    """Yield what files hold, parts of all of them in random order.

    `.jsonl` and `.json` hold records, `.parquet` rows, every other file is text in UTF-8. A folder stands for
    all files in it, except those whose name, or a folder's on the way, begins with a dot or is `__pycache__`;
    the order in which the system lists them does not matter. Of text and `.jsonl`, `PART` bytes are read at a
    time; of `.parquet`, 256 rows.

    Raises:
        CalibrationError: A file is missing, cannot be read, or is not what its name says; it is named, and
            the byte where that is known.
        MissingPackageError: A file is `.parquet` and pyarrow is not installed.
    """
    files = [_opened(path) for given in paths for path in _expanded(given)]
    ends = list(accumulate(file.parts for file in files))
    index = 0
    for number in shuffled(ends[-1] if ends else 0, rng):
        which = bisect_right(ends, number)
        file = files[which]
        part = number - (ends[which] - file.parts)
        try:
            for label, value in file.read(file.path, part, rng):
                yield Element(index, label, value)
                index += 1
        except OSError as failure:
            raise _unreadable(file.path, failure) from failure


def _expanded(given: Path) -> list[Path]:
    if given.is_file():
        return [given]
    if not given.is_dir():
        raise CalibrationError(f"{given} is neither a file nor a folder; check the path.")
    if is_saved_dataset(given):
        raise CalibrationError(
            f"{given} is a data set of the library datasets; give it alone, not in a list."
        )
    found: list[Path] = []
    for folder, inner, names in os.walk(given, onerror=_refuse_folder):
        inner[:] = [name for name in inner if not name.startswith(".") and name != "__pycache__"]
        found += [Path(folder, name) for name in names if not name.startswith(".")]
    found = sorted((path for path in found if path.is_file()), key=lambda path: path.as_posix())
    if not found:
        raise CalibrationError(f"{given} holds no file; give a folder of text files.")
    return found


def _refuse_folder(failure: OSError) -> None:
    raise _unreadable(Path(str(failure.filename)), failure) from failure


def _opened(path: Path) -> _File:
    ending = path.suffix.lower()
    if ending == ".parquet":
        return _File(path, _parquet(path).num_row_groups, _parquet_part)
    try:
        parts = -(-path.stat().st_size // PART)
    except OSError as failure:
        raise _unreadable(path, failure) from failure
    if ending == ".jsonl":
        return _File(path, parts, _jsonl_part)
    return _File(path, 1, _json_part) if ending == ".json" else _File(path, parts, _text_part)


def _text_part(path: Path, part: int, _: random.Random) -> Iterator[tuple[str, object]]:
    start = part * PART
    with path.open("rb") as file:
        file.seek(start)
        data = file.read(PART + 3)
    # A character of several bytes belongs to the part in which it begins.
    first, last = 0, min(PART, len(data))
    while start and first < min(3, last) and data[first] & 0xC0 == 0x80:
        first += 1
    while last < len(data) and data[last] & 0xC0 == 0x80:
        last += 1
    if start == 0 and data.startswith(b"\xef\xbb\xbf"):
        first = 3
    yield str(path), _decoded(data[first:last], path, start + first).replace("\r\n", "\n")


def _decoded(data: bytes, path: Path, start: int) -> str:
    zero = data.find(0)
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as failure:
        at, why = failure.start, f"is no UTF-8 ({failure.reason})"
    else:
        if zero < 0:
            return text
        at, why = zero, "is zero, which no text holds"
    raise CalibrationError(
        f"{path} is not text: byte {start + at}, 0x{data[at]:02x}, {why}. Convert the file to UTF-8, or "
        "leave it out."
    )


def _jsonl_part(path: Path, part: int, _: random.Random) -> Iterator[tuple[str, object]]:
    stop = (part + 1) * PART
    with path.open("rb") as file:
        if part:
            # A line belongs to the part in which it begins.
            file.seek(part * PART - 1)
            while not (chunk := file.readline(PART)).endswith(b"\n"):
                if not chunk or file.tell() > stop:
                    return
        while (at := file.tell()) < stop and (line := file.readline(_MOST_LINE + 1)):
            label = f"{path}, the line at byte {at},"
            if len(line) > _MOST_LINE:
                raise CalibrationError(f"{label} is longer than {_MOST_LINE} bytes; split it.")
            if line.strip():
                yield label, _parsed(line.removeprefix(b"\xef\xbb\xbf"), path, at, label)


def _json_part(path: Path, _: int, rng: random.Random) -> Iterator[tuple[str, object]]:
    with path.open("rb") as file:
        data = file.read(_MOST_JSON + 1)
    if len(data) > _MOST_JSON:
        raise CalibrationError(
            f"{path} is longer than {_MOST_JSON} bytes and can only be read whole; write it as .jsonl, one "
            "record a line."
        )
    value = _parsed(data.removeprefix(b"\xef\xbb\xbf"), path, 0, str(path))
    if not isinstance(value, list):
        yield str(path), value
        return
    records = cast("list[object]", value)
    for number in shuffled(len(records), rng):
        yield f"{path}, record {number},", records[number]


def _parsed(data: bytes, path: Path, start: int, label: str) -> object:
    text = _decoded(data, path, start)
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as failure:
        raise CalibrationError(f"{label} is not valid JSON: {failure}.") from None


def _parquet(path: Path) -> Any:
    parquet, arrow = optional("pyarrow.parquet", f"reading {path}"), optional("pyarrow", f"reading {path}")
    try:
        # By default it would read ahead until it holds the whole file.
        return parquet.ParquetFile(path, pre_buffer=False)
    except (arrow.ArrowException, OSError) as failure:
        raise _unreadable(path, failure) from failure


def _parquet_part(path: Path, part: int, _: random.Random) -> Iterator[tuple[str, object]]:
    arrow = optional("pyarrow", f"reading {path}")
    with _parquet(path) as file:
        schema = file.schema_arrow
        strings = [
            field.name
            for field in schema
            if arrow.types.is_string(field.type) or arrow.types.is_large_string(field.type)
        ]
        columns = content_columns(schema.names, strings, str(path))
        number = 0
        try:
            for batch in file.iter_batches(256, row_groups=[part], columns=columns):
                for record in cast("list[Mapping[str, object]]", batch.to_pylist()):
                    yield f"{path}, row {number} of row group {part},", record
                    number += 1
        except arrow.ArrowException as failure:
            raise _unreadable(path, failure) from failure


def _unreadable(path: Path, failure: Exception) -> CalibrationError:
    reason = failure.strerror if isinstance(failure, OSError) and failure.strerror else str(failure)
    return CalibrationError(f"{path} cannot be read: {reason}.")
