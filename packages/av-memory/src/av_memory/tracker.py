"""Scopes: how much memory a stretch of a program uses, and what its peak was.

How a peak is found. While any scope is open, a thread reads the resident set every 5 ms, so a rise that
comes and goes between two readings can be missed, and one reading can be off by what
:mod:`av_memory.probes` says. A stretch of native code that holds the interpreter's lock delays readings
until it lets go. But where the process reached a new maximum of its life while a scope was open, the
kernel knows it, and the scope's peak is that figure. ``high_water=True`` makes the kernel count anew for
the scope, which gives an exact peak if no other scope is open meanwhile.
"""

from __future__ import annotations

import functools
import inspect
import math
import os
from collections.abc import Awaitable, Callable, Generator, Iterator, Mapping
from dataclasses import dataclass, fields
from types import TracebackType
from typing import Any, ParamSpec, Self, TypeVar, cast

from av_memory._recorder import RECORDER, Scope
from av_memory._units import to_mb
from av_memory.probes import cgroup_memory, gpu_memory, machine_memory
from av_memory.recording import Recording, ScopeRecord

__all__ = [
    "GpuStats",
    "MemoryStats",
    "MemoryTracker",
    "ScopeStats",
    "clear_memory_stats",
    "enable_memory_tracking",
    "get_cpu_memory",
    "get_gpu_memory",
    "get_memory_stats",
    "get_recording",
    "reset_peak_memory",
    "save_report",
    "save_trace",
    "to_json",
]

P = ParamSpec("P")
R = TypeVar("R")

_enabled = True


def enable_memory_tracking(enabled: bool = True) -> None:
    """Turn tracking on or off for the whole process; it is on at the start.

    While it is off, entering and leaving a :class:`MemoryTracker` costs a fraction of a microsecond and
    records nothing. A scope that is open when it is turned off is still recorded.
    """
    global _enabled
    _enabled = bool(enabled)


class MemoryTracker:
    """Track the memory of a scope: a ``with`` block, an ``async with`` block, or a function.

    ::

        with MemoryTracker("load") as tracker:
            model = load()
        print(tracker.result.cpu.peak_mb)


        @MemoryTracker("step")
        def step(batch): ...

    Scopes may nest, overlap and run in several threads or tasks; each keeps its own start, end and peak.
    All of them see the memory of the whole process, since memory belongs to no thread. The decorated
    function may be plain, ``async`` or a generator; each call is a scope of its own. What was recorded is
    read with :func:`get_memory_stats` and :func:`get_recording`. All of it may be used in signal handlers
    and finalisers. Where no thread can be started, as in a program that is ending, peaks are what the
    readings on entry and on leaving and the kernel tell.

    Args:
        name: the name under which statistics are summed; a decorated function's own name if empty.
        high_water: reset the kernel's and torch's peak counters on entry, and read them on leaving, for
            exact peaks where no other scope is open at any time in between. This also restarts
            ``ru_maxrss`` and ``torch.cuda.max_memory_allocated``, so it is off by default. It costs tens
            of microseconds.
        tree: count child processes too: the sum of resident sets at each reading, and the sum of
            proportional set sizes at most four times a second. Where they cannot be read, such as for want
            of file descriptors, the result's figures of the tree are ``None``.

    Raises:
        RuntimeError: one tracker is entered while it is open, or left twice.
        TypeError: the name is not a string, or what is decorated not a function.
        MemoryProbeError: memory cannot be read on this system (on entry).
    """

    __slots__ = ("_scope", "high_water", "name", "tree")

    def __init__(self, name: str = "", *, high_water: bool = False, tree: bool = False) -> None:
        if name.__class__ is not str and not isinstance(name, str):  # the first is the quicker
            raise TypeError(f"a tracker's name is a string, not {name!r}; to decorate write @MemoryTracker()")
        self.name = name
        self.high_water = high_water
        self.tree = tree
        self._scope: Scope | None = None

    def __enter__(self) -> Self:
        if _enabled:
            scope = self._scope
            if scope is not None and scope.end_ns == 0:
                raise RuntimeError(
                    f"the tracker {self.name!r} is open already; make one MemoryTracker for each scope"
                )
            self._scope = RECORDER.open_scope(self.name or "unnamed", self.high_water, self.tree)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        scope = self._scope
        if scope is None:
            return
        if scope.end_ns != 0:
            if _enabled:
                raise RuntimeError(f"the tracker {self.name!r} was left already; it can be left once")
            return
        RECORDER.close_scope(scope, kind)

    async def __aenter__(self) -> Self:
        return self.__enter__()

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.__exit__(kind, error, traceback)

    @property
    def result(self) -> ScopeRecord:
        """What the last passage used. Raises ``RuntimeError`` before one has ended."""
        scope = self._scope
        if scope is None or scope.end_ns == 0:
            raise RuntimeError(
                f"the tracker {self.name!r} has no result yet: "
                + ("its scope is still open" if scope is not None else "nothing was tracked")
            )
        return scope.to_record(RECORDER.origin_ns)

    def __call__(self, function: Callable[P, R]) -> Callable[P, R]:
        """Track every call of a function."""
        if not callable(function) or isinstance(function, type):
            raise TypeError(f"MemoryTracker decorates functions, not {function!r}")
        name = self.name or function.__qualname__

        def scope() -> MemoryTracker:
            return MemoryTracker(name, high_water=self.high_water, tree=self.tree)

        if inspect.iscoroutinefunction(function):

            @functools.wraps(function)
            async def coroutine(*args: P.args, **kwargs: P.kwargs) -> object:
                with scope():
                    return await cast(Awaitable[object], function(*args, **kwargs))

            return cast(Callable[P, R], coroutine)
        if inspect.isasyncgenfunction(function):
            raise TypeError(
                f"{name} is an asynchronous generator; track its body with 'async with MemoryTracker()'"
            )
        if inspect.isgeneratorfunction(function):

            @functools.wraps(function)
            def generator(*args: P.args, **kwargs: P.kwargs) -> Generator[object, object, object]:
                with scope():
                    made = cast(Generator[object, object, object], function(*args, **kwargs))
                    return (yield from made)

            return cast(Callable[P, R], generator)

        @functools.wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            with scope():
                return function(*args, **kwargs)

        return call

    def __repr__(self) -> str:
        scope = self._scope
        state = "not entered" if scope is None else "open" if scope.end_ns == 0 else "closed"
        return f"<MemoryTracker {self.name!r}, {state}>"


