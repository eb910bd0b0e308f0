"""What was measured, as plain values: written by the tracker and the command, read by the reports.

The JSON form is versioned. A reader refuses a file of a newer version, and one that does not hold
together, with the reason and the file's name.
"""

from __future__ import annotations

import errno
import json
import os
import secrets
import stat
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

__all__ = ["Process", "Recording", "RecordingError", "ScopeRecord", "Series", "Usage", "write_atomically"]

_FORMAT = "av-memory-recording"
_VERSION = 1
_LARGEST = 1e15
_MOST_BYTES = 2**30


class RecordingError(ValueError):
    """A file is not a recording that this version can read."""


@dataclass(frozen=True, slots=True)
class Usage:
    """How one kind of memory moved during a scope, in MB of 2**20 bytes."""

    start_mb: float
    end_mb: float
    peak_mb: float
    peak_exact: bool = False
    """Whether the peak is the kernel's or allocator's own; else it is the largest sample."""

    @property
    def net_mb(self) -> float:
        """What the scope left behind: end minus start."""
        return self.end_mb - self.start_mb


@dataclass(frozen=True, slots=True)
class ScopeRecord:
    """One passage through a scope."""

    name: str
    thread: str
    """Name of the thread that entered."""
    depth: int
    """Number of scopes around it in the same thread or task."""
    start_s: float
    """Seconds since the recording began."""
    wall_s: float
    cpu: Usage
    gpus: dict[int, Usage] = field(default_factory=dict[int, Usage])
    tree: Usage | None = None
    """Sum of resident sets over the process tree, where it was asked for."""
    tree_pss_peak_mb: float | None = None
    """Largest sum of proportional set sizes over the tree, from at most four samples a second."""
    error: str | None = None
    """Type of the exception that left the scope."""


@dataclass(frozen=True, slots=True)
class Series:
    """One curve: times in seconds since the recording began, and values in MB."""

    name: str
    """``cpu``, ``cuda:N``, ``tree rss``, ``tree pss`` or ``PID name`` of a process."""
    times_s: list[float]
    values_mb: list[float]


@dataclass(frozen=True, slots=True)
class Process:
    """One process of a watched tree."""

    pid: int
    name: str
    peak_rss_mb: float


@dataclass(frozen=True, slots=True)
class Recording:
    """A whole measurement."""

    created_unix_s: float
    """When it began, seconds since 1970."""
    wall_s: float
    series: list[Series]
    scopes: list[ScopeRecord]
    dropped_scopes: int = 0
    """Passages that are counted in the statistics but not kept one by one."""
    processes: list[Process] = field(default_factory=list[Process])
    command: list[str] = field(default_factory=list[str])
    """The watched command line; empty for a recording of the own process."""
    exit_code: int | None = None
    limits: dict[str, float] = field(default_factory=dict[str, float])
    """``machine_total_mb``, ``cgroup_limit_mb`` and ``limit_mb`` (set by the user), where known."""

    def to_dict(self) -> dict[str, Any]:
        """As plain lists, dictionaries and numbers, with the format's name and version."""
        return {"format": _FORMAT, "version": _VERSION, **asdict(self)}

    def to_json(self, path: str | os.PathLike[str] | None = None) -> str:
        """As JSON; also written to ``path``, whole or not at all, if one is given."""
        text = json.dumps(self.to_dict(), allow_nan=False)
        if path is not None:
            write_atomically(path, text)
        return text

    @classmethod
    def from_json(cls, text: str | bytes, source: str = "the text") -> Recording:
        """Read what :meth:`to_json` wrote.

        Args:
            text: the JSON.
            source: what to call it in an error.

        Raises:
            RecordingError: it is not JSON, not a recording, newer than this version, or inconsistent.
        """
        try:
            data: Any = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise RecordingError(f"{source} is not JSON: {error}") from error
        if not isinstance(data, dict) or cast(dict[str, Any], data).get("format") != _FORMAT:
            raise RecordingError(f'{source} is not a recording of av-memory: it has no "format": "{_FORMAT}"')
        body = dict(cast(dict[str, Any], data))
        body.pop("format")
        version = body.pop("version", None)
        if not isinstance(version, int) or version < 1:
            raise RecordingError(f"{source} has no usable version: {version!r}")
        if version > _VERSION:
            raise RecordingError(
                f"{source} has version {version}, this av-memory reads up to {_VERSION}: upgrade av-memory"
            )
        try:
            return _recording_from(body)
        except (TypeError, KeyError, AttributeError, ValueError, OverflowError) as error:
            raise RecordingError(f"{source} does not hold together: {error}") from error

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Recording:
        """Read a recording from a regular file of at most 1 GiB.

        Raises:
            OSError: it cannot be read, or is a folder, a pipe or a device, which might have no end.
            RecordingError: it is too large, or as for :meth:`from_json`; the message names the file.
        """
        mode_of_regular_file(path)
        with open(path, "rb") as file:  # noqa: PTH123 (no Path, as below)
            # Some files under /proc have no size and no end.
            text = file.read(_MOST_BYTES + 1) if os.fstat(file.fileno()).st_size <= _MOST_BYTES else None
        if text is None or len(text) > _MOST_BYTES:
            raise RecordingError(f"{os.fspath(path)} is larger than {_MOST_BYTES >> 30} GiB")
        return cls.from_json(text, source=os.fspath(path))


