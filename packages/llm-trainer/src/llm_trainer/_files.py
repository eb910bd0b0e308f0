"""Writing files so that a crash leaves the old one or the new one, never half of either."""

from __future__ import annotations

import hashlib
import json
import os
import reprlib
import secrets
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

from llm_trainer.exceptions import FormatError

_SHORT = reprlib.Repr()
_SHORT.maxlevel = 2
_SHORT.maxstring = 120


def write_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """Call `write` with a temporary path beside `path`, sync what it wrote, and rename it to `path`.

    The file gets the permissions that the umask gives a new one, also when `write` replaces the temporary
    by a private file of its own, as safetensors does.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        temporary.touch(exist_ok=False)
        mode = stat.S_IMODE(temporary.stat().st_mode)
        write(temporary)
        temporary.chmod(mode)
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    # The rename itself lasts only once the folder is on disk.
    sync_folder(path.parent)


def sync_folder(path: Path) -> None:
    """Have a folder's entries on disk; Windows cannot open folders."""
    if os.name == "posix":
        folder = os.open(path, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def shown(value: object) -> str:
    """Return `repr` of a value that was read, cut where it is long."""
    try:
        return _SHORT.repr(value)
    except ValueError:
        # Python refuses to write out integers of more than 4300 digits.
        return f"a {type(value).__name__} of too many digits"


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text atomically."""

    def write(temporary: Path) -> None:
        temporary.write_bytes(text.encode("utf-8"))

    write_atomically(path, write)


def write_json(path: Path, value: Any, *, indent: int | None = 2) -> None:
    """Write `value` as JSON atomically."""
    write_text(path, json.dumps(value, indent=indent, ensure_ascii=False) + "\n")


def read_json_object(path: Path) -> dict[str, Any]:
    """Read a file that must hold one JSON object.

    Raises:
        FormatError: The file is missing, cannot be read, or holds something else.
    """
    try:
        value: object = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FormatError(f"{path} does not exist.") from None
    except OSError as error:
        raise FormatError(f"{path} cannot be read: {error.strerror}.") from error
    except (ValueError, RecursionError) as error:
        raise FormatError(
            f"{path} is not valid JSON: {error}. It may be damaged; restore or save it again."
        ) from error
    if not isinstance(value, dict):
        raise FormatError(f"{path} must hold a JSON object, but holds a {type(value).__name__}.")
    return cast("dict[str, Any]", value)


def json_sha256(value: Any) -> str:
    """Return the SHA-256 of `value` as JSON, whatever its spacing and the order of its keys."""
    canonical = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode("ascii")).hexdigest()


def check_version(path: Path, found: object, newest: int) -> None:
    """Refuse a file without a readable version, or one written by a later release.

    Raises:
        FormatError: `found` is not an integer from 1 to `newest`.
    """
    if not isinstance(found, int) or isinstance(found, bool) or found < 1:
        raise FormatError(
            f"{path} has no valid format version (found {shown(found)}); it was not written by llm-trainer."
        )
    if found > newest:
        raise FormatError(
            f"{path} has format version {found}, this llm-trainer reads up to {newest}; upgrade "
            f"llm-trainer to read it."
        )