class _AsMapping(Mapping[str, Any]):
    """A dataclass whose fields are also the keys of a read-only dictionary."""

    def __getitem__(self, key: str) -> Any:
        if key not in (names := [field.name for field in fields(cast(Any, self))]):
            raise KeyError(f"{key!r}; there are {', '.join(names)}")
        return getattr(self, key)

    def __iter__(self) -> Iterator[str]:
        return (field.name for field in fields(cast(Any, self)))

    def __len__(self) -> int:
        return len(fields(cast(Any, self)))


@dataclass(frozen=True, eq=False)
class ScopeStats(_AsMapping):
    """Every passage through the scopes of one name, summed up. Sizes in MB of 2**20 bytes."""

    count: int
    """Passages that have ended."""
    max_peak_mb: float
    """Largest peak of the process's resident set."""
    mean_peak_mb: float
    mean_net_mb: float
    """Mean of what a passage left behind (end minus start)."""
    total_wall_s: float
    mean_wall_s: float
    max_peak_gpu_mb: float
    """Largest peak on any one GPU."""


@dataclass(frozen=True, eq=False)
class GpuStats(_AsMapping):
    """One GPU as torch's allocator of this process sees it. Sizes in MB of 2**20 bytes."""

    current_mb: float
    """In living tensors."""
    reserved_mb: float
    """Taken from the device, the allocator's cache included."""
    peak_mb: float
    """Largest ``current_mb`` since start or :func:`reset_peak_memory`."""


@dataclass(frozen=True, eq=False)
class MemoryStats(_AsMapping):
    """The state of memory, as attributes and as a read-only dictionary. Sizes in MB of 2**20 bytes."""

    current_cpu_mb: float
    """Resident set of this process now."""
    peak_cpu_mb: float
    """Its peak since start or :func:`reset_peak_memory`."""
    current_gpu_mb: float
    """Living CUDA tensors of this process, summed over devices; 0 while CUDA is not in use."""
    peak_gpu_mb: float
    """Sum of the devices' peaks since start or reset; with several devices an upper bound."""
    gpus: dict[int, GpuStats]
    """By device index."""
    machine_total_mb: float
    machine_available_mb: float
    cgroup_limit_mb: float | None
    """Tightest limit of the control groups around this process; ``None`` if there is none."""
    cgroup_used_mb: float | None
    """What the group of that limit uses."""
    scopes: dict[str, ScopeStats]
    """By scope name. After 10,000 names, further ones are summed under ``(other names)``."""
    tracking_enabled: bool