def _recording_from(body: dict[str, Any]) -> Recording:
    series = [
        Series(_text(item["name"]), _numbers(item["times_s"]), _numbers(item["values_mb"]))
        for item in body.pop("series")
    ]
    for one in series:
        if len(one.times_s) != len(one.values_mb):
            raise ValueError(f"series {one.name!r} has {len(one.times_s)} times, {len(one.values_mb)} values")
        if any(later < earlier for earlier, later in pairwise(one.times_s)):
            raise ValueError(f"the times of series {one.name!r} go back")
    scopes = [_scope(dict(item)) for item in body.pop("scopes")]
    processes = [
        Process(_whole(item["pid"]), _text(item["name"]), _number(item["peak_rss_mb"]))
        for item in body.pop("processes")
    ]
    if not isinstance(body["command"], list):
        raise ValueError(f"the command is {body['command']!r}, not a list")
    body["command"] = [_text(word) for word in cast(list[Any], body["command"])]
    body["limits"] = {name: _number(limit) for name, limit in body["limits"].items()}
    _number(body["created_unix_s"])
    _number(body["wall_s"])
    _whole(body["dropped_scopes"])
    if body["exit_code"] is not None:
        _whole(body["exit_code"])
    return Recording(series=series, scopes=scopes, processes=processes, **body)


def _scope(fields: dict[str, Any]) -> ScopeRecord:
    fields["cpu"] = _usage(fields["cpu"])
    fields["gpus"] = {int(index): _usage(usage) for index, usage in fields["gpus"].items()}
    fields["tree"] = _usage(fields["tree"]) if fields["tree"] is not None else None
    scope = ScopeRecord(**fields)
    _text(scope.name)
    _text(scope.thread)
    _number(scope.start_s)
    if _whole(scope.depth) < 0 or _number(scope.wall_s) < 0:
        raise ValueError(f"scope {scope.name!r} has depth {scope.depth} and lasted {scope.wall_s} s")
    if scope.tree_pss_peak_mb is not None:
        _number(scope.tree_pss_peak_mb)
    if scope.error is not None:
        _text(scope.error)
    return scope


def _usage(item: Mapping[str, Any]) -> Usage:
    usage = Usage(**item)
    for size_mb in (usage.start_mb, usage.end_mb, usage.peak_mb):
        _number(size_mb)
    if not isinstance(cast(Any, usage.peak_exact), bool):
        raise ValueError(f"peak_exact is {usage.peak_exact!r}")
    return usage


def _numbers(values: list[Any]) -> list[float]:
    return [_number(value) for value in values]


def _number(value: Any) -> float:
    # The bound keeps sums and pixels finite; it is millions of years, or of terabytes.
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= _LARGEST:
        raise ValueError(f"{value!r:.80} is not a number that can be meant")
    return float(value)


def _whole(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or abs(value) > _LARGEST:
        raise ValueError(f"{value!r:.80} is not a whole number")
    return value


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{value!r:.80} is not a text")
    return value


def write_atomically(path: str | os.PathLike[str], text: str) -> None:
    """Write a text file so that, whatever happens, the old content or the new one is there, never a part.

    A symbolic link is followed, and a file that is there keeps its permissions.

    Raises:
        OSError: the folder is missing or not writable, or the disk is full; nothing is left behind. Also
            if the path is there and no regular file: a rename would replace ``/dev/null`` itself.
    """
    mode = mode_of_regular_file(path)
    target = Path(os.path.realpath(path))
    # A name of its own: the target's, made longer, could be longer than the system takes.
    temporary = target.with_name(f".av-memory-{secrets.token_hex(8)}.tmp")
    number = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666 if mode is None else mode)
    try:
        with os.fdopen(number, "w", encoding="utf-8") as file:
            if mode is not None:
                temporary.chmod(mode)
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def mode_of_regular_file(path: str | os.PathLike[str]) -> int | None:
    """Its permissions, ``None`` if nothing is there.

    Raises ``OSError`` if something is there that is no regular file, or the path itself is impossible.
    """
    try:
        status = os.stat(path)  # noqa: PTH116 (no Path: it drops a trailing slash, which means a folder)
    except FileNotFoundError:
        return None
    if not stat.S_ISREG(status.st_mode):
        raise OSError(errno.EINVAL, "not a regular file", os.fspath(path))
    return stat.S_IMODE(status.st_mode) & 0o777
