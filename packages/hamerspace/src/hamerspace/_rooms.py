"""Private temporary folders that go with the object that owns them, and this user's lasting ones."""

from __future__ import annotations

import os
import shutil
import tempfile
import weakref
from pathlib import Path


class Room:
    """A temporary folder of this user alone, deleted with this object or at the end of a ``with``."""

    def __init__(self) -> None:
        self.path = Path(tempfile.mkdtemp(prefix="hamerspace-"))
        self._end = weakref.finalize(self, _delete, self.path, os.getpid())

    def __enter__(self) -> Path:
        return self.path

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Delete the folder now."""
        self._end()


def _delete(path: Path, owner: int) -> None:
    """Delete a folder, unless this process is a fork of the one that made it."""
    if os.getpid() == owner:
        shutil.rmtree(path, ignore_errors=True)


def user_folder(variable: str, default: str) -> Path:
    """Return hamerspace's folder by the XDG base directory rules; it need not be there.

    Args:
        variable: such as ``XDG_CACHE_HOME``.
        default: in the home folder, where the variable is not set or no absolute path.

    Raises:
        RuntimeError: there is no home folder.
    """
    given = os.environ.get(variable, "")
    base = Path(given) if Path(given).is_absolute() else Path.home() / default
    return base / "hamerspace"
