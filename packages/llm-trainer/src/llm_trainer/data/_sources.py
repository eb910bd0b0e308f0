"""Reading text from files and folders."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path, PurePath

from llm_trainer.exceptions import DataError


def read_texts(path: str | Path, patterns: Sequence[str] = ("*.txt",)) -> Iterator[str]:
    """Yield the text of a UTF-8 file, or of each file in a folder, one at a time, in order of their paths.

    Args:
        path: A file, read whatever its name, or a folder, searched at any depth.
        patterns: Names of the files wanted from a folder; files that are empty or only white space are left
            out there. A pattern cannot lead out of the folder.

    Raises:
        DataError: `path` is missing, holds no text, or a file is not UTF-8 text, or a pattern is absolute,
            empty or has "..". A missing path and such a pattern are found at the call, the others when the
            file's turn comes.
    """
    source = Path(path)
    if isinstance(patterns, str):
        raise DataError(f"patterns is one string; give a list, such as [{patterns!r}].")
    for pattern in patterns:
        parts = PurePath(pattern)
        if not parts.parts or parts.anchor or ".." in parts.parts:
            raise DataError(f"The pattern {pattern!r} is not a file name inside the folder, such as '*.txt'.")
    if source.is_file():
        return _read_one(source)
    if source.is_dir():
        return _read_folder(source, patterns)
    raise DataError(f"{source} does not exist; give a text file or a folder of them.")


def _read_one(path: Path) -> Iterator[str]:
    text = _read(path)
    if not text.strip():
        raise DataError(f"{path} is empty; there is nothing to read.")
    yield text


def _read_folder(folder: Path, patterns: Sequence[str]) -> Iterator[str]:
    found = False
    for path in sorted({path for pattern in patterns for path in folder.rglob(pattern) if path.is_file()}):
        text = _read(path)
        if text.strip():
            found = True
            yield text
    if not found:
        raise DataError(f"{folder} holds no text in files named {' or '.join(patterns)}.")


def _read(path: Path) -> str:
    try:
        content = path.read_bytes()
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path} is not UTF-8 text (byte {error.start}); convert it, or leave it out with patterns."
        ) from None
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}.") from error
    if "\0" in text:
        raise DataError(f"{path} is not text: it holds a zero byte at {text.index(chr(0))}.")
    return text
