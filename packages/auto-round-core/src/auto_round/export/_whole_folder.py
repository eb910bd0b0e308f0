"""A folder that appears under its name when it is whole."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from auto_round.exceptions import ConfigurationError
from auto_round.export._shards import not_written


def check_folder(folder: Path) -> None:
    """Refuse a folder that holds something: two exports in one folder would be read as one model.

    Raises:
        ConfigurationError: It does, or it is a file.
    """
    if folder.is_dir() and not any(folder.iterdir()):
        return
    if folder.exists() or folder.is_symlink():
        kind = "exists and is not empty" if folder.is_dir() else "exists and is no folder"
        raise ConfigurationError(f"{folder} {kind}; remove it, or set export.export_path to another folder.")


@contextmanager
def whole_folder(folder: Path) -> Generator[Path]:
    """Give a hidden folder beside `folder` to write to; afterwards it is synced and renamed to `folder`.

    After an error nothing is left of it. A process that is killed leaves the hidden folder,
    `.NAME.*.tmp`, which may be removed.

    Raises:
        ConfigurationError: As for `check_folder`.
        ExportError: It cannot be made, synced or renamed.
    """
    check_folder(folder)
    folder = folder.resolve()
    temporary = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}.tmp")
    try:
        try:
            temporary.mkdir(parents=True)
        except OSError as error:
            raise not_written(folder, error) from error
        yield temporary
        try:
            _sync(temporary)
            # On an empty folder, too; one that was filled meanwhile stays as it is.
            temporary.replace(folder)
            _sync_folder(folder.parent)
        except OSError as error:
            raise not_written(folder, error) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _sync(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb+") as file:
                os.fsync(file.fileno())
        else:
            _sync_folder(path)
    _sync_folder(folder)


def _sync_folder(folder: Path) -> None:
    # Windows cannot open folders.
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
