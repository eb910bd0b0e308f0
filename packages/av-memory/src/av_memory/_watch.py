"""Running a command and measuring its whole tree of processes from outside."""

from __future__ import annotations

import errno
import os
import resource
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass

from av_memory._pss import READING_SHARE, PssReader
from av_memory._series import GrowingSeries
from av_memory._signals import Signals, become_subreaper, send
from av_memory._units import BYTES_PER_MB, to_mb
from av_memory.probes import (
    MemoryProbeError,
    ProcessTree,
    TreeMember,
    cgroup_memory,
    machine_memory,
)
from av_memory.recording import Process, Recording, Series

OVER_LIMIT = 125
"""Exit code after the limit was passed."""

GRACE_S = 5.0
"""How long processes have between SIGTERM and SIGKILL."""

_MAXRSS_BYTES = 1 if sys.platform == "darwin" else 1024
_REFRESH_S = 0.05
_AVERAGED, _LONGEST_PAUSE_S = 32, 0.25
_CURVES_SHOWN, _CURVES_KEPT = 8, 64


class NotStartedError(Exception):
    """The command cannot be started; the cause is the system's error."""

    def __init__(self, cause: OSError) -> None:
        super().__init__(str(cause))
        self.cause = cause


@dataclass(frozen=True, slots=True)
class Watched:
    """What came of it."""

    recording: Recording
    exit_code: int
    """128 + n if signal n ended the command, and 125 if the limit was passed."""
    reason: str | None
    """Why the command was stopped, if it was."""
    still_running: int
    """Processes of the tree that outlive the command."""


def watch(command: Sequence[str], signals: Signals, *, interval_s: float, limit_mb: float | None) -> Watched:
    """Start the command in the foreground, and sample its tree until it ends.

    Args:
        command: the program and its arguments.
        signals: an open context, from which signals are passed on to the command.
        interval_s: time between two samples of the resident sets.
        limit_mb: end the whole tree when its memory passes this.

    Raises:
        NotStartedError: the command cannot be started.
    """
    return _Watch(command, signals, interval_s, limit_mb).run()


class _Throttle:
    """When a reading is due next: after its interval, or later if readings are dear on average."""

    def __init__(self, interval_s: float) -> None:
        self._interval_s = interval_s
        self.due_s = 0.0
        self._began_cpu_s = 0.0
        self._cost_s = 0.0

    def is_due(self, now_s: float) -> bool:
        if now_s < self.due_s:
            return False
        # Processor time, as wall time would also count a wait for a busy processor.
        self._began_cpu_s = time.thread_time()
        return True

    def done(self, now_s: float) -> None:
        # The average, as that clock jumps by milliseconds on some kernels, and one jump must leave no hole.
        self._cost_s += (time.thread_time() - self._began_cpu_s - self._cost_s) / _AVERAGED
        pause_s = max(self._interval_s, min(READING_SHARE * self._cost_s, _LONGEST_PAUSE_S))
        # From when it was due, so that the time for the reading itself does not add to the interval.
        self.due_s = max(self.due_s + pause_s, now_s)


