"""Finding the text: in files, folders, the standard library and data sets of other people."""

from __future__ import annotations

import hashlib
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any, Protocol

from llm_trainer.config._data import FILE_PATTERNS
from llm_trainer.data._formats import check_file, read_file, read_text
from llm_trainer.data._hub import HubSource, is_saved_dataset
from llm_trainer.exceptions import DataError

STDLIB = "python-stdlib"
_STDLIB_LEFT_OUT = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
_OTHER_SPLITS = ("validation", "test", "valid", "dev", "eval")


class Source(Protocol):
    """Text that was found and can be read, any number of times."""

    @property
    def name(self) -> str:
        """What it was asked for by."""
        ...

    def texts(self) -> Iterator[str]:
        """Yield the documents."""
        ...

    def describe(self) -> dict[str, Any]:
        """Return its name and a `fingerprint` that changes when the text does."""
        ...


def read_texts(path: str | Path, patterns: Sequence[str] = ("*.txt",)) -> Iterator[str]:
    """Yield the documents of a file, or of the files in a folder, one at a time, in order of their paths.

    Args:
        path: A file, or a folder, searched at any depth. A file is one document of UTF-8 text (a large one
            several, as `read_dataset` says), but each line of `.jsonl` and `.jsonl.gz` and each row of
            `.parquet` is one (in the key or column `text`).
        patterns: Names of the files wanted from a folder; files that are empty or only white space are left
            out there. A pattern cannot lead out of the folder. Links to files are followed, to folders not.

    Raises:
        DataError: `path` is missing or has no such file, or a pattern is absolute, empty or has "..": at the
            call. A file is not UTF-8 text, or there is none in all of them: when its turn comes.
    """
    return find_files(path, patterns, "text").texts()


def read_dataset(
    name: str,
    config: str | None = None,
    *,
    split: str = "train",
    text_column: str = "text",
    patterns: Sequence[str] | None = None,
) -> Iterator[str]:
    """Yield the documents of a data set, one at a time, in an order that is always the same.

    Args:
        name: One of:

            - a file: one document of UTF-8 text, or `.jsonl`, `.jsonl.gz` or `.parquet` with one in each row.
              Text of more than 16 MiB is never in memory as a whole: it is cut into documents of at most
              that, each but the first beginning with a line that does not begin with a blank (or, where no
              such line is near, anywhere between two characters);
            - a folder of such files, searched at any depth. Its splits are the subfolders, or the files,
              whose names begin with `train`, `validation` and so on; without any, all is `train`;
            - a folder written by `save_to_disk` of a `datasets.Dataset` or `DatasetDict`;
            - `python-stdlib`: the sources of the running Python's standard library without its tests, one
              document a file; about 5% of them, picked by a hash of their paths, are the split `validation`;
            - else the name of a Hugging Face data set, downloaded by the library `datasets`. Code that comes
              with a data set is never run.
        config: Configuration of a Hugging Face data set.
        split: The part of it.
        text_column: Key or column with the text. Rows that have None there are left out.
        patterns: Names of the files wanted from a folder, `*.txt`, `*.jsonl`, `*.jsonl.gz` and `*.parquet` by
            default. Links to files are followed, to folders not.

    Raises:
        DataError: The data set, split or column does not exist: at the call. A file or row is not text: when
            its turn comes, with its place.
        MissingPackageError: It takes a package that is not installed; the message says how to install it. It
            is an `ImportError` too.
    """
    return find_dataset(name, config, split, text_column, patterns or FILE_PATTERNS).texts()


def describe_source(
    name: str,
    config: str | None = None,
    *,
    split: str = "train",
    text_column: str = "text",
    patterns: Sequence[str] | None = None,
) -> dict[str, Any]:
    """Return what tells the text that `read_dataset` reads from any other, as plain values.

    Its `fingerprint` covers the content of all files (read at about 1 GB a second) and their paths in the
    folder, but not where the folder is nor when it was written; of a Hugging Face data set, it is the
    library's own.

    Raises:
        DataError: As `read_dataset` does.
        MissingPackageError: As `read_dataset` does.
    """
    return find_dataset(name, config, split, text_column, patterns or FILE_PATTERNS).describe()


