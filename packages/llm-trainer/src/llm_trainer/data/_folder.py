"""Folders that take long to make: whole or not there, made once, and safe from other processes."""

from __future__ import annotations

import errno
import logging
import os
import re
import secrets
import shutil
import sys
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path

from llm_trainer._files import sync_folder

_logger = logging.getLogger(__name__)
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_PARTIAL = re.compile(r"\.(?P<name>.+)\.[0-9a-f]{8}\.partial")


def make_folder(
    target: Path, make: Callable[[Path], None], is_good: Callable[[Path], bool] = lambda _: False
) -> None:
    """Fill a temporary folder with `make`, sync it and rename it to `target`.

    One process at a time makes a target; the others wait, and take it if it `is_good` by then. What a process
    that died has left half done is removed by the next one that makes anything in the same place.

    Raises:
        OSError: It cannot be written, by a full disk for instance; nothing is left of it then, and what
            `target` was before is still there.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    with _lock(target) as locked:
        if is_good(target):
            return
        _remove_leftovers(target if locked else None, target.parent)
        partial = _partial(target)
        try:
            partial.mkdir()
            make(partial)
            for path in partial.rglob("*"):
                _sync(path)
            sync_folder(partial)
            _put_in_place(partial, target, is_good)
        except OSError as error:
            if error.errno not in _FULL:
                raise
            raise OSError(
                error.errno,
                f"{error.strerror}: {target} does not fit, and nothing was left of it. Free some space, or "
                "choose another folder (cache_dir)",
            ) from error
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def _put_in_place(partial: Path, target: Path, is_good: Callable[[Path], bool]) -> None:
    before = _partial(target)
    if target.exists():
        target.rename(before)
    try:
        partial.rename(target)
    except OSError:
        # Where files cannot be locked, another process may have made the same meanwhile.
        if not is_good(target):
            raise
    sync_folder(target.parent)
    shutil.rmtree(before, ignore_errors=True)


def _partial(target: Path) -> Path:
    return target.with_name(f".{target.name}.{secrets.token_hex(4)}.partial")


def _sync(path: Path) -> None:
    if path.is_dir():
        sync_folder(path)
        return
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def _remove_leftovers(held: Path | None, folder: Path) -> None:
    """Remove what dead processes left; the target whose lock is held and those whose lock can be had."""
    for path in folder.glob(".*.partial"):
        found = _PARTIAL.fullmatch(path.name)
        if found is None or not path.is_dir():
            continue
        if held is not None and found["name"] == held.name:
            shutil.rmtree(path, ignore_errors=True)
            continue
        with _lock(folder / found["name"], wait=False) as locked:
            if locked:
                shutil.rmtree(path, ignore_errors=True)


@contextmanager
def _lock(target: Path, *, wait: bool = True) -> Generator[bool]:
    """Hold the lock of `target`; say whether it was to be had.

    The system releases it when the process ends, however it does. Some network file systems have none.
    """
    if sys.platform == "win32":
        yield False
        return
    path = target.with_name(f".{target.name}.lock")
    file = _locked_file(path, wait)
    try:
        yield file is not None
    finally:
        if file is not None:
            path.unlink(missing_ok=True)
            os.close(file)


def _locked_file(path: Path, wait: bool) -> int | None:
    # Windows has no such module.
    import fcntl

    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if not wait:
                    os.close(file)
                    return None
                _logger.info("Another process makes %s; waiting for it.", path.name[1 : -len(".lock")])
                fcntl.flock(file, fcntl.LOCK_EX)
            # The one that had it has deleted it: what was locked is a name that nobody finds any more.
            if _is_at(file, path):
                return file
        except BaseException as error:
            os.close(file)
            if isinstance(error, OSError) and error.errno in (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS):
                return None
            raise
        os.close(file)


def _is_at(file: int, path: Path) -> bool:
    """Return whether an open file is the one that a path names now, which others may be deleting."""
    try:
        return os.path.samestat(os.fstat(file), path.stat())
    except FileNotFoundError:
        return False
