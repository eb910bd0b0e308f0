"""Private temporary folders that go with the object that owns them."""

from __future__ import annotations

import shutil
import tempfile
import weakref
from pathlib import Path


class Room:
    """A temporary folder of this user alone, deleted with this object or at the end of a ``with``."""

    def __init__(self) -> None:
        self.path = Path(tempfile.mkdtemp(prefix="hamerspace-"))
        self._end = weakref.finalize(self, shutil.rmtree, self.path, ignore_errors=True)

    def __enter__(self) -> Path:
        return self.path

    def __exit__(self, *_: object) -> None:
        self._end()
