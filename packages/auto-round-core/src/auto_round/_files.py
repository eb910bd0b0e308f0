"""Writing files so that a crash leaves the old one or the new one, and reading JSON that may be damaged."""

from __future__ import annotations

import json
import os
import reprlib
import secrets
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

from auto_round.exceptions import AutoRoundError

_SHORT = reprlib.Repr()
_SHORT.maxlevel = 2
_SHORT.maxstring = _SHORT.maxother = 120


def shown(value: object) -> str:
    """Return `repr` of a value that was given or read, cut where it is long."""
    try:
        return _SHORT.repr(value)
    except ValueError:
        # Python refuses to write out integers of more than 4300 digits.
        return f"a {type(value).__name__} of too many digits"


def write_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """Call `write` with a temporary path beside `path`, sync what it wrote, and rename it to `path`.

    The file gets the permissions that the umask gives a new one, whatever `write` did to the temporary.
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
    if os.name == "posix":
        # The rename itself lasts only once the folder is on disk; Windows cannot open folders.
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def write_json(path: Path, value: Any) -> None:
    """Write `value` as JSON atomically. ASCII only, so that names of files that are not UTF-8 survive."""

    def write(temporary: Path) -> None:
        temporary.write_text(json.dumps(value, indent=2) + "\n", encoding="ascii")

    write_atomically(path, write)


def read_json_object(path: Path, error: type[AutoRoundError], most_bytes: int) -> dict[str, Any]:
    """Read a file that must hold one JSON object of at most `most_bytes`, or raise `error`."""
    try:
        with path.open("rb") as file:
            content = file.read(most_bytes + 1)
    except FileNotFoundError:
        raise error(f"{path} does not exist.") from None
    except (OSError, ValueError) as failure:
        # ValueError is what Python says of a path with a zero byte.
        reason = failure.strerror if isinstance(failure, OSError) else failure
        raise error(f"{path} cannot be read: {reason}.") from failure
    if len(content) > most_bytes:
        raise error(f"{path} is longer than {most_bytes} bytes, which no file of its kind is.")
    return parse_object(content, str(path), error, "Restore it or write it again.")


def parse_object(data: bytes, what: str, error: type[AutoRoundError], remedy: str) -> dict[str, Any]:
    """Return the JSON object that `data` is, in which no key comes twice, or raise `error` naming `what`."""
    try:
        value: object = json.loads(data.decode("utf-8-sig"), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as failure:
        raise error(f"{what} is not valid JSON: {failure}. {remedy}") from failure
    if not isinstance(value, dict):
        raise error(f"{what} must hold a JSON object, but holds a {type(value).__name__}. {remedy}")
    return cast("dict[str, Any]", value)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        seen: set[str] = set()
        for name, _ in pairs:
            if name in seen:
                raise ValueError(f"the name {shown(name)} comes twice")
            seen.add(name)
    return result