def get_memory_stats() -> MemoryStats:
    """Everything at once: the process, its GPUs, the limits around it, and the statistics of each scope.

    Raises:
        MemoryProbeError: memory cannot be read on this system.
    """
    cpu_peak, gpu_peaks = RECORDER.process_peaks()
    gpus = {
        index: GpuStats(
            to_mb(reading.allocated_bytes), to_mb(reading.reserved_bytes), to_mb(gpu_peaks.get(index, 0))
        )
        for index, reading in gpu_memory().items()
    }
    machine, cgroup = machine_memory(), cgroup_memory()
    return MemoryStats(
        current_cpu_mb=get_cpu_memory(),
        peak_cpu_mb=to_mb(cpu_peak),
        current_gpu_mb=math.fsum(gpu.current_mb for gpu in gpus.values()),
        peak_gpu_mb=math.fsum(gpu.peak_mb for gpu in gpus.values()),
        gpus=gpus,
        machine_total_mb=to_mb(machine.total_bytes),
        machine_available_mb=to_mb(machine.available_bytes),
        cgroup_limit_mb=None if cgroup.limit_bytes is None else to_mb(cgroup.limit_bytes),
        cgroup_used_mb=None if cgroup.used_bytes is None else to_mb(cgroup.used_bytes),
        scopes={
            name: ScopeStats(
                count=totals.count,
                max_peak_mb=to_mb(totals.peak_max),
                mean_peak_mb=to_mb(totals.peak_sum / totals.count),
                mean_net_mb=to_mb(totals.net_sum / totals.count),
                total_wall_s=totals.wall_ns_sum / 1e9,
                mean_wall_s=totals.wall_ns_sum / totals.count / 1e9,
                max_peak_gpu_mb=to_mb(totals.gpu_peak_max),
            )
            for name, totals in RECORDER.totals.copy().items()
            if totals.count > 0
        },
        tracking_enabled=_enabled,
    )


def get_cpu_memory() -> float:
    """Resident set of this process now, in MB of 2**20 bytes.

    Raises:
        MemoryProbeError: it cannot be read on this system.
    """
    return to_mb(RECORDER.read_rss())


def get_gpu_memory(device_id: int | None = None) -> float:
    """CUDA memory in living tensors of this process now, in MB of 2**20 bytes.

    Args:
        device_id: index of one device; ``None`` sums over all.

    Returns:
        0.0 while this process does not use CUDA. torch is not imported, nor CUDA started, to find out.

    Raises:
        ValueError: CUDA is in use and has no such device, or ``device_id`` is negative.
    """
    if device_id is not None and device_id < 0:
        raise ValueError(f"device_id is {device_id}, but devices count from 0")
    readings = gpu_memory()
    if device_id is None:
        return math.fsum(to_mb(reading.allocated_bytes) for reading in readings.values())
    if not readings:
        return 0.0
    if device_id not in readings:
        raise ValueError(f"there is no CUDA device {device_id}; there are {sorted(readings)}")
    return to_mb(readings[device_id].allocated_bytes)


def reset_peak_memory() -> None:
    """Start the process's peaks, and torch's, at what is in use now.

    On Linux the kernel's high-water mark is reset, so ``ru_maxrss`` starts anew too. Scopes that are open
    keep the peaks that they have seen.
    """
    RECORDER.reset_peaks()


def clear_memory_stats() -> None:
    """Forget the scopes and curves recorded so far."""
    RECORDER.forget()


def get_recording() -> Recording:
    """A copy of everything recorded so far: the curves, and the last 10,000 scopes one by one."""
    return RECORDER.recording()


def save_report(
    path: str | os.PathLike[str], *, title: str = "Memory", sections: Mapping[str, str] | None = None
) -> None:
    """Write what was recorded so far as one self-contained HTML page.

    See :func:`av_memory.report.save_report` for the arguments.
    """
    from av_memory import report

    report.save_report(get_recording(), path, title=title, sections=sections)


def save_trace(path: str | os.PathLike[str]) -> None:
    """Write what was recorded so far as a Chrome/Perfetto trace; see :func:`av_memory.report.save_trace`."""
    from av_memory import report

    report.save_trace(get_recording(), path)


def to_json(path: str | os.PathLike[str] | None = None) -> str:
    """What was recorded so far as JSON, also written to ``path`` if one is given."""
    return get_recording().to_json(path)
