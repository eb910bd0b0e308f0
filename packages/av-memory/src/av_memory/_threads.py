"""What threads of this package need to get along with signal handlers, finalisers and shutdown."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable


class Bell:
    """Wakes one waiting thread; a ring that comes before the wait is kept, a second one is not.

    ``threading.Event`` holds a lock of its own while it is set or waited for, so a signal handler or a
    finaliser that interrupts one of the two in the same thread and sets the event would wait for itself.
    Here each is a single operation of the interpreter.
    """

    __slots__ = ("_silent",)

    def __init__(self) -> None:
        self._silent = threading.Lock()
        self._silent.acquire()

    def ring(self) -> None:
        try:
            self._silent.release()
        except RuntimeError:
            return  # rung already

    def wait(self, timeout_s: float = -1) -> bool:
        """Wait for a ring, without end by default, and use it up. Returns whether there was one."""
        return self._silent.acquire(timeout=timeout_s)


def start_daemon(target: Callable[[], None], name: str) -> threading.Thread | None:
    """Start a daemon thread; ``None`` where the system or the interpreter has none to give.

    While the interpreter ends a new thread would never come to run, and the wait for it (before Python
    3.12) never end.
    """
    if sys.is_finalizing() or not threading.main_thread().is_alive():
        return None
    thread = threading.Thread(target=target, name=name, daemon=True)
    try:
        thread.start()
    except RuntimeError:
        return None
    return thread
