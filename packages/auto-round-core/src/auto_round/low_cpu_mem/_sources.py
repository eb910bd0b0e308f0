"""Where bytes come from: a file read at given positions, or memory that looks like one."""

from __future__ import annotations

import io
import os
import stat
import threading
import weakref
from pathlib import Path
from typing import Any, Protocol

from auto_round.exceptions import CheckpointError

# Linux reads at most 2 GiB less a page at once, whatever is asked for.
_MOST_AT_ONCE = 1 << 30


class Source(Protocol):
    """Bytes that any number of threads may read at once."""

    path: Path
    """What errors name; a made-up name where there is no file."""
    size: int
    """Bytes."""

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """Fill `buffer` with what is at `offset`."""
        ...

    def close(self) -> None:
        """Give back what is held, once no thread reads any more."""
        ...


class FileSource:
    """A regular file, kept open.

    Reads name their position, so that threads share the descriptor without a lock around the reading, and
    copy into the caller's memory, so that no mapped page counts as the process's own.

    Args:
        path: Its name.
        descriptor: Where the caller has it open already, that; it stays the caller's.

    Raises:
        CheckpointError: The file is missing, cannot be opened, or is a folder, pipe or device.
    """

    def __init__(self, path: Path, descriptor: int | None = None) -> None:
        self.path = path
        try:
            # Opening a pipe would wait for its writer.
            if not stat.S_ISREG(os.stat(path if descriptor is None else descriptor).st_mode):  # noqa: PTH116
                raise CheckpointError(f"{path} is not a regular file.")
            self._fd = os.open(path, os.O_RDONLY) if descriptor is None else os.dup(descriptor)
        except FileNotFoundError:
            raise CheckpointError(f"{path} does not exist.") from None
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{path} cannot be opened: {error}.") from error
        self.size = os.fstat(self._fd).st_size
        self._close_fd = weakref.finalize(self, os.close, self._fd)
        self._lock = threading.Lock()
        self._readers = 0
        self._closed = False

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """Fill `buffer` with what is at `offset`.

        Raises:
            CheckpointError: The file is closed, cannot be read, or has become too short.
        """
        with self._lock:
            if self._closed:
                raise CheckpointError(f"{self.path} is closed; open the checkpoint again to read from it.")
            self._readers += 1
        try:
            done = 0
            while done < len(buffer):
                read = os.preadv(self._fd, [buffer[done : done + _MOST_AT_ONCE]], offset + done)
                if read == 0:
                    raise CheckpointError(f"{self.path} is truncated: it ends before byte {offset + done}.")
                done += read
        except OSError as error:
            raise CheckpointError(f"{self.path} cannot be read: {error.strerror}.") from error
        finally:
            with self._lock:
                self._readers -= 1
                self._close_if_done()

    def close(self) -> None:
        """Close the file; where a thread is reading from it, as soon as that is done."""
        with self._lock:
            self._closed = True
            self._close_if_done()

    def _close_if_done(self) -> None:
        # The number of a closed descriptor may at once stand for another file, so a reader keeps it open.
        if self._closed and self._readers == 0:
            self._close_fd()


class MemorySource:
    """Bytes in memory.

    Args:
        data: The bytes.
        path: What errors name.
        owner: Kept alive as long as this is.
    """

    def __init__(self, data: bytes | bytearray | memoryview, path: Path, *, owner: Any = None) -> None:
        self.path = path
        self._data = memoryview(data).cast("B")
        self.size = len(self._data)
        self._owner = owner

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """Fill `buffer` with what is at `offset`.

        Raises:
            CheckpointError: There is less.
        """
        if offset + len(buffer) > self.size:
            raise CheckpointError(f"{self.path} is truncated: it ends before byte {offset + len(buffer)}.")
        buffer[:] = self._data[offset : offset + len(buffer)]

    def close(self) -> None:
        """Do nothing: the memory goes with this object."""


class SourceFile(io.RawIOBase):
    """A source as a file object, for readers that want one."""

    def __init__(self, source: Source) -> None:
        super().__init__()
        self.size = source.size
        self._source = source
        self._position = 0

    def readable(self) -> bool:
        """Return True."""
        return True

    def seekable(self) -> bool:
        """Return True."""
        return True

    def tell(self) -> int:
        """Return the position."""
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        """Move to a position and return it.

        Raises:
            OSError: It lies before the start.
        """
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self.size}[whence]
        if start + offset < 0:
            raise OSError(f"position {start + offset} lies before the start")
        self._position = start + offset
        return self._position

    def readinto(self, buffer: Any, /) -> int:
        """Fill the buffer as far as there is something, and return how far."""
        view = memoryview(buffer).cast("B")
        count = min(len(view), max(self.size - self._position, 0))
        self._source.read_into(view[:count], self._position)
        self._position += count
        return count


def read_bytes(source: Source, offset: int, length: int) -> bytes:
    """Return `length` bytes at `offset`; the caller sees to it that the length is sensible.

    Raises:
        CheckpointError: The source ends before.
    """
    if offset + length > source.size:
        raise CheckpointError(f"{source.path} is truncated: {length} bytes were to be at byte {offset}.")
    data = bytearray(length)
    source.read_into(memoryview(data), offset)
    return bytes(data)
