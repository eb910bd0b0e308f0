"""The one recorder of a process: open scopes, their statistics, the curves, and the thread that samples.

A scope costs a few microseconds because entering and leaving only take one reading each and touch no
system call but that; a parked thread is woken only if none has sampled within the last tenth of a
second.

A signal handler, or a finaliser that the garbage collector runs, may use the recorder in the thread that
it interrupts, also in the middle of what happens under a lock here. So the locks let their thread in
again, no other lock is taken under them that does not, and each step leaves a state that others can work
with: what is shared changes in one operation, or is read and written with no call in between.

Values are bytes and nanoseconds here; they become MB and seconds where they leave.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import os
import sys
import threading
import time
from collections import OrderedDict, deque
from contextvars import ContextVar
from time import perf_counter_ns
from typing import Any, cast

from av_memory._pss import PssReader
from av_memory._series import GrowingSeries
from av_memory._threads import Bell, start_daemon
from av_memory._units import BYTES_PER_MB, to_mb
from av_memory.probes import (
    GpuMemory,
    MemoryProbeError,
    ProcessTree,
    RssProbe,
    cgroup_memory,
    gpu_memory,
    high_water_bytes,
    initialised_cuda,
    lifetime_peak_bytes,
    machine_memory,
    reset_high_water,
)
from av_memory.recording import Recording, ScopeRecord, Series, Usage

SAMPLE_INTERVAL_S = 0.005
_TICKS_UNTIL_PARKED = 20
_TICKS_PER_GPU_SAMPLE = 4
_TICKS_PER_TREE_REFRESH = 10
_KEPT_SCOPES = 10_000
_KEPT_NAMES = 10_000
_OTHER_NAMES = "(other names)"

_current: ContextVar[Scope | None] = ContextVar("av_memory_scope", default=None)
_collector: OrderedDict[str, None] = OrderedDict.fromkeys(("start", "stop"))
"""Its last key is what the garbage collector, in whichever thread, did last."""

if sys.version_info < (3, 12):
    # Not a function in Python: the collector would swallow a Ctrl-C that happens to be raised in it.
    # (The second argument, a filled dictionary, counts as true.)
    gc.callbacks.append(cast(Any, _collector.move_to_end))


def _set_current(scope: Scope | None) -> None:
    # Up to Python 3.11 the collector may run in the middle of ContextVar.set, which crashes the interpreter
    # if a finaliser sets a variable then. A scope in a finaliser is no parent of others there.
    if [*_collector][-1] == "stop":  # read in one step: a collection in the middle of two would reorder it
        _current.set(scope)


class Scope:
    """One passage through a tracker, open until ``end_ns`` is set."""

    __slots__ = (
        "alone",
        "depth",
        "end_bytes",
        "end_ns",
        "error",
        "exact",
        "gpu_end",
        "gpu_peaks",
        "gpu_start",
        "high_water",
        "name",
        "parent",
        "peak_bytes",
        "start_bytes",
        "start_lifetime_peak",
        "start_ns",
        "thread",
        "tree_end",
        "tree_peak",
        "tree_pss_peak",
        "tree_start",
    )

    start_bytes: int
    peak_bytes: int
    start_ns: int
    start_lifetime_peak: int
    end_bytes: int

    def __init__(self, name: str, high_water: bool) -> None:
        self.name = name
        self.parent = _innermost_open(_current.get())
        self.depth = 0 if self.parent is None else self.parent.depth + 1
        self.high_water = high_water
        self.thread = threading.current_thread().name
        self.end_ns = 0
        self.exact = False
        self.alone = True
        self.error: str | None = None
        self.gpu_start: dict[int, GpuMemory] | None = None
        self.gpu_end: dict[int, GpuMemory] = {}
        self.gpu_peaks: dict[int, int] = {}
        self.tree_start: int | None = None
        self.tree_end = 0
        self.tree_peak = 0
        self.tree_pss_peak: int | None = None

    def see_gpus(self, readings: dict[int, GpuMemory]) -> None:
        for index, reading in readings.items():
            if reading.allocated_bytes > self.gpu_peaks.get(index, -1):
                self.gpu_peaks[index] = reading.allocated_bytes

    def to_record(self, origin_ns: int) -> ScopeRecord:
        gpus: dict[int, Usage] = {}
        for index, end in self.gpu_end.items():
            start = (self.gpu_start or {}).get(index, GpuMemory(0, 0, 0))
            # The allocator's own peak is this scope's if it rose, or was reset, while the scope was open.
            exact = end.peak_allocated_bytes > start.peak_allocated_bytes or (self.high_water and self.alone)
            peak = end.peak_allocated_bytes if exact else self.gpu_peaks.get(index, 0)
            gpus[index] = Usage(to_mb(start.allocated_bytes), to_mb(end.allocated_bytes), to_mb(peak), exact)
        return ScopeRecord(
            name=self.name,
            thread=self.thread,
            depth=self.depth,
            start_s=(self.start_ns - origin_ns) / 1e9,
            wall_s=(self.end_ns - self.start_ns) / 1e9,
            cpu=Usage(to_mb(self.start_bytes), to_mb(self.end_bytes), to_mb(self.peak_bytes), self.exact),
            gpus=gpus,
            tree=None
            if self.tree_start is None
            else Usage(to_mb(self.tree_start), to_mb(self.tree_end), to_mb(self.tree_peak)),
            tree_pss_peak_mb=None if self.tree_pss_peak is None else to_mb(self.tree_pss_peak),
            error=self.error,
        )


def _innermost_open(scope: Scope | None) -> Scope | None:
    while scope is not None and scope.end_ns != 0:
        scope = scope.parent
    return scope


class Totals:
    """Sums over every passage through the scopes of one name."""

    __slots__ = ("count", "gpu_peak_max", "net_sum", "peak_max", "peak_sum", "wall_ns_sum")

    def __init__(self) -> None:
        self.count = 0
        self.peak_max = 0
        self.peak_sum = 0
        self.net_sum = 0
        self.wall_ns_sum = 0
        self.gpu_peak_max = 0

    def add(self, scope: Scope) -> None:
        self.count += 1
        peak = scope.peak_bytes
        self.peak_sum += peak
        if peak > self.peak_max:
            self.peak_max = peak
        self.net_sum += scope.end_bytes - scope.start_bytes
        self.wall_ns_sum += scope.end_ns - scope.start_ns
        if scope.gpu_peaks:
            gpu_peak = max(scope.gpu_peaks.values())
            if gpu_peak > self.gpu_peak_max:
                self.gpu_peak_max = gpu_peak


class Recorder:
    """See the module's text. One instance a process; a forked child starts with an empty one."""

    def __init__(self) -> None:
        self._ending = False
        self._start_afresh()

    def _start_afresh(self) -> None:
        self._lock = threading.RLock()
        self._tree_lock = threading.RLock()
        self._probe: RssProbe | None = None
        self._sampler: threading.Thread | None = None
        self._awake = False
        self._wake = Bell()
        self._open: list[Scope] = []
        self._tree: ProcessTree | None = None
        self._pss: PssReader | None = None
        self._tree_in_use = False
        self._tree_rss: int | None = None
        self._tree_scopes: set[Scope] = set()
        self._process_peak = 0
        self._high_water_is_ours = True
        self._gpu_process_peaks: dict[int, int] = {}
        self._forget()

    def _forget(self) -> None:
        self._cpu = GrowingSeries()
        self._others: dict[str, GrowingSeries] = {}
        self._closed: deque[Scope] = deque(maxlen=_KEPT_SCOPES)
        self._closed_count = 0
        self.totals: dict[str, Totals] = {}
        self.created_unix_s = time.time()
        self.origin_ns = perf_counter_ns()

    def forget(self) -> None:
        """Drop what was recorded; open scopes stay open and are recorded when they close."""
        with self._lock:
            self._forget()

    def after_fork_in_child(self) -> None:
        """Begin again: the thread did not survive, and the descriptor still shows the parent."""
        if self._probe is not None:
            self._probe.close()
        self._start_afresh()

    def end(self) -> None:
        """Let the sampler come to its end: one that is stopped with the interpreter keeps its lock."""
        self._ending = True
        sampler = self._sampler
        if sampler is not None:
            self._wake.ring()
            sampler.join(0.1)

    def read_rss(self) -> int:
        """The resident set now, in bytes."""
        probe = self._probe
        if probe is None:
            probe = self._probe = RssProbe()
        return probe.read()

    # Scopes

    def open_scope(self, name: str, high_water: bool, tree: bool) -> Scope:
        scope = Scope(name, high_water)
        _set_current(scope)
        if initialised_cuda() is not None:
            scope.gpu_start = gpu_memory()
            scope.see_gpus(scope.gpu_start)
        try:
            if tree:
                self._tree_scopes.add(scope)
                scope.tree_start = self._read_tree()
                scope.tree_peak = scope.tree_start or 0
            rss = self.read_rss()
            with self._lock:
                scope.start_bytes = scope.peak_bytes = rss
                scope.start_lifetime_peak = lifetime_peak_bytes()
                open_scopes = self._open
                open_scopes.append(scope)
                if len(open_scopes) > 1:
                    for other in open_scopes.copy():
                        other.alone = False
                elif high_water:
                    self._fold_process_peaks()
                    self._reset_peaks()
                    scope.start_lifetime_peak = lifetime_peak_bytes()
                if not self._awake:
                    self._wake_sampler()
                now = scope.start_ns = perf_counter_ns()
                self._cpu.append(now, rss)
        except BaseException:
            self._give_up(scope)
            raise
        return scope

    def _give_up(self, scope: Scope) -> None:
        scope.end_ns = perf_counter_ns()
        _set_current(_innermost_open(scope.parent))
        with self._lock, contextlib.suppress(ValueError):
            self._open.remove(scope)
        self._let_go_of_tree(scope)

    def close_scope(self, scope: Scope, error: type[BaseException] | None) -> None:
        rss = self.read_rss()
        lifetime_peak = lifetime_peak_bytes()
        now = perf_counter_ns()
        if scope.gpu_start is not None or initialised_cuda() is not None:
            scope.gpu_end = gpu_memory()
            scope.see_gpus(scope.gpu_end)
        if scope.tree_start is not None:
            tree_end = self._read_tree()
            if tree_end is None:
                scope.tree_start = None
            else:
                scope.tree_end = tree_end
        # Scopes may be left in any order, and in another thread or task than they were entered in. What a
        # scope that was entered inside of this one goes back to must not be lost, nor grow to a chain.
        parent = scope.parent
        if parent is not None and parent.end_ns != 0:
            parent = scope.parent = _innermost_open(parent)
        if _current.get() is scope:
            _set_current(parent)
        with self._lock:
            scope.end_bytes = rss
            scope.error = None if error is None else error.__name__
            try:
                self._open.remove(scope)
            except ValueError:  # entered before a fork, left in the child: the parent records it
                scope.end_ns = now
                return
            if rss > scope.peak_bytes:
                scope.peak_bytes = rss
            if lifetime_peak > scope.start_lifetime_peak:
                # The process reached a new maximum while the scope was open, so it is the scope's peak.
                scope.peak_bytes = max(scope.peak_bytes, lifetime_peak)
                scope.exact = True
            elif scope.high_water and scope.alone:
                high_water = high_water_bytes()
                if high_water is not None and self._high_water_is_ours:
                    scope.peak_bytes = max(scope.peak_bytes, high_water)
                    scope.exact = True
            scope.end_ns = now
            self._cpu.append(now, rss)
            self._closed_count += 1
            self._closed.append(scope)
            totals = self.totals.get(scope.name)
            if totals is None:
                name = scope.name if len(self.totals) < _KEPT_NAMES else _OTHER_NAMES
                totals = self.totals.setdefault(name, Totals())
            totals.add(scope)
        if self._tree_scopes:
            self._let_go_of_tree(scope)

    # The sampler

    def _wake_sampler(self) -> None:
        self._awake = True
        if self._sampler is not None:
            self._wake.ring()
        elif not self._ending:
            self._sampler = start_daemon(self._sample_forever, "av-memory")
            self._awake = self._sampler is not None  # else the next scope tries again

    def _sample_forever(self) -> None:
        while not self._ending:
            # A reading that fails is left out: a curve with a hole is better than a dead thread.
            with contextlib.suppress(Exception):
                self._sample_until_parked()

    def _sample_until_parked(self) -> None:
        # Each reading finds the processor's caches full of the program's data: every line here counts.
        sleep, ticks, idle_ticks = time.sleep, 0, 0
        while not self._ending:
            sleep(SAMPLE_INTERVAL_S)
            if self._open:
                idle_ticks = 0
                ticks += 1
                self._sample(ticks)
                continue
            idle_ticks += 1
            if idle_ticks >= _TICKS_UNTIL_PARKED and self._park():
                self._wake.wait()
                idle_ticks = 0

    def _park(self) -> bool:
        with self._lock:
            if self._open or self._ending:
                return False
            self._wake.wait(0)  # uses up a ring that came while this thread was awake
            self._awake = False
            return True

    def _sample(self, ticks: int) -> None:
        rss = self.read_rss()
        now = perf_counter_ns()
        with self._lock:
            self._cpu.append(now, rss)
            for scope in self._open.copy():
                if rss > scope.peak_bytes:
                    scope.peak_bytes = rss
        if rss > self._process_peak:
            self._process_peak = rss
        if self._tree is not None:
            self._read_tree(make=False, refresh=ticks % _TICKS_PER_TREE_REFRESH == 0)
        if ticks % _TICKS_PER_GPU_SAMPLE == 0 and initialised_cuda() is not None:
            self._sample_gpus()

    def _sample_gpus(self) -> None:
        readings, now = gpu_memory(), perf_counter_ns()
        with self._lock:
            for index, reading in readings.items():
                self._append(f"cuda:{index}", now, reading.allocated_bytes)
            for scope in self._open.copy():
                scope.see_gpus(readings)

    def _append(self, name: str, now: int, value: int) -> None:
        self._others.setdefault(name, GrowingSeries()).append(now, value)

    def _read_tree(self, *, make: bool = True, refresh: bool = True) -> int | None:
        """Read the sum of resident sets; ``None`` where it cannot be had, such as for want of descriptors."""
        with self._tree_lock:
            if self._tree_in_use:  # by what this call interrupts
                return self._tree_rss
            self._tree_in_use = True
            try:
                if self._tree is None:
                    if not make:
                        return None
                    self._tree = ProcessTree()
                    self._pss = PssReader(self._tree, self._see_pss)
                elif refresh:
                    self._tree.refresh()
                self._tree_rss = rss = self._tree.rss_bytes()
            except (OSError, MemoryProbeError):
                return None
            finally:
                self._tree_in_use = False
        now = perf_counter_ns()
        with self._lock:
            self._append("tree rss", now, rss)
            for scope in self._open.copy():
                if scope.tree_start is not None:
                    scope.tree_peak = max(scope.tree_peak, rss)
        return rss

    def _see_pss(self, now: int, pss: int) -> None:
        with self._lock:
            self._append("tree pss", now, pss)
            for scope in self._open.copy():
                if scope.tree_start is not None:
                    scope.tree_pss_peak = max(scope.tree_pss_peak or 0, pss)

    def _let_go_of_tree(self, scope: Scope) -> None:
        self._tree_scopes.discard(scope)
        with self._tree_lock:
            if self._tree_scopes or self._tree_in_use:
                return
            tree, self._tree = self._tree, None
            pss, self._pss = self._pss, None
            if pss is not None:
                pss.stop()
            if tree is not None:
                tree.close()

    # Peaks of the whole process

    def _fold_process_peaks(self) -> None:
        """Remember the peaks so far, before the counters that hold them are reset."""
        kernel = high_water_bytes()
        if not self._high_water_is_ours:
            kernel = None
        elif kernel is None:
            kernel = lifetime_peak_bytes()
        peak = max(kernel or 0, self.read_rss())
        if peak > self._process_peak:
            self._process_peak = peak
        for index, reading in gpu_memory().items():
            seen = self._gpu_process_peaks.get(index, 0)
            self._gpu_process_peaks[index] = max(seen, reading.peak_allocated_bytes)

    def _reset_peaks(self) -> None:
        self._high_water_is_ours = reset_high_water()
        cuda = initialised_cuda()
        if cuda is not None:
            for index in range(cuda.device_count()):
                cuda.reset_peak_memory_stats(index)

    def process_peaks(self) -> tuple[int, dict[int, int]]:
        """Peak resident set, and peak allocation by GPU, in bytes since start or :meth:`reset_peaks`."""
        with self._lock:
            self._fold_process_peaks()
            return self._process_peak, dict(self._gpu_process_peaks)

    def reset_peaks(self) -> None:
        """Start the process's peaks at what is in use now; open scopes keep what they have seen."""
        with self._lock:
            rss = self.read_rss()
            lifetime_peak = lifetime_peak_bytes()
            gpus = gpu_memory()
            for scope in self._open.copy():
                if lifetime_peak > scope.start_lifetime_peak:
                    scope.peak_bytes = max(scope.peak_bytes, lifetime_peak)
                for index, reading in gpus.items():
                    start = (scope.gpu_start or {}).get(index)
                    if start is None or reading.peak_allocated_bytes > start.peak_allocated_bytes:
                        seen = scope.gpu_peaks.get(index, 0)
                        scope.gpu_peaks[index] = max(seen, reading.peak_allocated_bytes)
                scope.alone = False
            self._reset_peaks()
            self._process_peak = rss
            self._gpu_process_peaks = {}

    def recording(self) -> Recording:
        """A copy of what was recorded, in MB and seconds; scopes that are still open are not in it."""
        with self._lock:
            closed = list(self._closed)
            series = [
                Series(name, *curve.points(self.origin_ns, BYTES_PER_MB))
                for name, curve in [("cpu", self._cpu), *self._others.copy().items()]
                if len(curve) > 0
            ]
        return Recording(
            created_unix_s=self.created_unix_s,
            wall_s=(perf_counter_ns() - self.origin_ns) / 1e9,
            series=series,
            scopes=[scope.to_record(self.origin_ns) for scope in closed],
            dropped_scopes=self._closed_count - len(closed),
            limits=known_limits(),
        )


def known_limits() -> dict[str, float]:
    """The machine's memory and the tightest cgroup limit, in MB, by the names that recordings use."""
    limits = {"machine_total_mb": to_mb(machine_memory().total_bytes)}
    cgroup = cgroup_memory()
    if cgroup.limit_bytes is not None:
        limits["cgroup_limit_mb"] = to_mb(cgroup.limit_bytes)
    return limits


RECORDER = Recorder()
atexit.register(RECORDER.end)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=RECORDER.after_fork_in_child)