class _Watch:
    def __init__(
        self, command: Sequence[str], signals: Signals, interval_s: float, limit_mb: float | None
    ) -> None:
        self._command = list(command)
        self._signals = signals
        self._limit_bytes = None if limit_mb is None else limit_mb * BYTES_PER_MB
        self._sample_time = _Throttle(interval_s)
        self._refresh_time = _Throttle(_REFRESH_S)
        self._rss = GrowingSeries()
        self._curves: dict[int, tuple[TreeMember, GrowingSeries]] = {}
        self._status: int | None = None
        self._largest_by_kernel = 0
        self._reason: str | None = None
        self._kill_at_s = float("inf")
        self._above_since_s = float("inf")

    def run(self) -> Watched:
        adopts = become_subreaper()
        # Up to this size the kernel's figure for the command may be the one it took over from this process.
        own_peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _MAXRSS_BYTES
        created_unix_s = time.time()
        self._origin_ns = time.perf_counter_ns()
        try:
            if not self._command[0]:  # which Python takes for a mistake of its caller, not for a missing file
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
            self._pid = os.posix_spawnp(
                self._command[0],
                self._command,
                os.environ,
                setsigmask=self._signals.outer_mask,
                setsigdef=[signal.SIGPIPE, signal.SIGXFSZ],  # which Python ignores for itself
            )
        except OSError as error:
            raise NotStartedError(error) from error
        # Orphans come to this process, so everything below it, and nothing else, belongs to the command.
        self._tree = ProcessTree(os.getpid(), include_root=False) if adopts else ProcessTree(self._pid)
        self._pss_curve = GrowingSeries()
        self._pss = PssReader(self._tree, self._pss_curve.append)
        while self._goes_on():
            now_s = time.perf_counter()
            self._measure(now_s)
            number = self._signals.wait(self._sample_time.due_s - time.perf_counter())
            if number is not None and self._status is None:
                send(self._pid, number)
        wall_s = (time.perf_counter_ns() - self._origin_ns) / 1e9
        self._pss.stop(GRACE_S)
        self._tree.refresh()
        self._tree.rss_bytes()
        still_running = len(self._tree.live_pids)
        self._tree.close()
        code = os.waitstatus_to_exitcode(self._status) if self._status is not None else -signal.SIGKILL
        code = OVER_LIMIT if self._reason is not None else 128 - code if code < 0 else code
        if len(self._tree.members) == 1 and self._largest_by_kernel > own_peak:
            only = self._tree.members[0]
            only.peak_rss_bytes = max(only.peak_rss_bytes, self._largest_by_kernel)
        recording = Recording(
            created_unix_s=created_unix_s,
            wall_s=wall_s,
            series=self._series(),
            scopes=[],
            processes=[Process(one.pid, one.name, to_mb(one.peak_rss_bytes)) for one in self._tree.members],
            command=self._command,
            exit_code=code,
            limits=_limits(self._limit_bytes),
        )
        return Watched(recording, code, self._reason, still_running)

    def _goes_on(self) -> bool:
        """Collect what has ended; false once the command has, and under a passed limit everything has."""
        while True:
            try:
                pid, status, usage = os.wait4(-1, os.WNOHANG)
            except ChildProcessError:
                break
            if pid == 0:
                break
            if pid == self._pid:
                self._status = status
                self._largest_by_kernel = usage.ru_maxrss * _MAXRSS_BYTES
        if self._reason is None or self._status is None:
            return self._status is None
        # A process that even SIGKILL does not end hangs in the kernel: nothing is gained by waiting for it.
        return bool(self._tree.live_pids) and time.perf_counter() < self._kill_at_s + GRACE_S

    def _measure(self, now_s: float) -> None:
        if self._refresh_time.is_due(now_s):
            self._tree.refresh()
            self._drop_small_curves()
            self._refresh_time.done(now_s)
        if self._sample_time.is_due(now_s):
            rss = self._tree.rss_bytes()
            now_ns = time.perf_counter_ns()
            self._rss.append(now_ns, rss)
            for member in self._tree.live_members:
                if id(member) not in self._curves:
                    self._curves[id(member)] = (member, GrowingSeries(8192))
                self._curves[id(member)][1].append(now_ns, member.rss_bytes)
            self._sample_time.done(now_s)
            self._hold_limit(now_s, rss)

    def _hold_limit(self, now_s: float, rss: int) -> None:
        if self._reason is not None:
            if now_s >= self._kill_at_s:
                self._send_all(signal.SIGKILL)
            return
        if self._limit_bytes is None or rss <= self._limit_bytes:
            self._above_since_s = float("inf")
            return
        # Shared pages count several times in the sum of resident sets: ask for the fair share as well.
        self._above_since_s = min(self._above_since_s, now_s)
        read_s, pss = self._pss.latest
        if read_s < self._above_since_s or (pss is not None and pss <= self._limit_bytes):
            self._pss.want()
            return
        used = f"RSS {to_mb(rss):.0f} MB" + (f", PSS {to_mb(pss):.0f} MB" if pss is not None else "")
        self._reason = f"stopped: its memory ({used}) passed the limit of {to_mb(self._limit_bytes):g} MB"
        self._kill_at_s = now_s + GRACE_S
        self._send_all(signal.SIGTERM)

    def _send_all(self, number: signal.Signals) -> None:
        self._tree.refresh()
        for pid in self._tree.live_pids:
            send(pid, number)

    def _drop_small_curves(self) -> None:
        """A build starts thousands of processes: of those that have ended only the largest keep a curve."""
        if len(self._curves) <= _CURVES_KEPT:
            return
        ended = [(key, member) for key, (member, _) in self._curves.items() if member.ended]
        ended.sort(key=lambda item: -item[1].peak_rss_bytes)
        for key, _ in ended[_CURVES_SHOWN:]:
            del self._curves[key]

    def _series(self) -> list[Series]:
        named = [("tree rss", self._rss), ("tree pss", self._pss_curve)]
        if len(self._tree.members) > 1:
            largest = sorted(self._curves.values(), key=lambda item: -item[0].peak_rss_bytes)
            named += [(f"{member.pid} {member.name}", curve) for member, curve in largest[:_CURVES_SHOWN]]
        return [
            Series(name, *curve.points(self._origin_ns, BYTES_PER_MB)) for name, curve in named if len(curve)
        ]


def _limits(limit_bytes: float | None) -> dict[str, float]:
    limits = {} if limit_bytes is None else {"limit_mb": to_mb(limit_bytes)}
    cgroup_limit = cgroup_memory().limit_bytes
    if cgroup_limit is not None:
        limits["cgroup_limit_mb"] = to_mb(cgroup_limit)
    try:
        limits["machine_total_mb"] = to_mb(machine_memory().total_bytes)
    except MemoryProbeError:
        return limits  # a line in the drawing less
    return limits
