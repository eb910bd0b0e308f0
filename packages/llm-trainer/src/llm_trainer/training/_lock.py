"""One run at a time in a folder."""

from __future__ import annotations

import os
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from llm_trainer.exceptions import TrainingError

_NAME = ".lock"
_held: set[Path] = set()
"""What this process holds, which the system's lock is no protection against."""


@contextmanager
def locked(folder: Path | None) -> Generator[None]:
    """Hold a folder, made if it is missing, against other runs, until the end or the end of the process.

    The lock is the process's own: the loader's processes, which may outlive it by seconds, do not have it.
    Where the system has no such locks (Windows), only runs of this process are kept apart.

    Raises:
        TrainingError: Another run holds it.
        OSError: It cannot be written to.
    """
    if folder is None:
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    path = folder.resolve()
    if path in _held:
        raise _taken(folder)
    descriptor = os.open(path / _NAME, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        _lock(descriptor, folder)
        _held.add(path)
        try:
            yield
        finally:
            _held.remove(path)
    finally:
        os.close(descriptor)


def _lock(descriptor: int, folder: Path) -> None:
    try:
        import fcntl
    except ImportError:
        return
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        raise _taken(folder) from None


def _taken(folder: Path) -> TrainingError:
    return TrainingError(
        f"Another run is writing its checkpoints into {folder}; wait for it, or set another "
        "TrainingConfig.checkpoint_dir."
    )