@dataclass(frozen=True)
class FileSource:
    """Files, each with the name that it has in its folder."""

    name: str
    files: list[tuple[str, Path]]
    text_column: str
    wanted: str
    """What was looked for, for the message that there is none."""

    def texts(self) -> Iterator[str]:
        """Yield the documents of all files."""
        found = False
        for _, path in self.files:
            for text in read_file(path, self.text_column):
                if text.strip():
                    found = True
                    yield text
        if not found:
            raise DataError(self.wanted)

    def describe(self) -> dict[str, Any]:
        """Return the counts, and a hash of names and contents."""
        whole = hashlib.sha256(self.text_column.encode())
        size = 0
        for name, path in self.files:
            try:
                with path.open("rb") as file:
                    content = hashlib.file_digest(file, "sha256").hexdigest()
                    size += file.tell()
            except OSError as error:
                raise DataError(f"{path} cannot be read: {error.strerror}.") from error
            whole.update(f"\n{len(name)} {name} {content}".encode("utf-8", "surrogateescape"))
        return {
            "kind": "files",
            "name": self.name,
            "text_column": self.text_column,
            "num_files": len(self.files),
            "bytes": size,
            "fingerprint": whole.hexdigest(),
        }


def find_dataset(
    name: str, config: str | None, split: str, text_column: str, patterns: Sequence[str]
) -> Source:
    """Find what `read_dataset` reads."""
    if name == STDLIB:
        return _standard_library(split)
    path = Path(name)
    if path.is_dir():
        if is_saved_dataset(path):
            return HubSource(name, None, split, text_column)
        return _split_of_folder(path, find_files(path, patterns, text_column), split)
    if path.is_file():
        if split != "train":
            raise DataError(
                f"{path} is one file, so there is no split {split!r}; give that a file of its own."
            )
        return find_files(path, patterns, text_column)
    if path.is_absolute() or name.startswith(".") or path.name.endswith(tuple(p[1:] for p in FILE_PATTERNS)):
        raise DataError(f"{name} does not exist; give a file or a folder.")
    return HubSource(name, config, split, text_column)


def find_files(path: str | Path, patterns: Sequence[str], text_column: str) -> FileSource:
    """Find what `read_texts` reads."""
    source = Path(path)
    if isinstance(patterns, str):
        raise DataError(f"patterns is one string; give a list, such as [{patterns!r}].")
    for pattern in patterns:
        parts = PurePath(pattern)
        if not parts.parts or parts.anchor or ".." in parts.parts:
            raise DataError(f"The pattern {pattern!r} is not a file name inside the folder, such as '*.txt'.")
    if source.is_file():
        check_file(source, text_column)
        return FileSource(
            str(source), [(source.name, source)], text_column, f"{source} is empty; there is nothing to read."
        )
    if not source.is_dir():
        raise DataError(f"{source} does not exist; give a text file or a folder of them.")
    paths = sorted({path for pattern in patterns for path in source.rglob(pattern) if path.is_file()})
    missing = f"{source} holds no text in files named {' or '.join(patterns)}."
    if not paths:
        raise DataError(missing)
    for found in paths:
        check_file(found, text_column)
    files = [(path.relative_to(source).as_posix(), path) for path in paths]
    return FileSource(str(source), files, text_column, missing)


def _split_of_folder(folder: Path, source: FileSource, split: str) -> FileSource:
    def of(wanted: str) -> list[tuple[str, Path]]:
        return [
            (name, path)
            for name, path in source.files
            if name.startswith((f"{wanted}/", f"{wanted}.", f"{wanted}-", f"{wanted}_"))
        ]

    files = of(split)
    if not files and split == "train" and not any(of(other) for other in _OTHER_SPLITS):
        return source
    if not files:
        raise DataError(
            f"{folder} has no split {split!r}: no subfolder of that name, and no file such as {split}.txt; "
            "make one, or name another split."
        )
    return FileSource(source.name, files, source.text_column, source.wanted)


def _standard_library(split: str) -> FileSource:
    if split not in ("train", "validation"):
        raise DataError(f"{STDLIB} has no split {split!r}; it has 'train' and 'validation'.")
    root = Path(sysconfig.get_path("stdlib"))
    files: list[tuple[str, Path]] = []
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root)
        if _STDLIB_LEFT_OUT.isdisjoint(name.parts) and _is_held_out(name) == (split == "validation"):
            files.append((name.as_posix(), path))
    return FileSource(
        STDLIB,
        [file for file in files if _is_text(file[1])],
        "text",
        f"There are no Python sources in {root}.",
    )


def _is_held_out(name: PurePath) -> bool:
    return hashlib.sha256(name.as_posix().encode()).digest()[0] < 256 // 20


def _is_text(path: Path) -> bool:
    """Say whether a source is UTF-8: a few say at their top that they are not."""
    try:
        for _ in read_text(path):
            pass
    except DataError:
        return False
    return True
