"""Proportional set sizes of a process tree, read in a thread of their own."""

from __future__ import annotations

import time
from collections.abc import Callable

from av_memory._threads import Bell, start_daemon
from av_memory.probes import ProcessTree

READING_SHARE = 80
"""A reading waits this many times as long as it took, so that its kind costs little over 1% of a core."""
_INTERVAL_S = 0.25


class PssReader:
    """Reads until it is stopped, at most four times a second unless more is wanted.

    Such a reading waits for a lock that a process holds while its memory grows, a tenth of a second at
    times, and just then the resident sets must not go unread: hence the thread.

    Args:
        tree: whose processes to read; it may change meanwhile.
        on_reading: called in the thread with the time (``perf_counter_ns``) and the bytes.
    """

    def __init__(self, tree: ProcessTree, on_reading: Callable[[int, int], None]) -> None:
        self.latest: tuple[float, int | None] = (0.0, None)
        """When the last finished reading began (``perf_counter``), and what it gave."""
        self._tree = tree
        self._on_reading = on_reading
        self._wanted = Bell()
        self._stopped = Bell()
        self._stopping = False
        self._thread = start_daemon(self._read_on, "av-memory pss")

    def want(self) -> None:
        """Have the next reading taken early."""
        self._wanted.ring()

    def stop(self, wait_s: float = 0.0) -> None:
        """Take no further reading, and wait for one under way if asked to."""
        self._stopping = True
        self._stopped.ring()
        self._wanted.ring()
        if wait_s > 0 and self._thread is not None:
            self._thread.join(wait_s)

    def _read_on(self) -> None:
        while not self._stopping:
            # Processor time, as wall time would also count a wait for a lock or a busy processor.
            began_s, began_cpu_s = time.perf_counter(), time.thread_time()
            pss = self._tree.pss_bytes()
            self.latest = (began_s, pss)
            if pss:
                self._on_reading(time.perf_counter_ns(), pss)
            cost_s = time.thread_time() - began_cpu_s
            # Even when they are wanted, readings take at most a fifth of a processor.
            if self._stopped.wait(4 * cost_s):
                return
            self._wanted.wait(max(_INTERVAL_S, READING_SHARE * cost_s))
