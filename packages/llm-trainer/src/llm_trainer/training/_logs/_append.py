"""A file that grows by whole pieces."""

from __future__ import annotations

import os
from pathlib import Path


class AppendFile:
    """Appends without a buffer, so that a killed process has written all; takes back what a full disk cut."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("ab", buffering=0)
        self._size = self._file.seek(0, os.SEEK_END)

    def write(self, data: bytes) -> None:
        """Append all of `data`, or raise `OSError` and let the next call, or `close`, take back the part."""
        self._file.truncate(self._size)
        rest = memoryview(data)
        while rest:
            rest = rest[self._file.write(rest) :]
        self._size += len(data)

    def close(self) -> None:
        """Cut off what a failed write left, and close; a second time does nothing."""
        if not self._file.closed:
            try:
                self._file.truncate(self._size)
            finally:
                self._file.close()
