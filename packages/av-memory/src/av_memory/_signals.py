"""Waiting for a time or a signal, whichever comes first, for a program that watches another one."""

from __future__ import annotations

import os
import signal
import sys
import time
from types import FrameType
from typing import Self

_PASSED_ON = ("SIGINT", "SIGTERM", "SIGHUP", "SIGQUIT", "SIGUSR1", "SIGUSR2")
_SI_KERNEL = 0x80


class Signals:
    """While this context is open, signals interrupt nothing but are handed out by :meth:`wait`.

    On Linux they are blocked and fetched one by one, which also tells a key pressed at the terminal,
    which the kernel has sent to the watched command too, from a signal sent to this process alone.
    """

    def __init__(self) -> None:
        self._numbers = [number for name in _PASSED_ON if (number := getattr(signal, name, None)) is not None]
        self._fetch = hasattr(signal, "sigtimedwait")
        self._caught: list[signal.Signals] = []
        self.outer_mask: set[int] = set()
        """The signals that were blocked before, for the command to start with."""

    def __enter__(self) -> Self:
        self._old_child_handler = signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        if self._fetch:
            self._wanted = {*self._numbers, signal.SIGCHLD}
            self.outer_mask = {
                int(number) for number in signal.pthread_sigmask(signal.SIG_BLOCK, self._wanted)
            }
        else:
            self._old_handlers = {
                number: signal.signal(number, self._catch)
                for number in self._numbers
                if signal.getsignal(number) is not signal.SIG_IGN
            }
        return self

    def _catch(self, number: int, _frame: FrameType | None) -> None:
        self._caught.append(signal.Signals(number))

    def wait(self, seconds: float) -> signal.Signals | None:
        """Sleep, at most for this time; the signal that is to be passed on, if one came."""
        if not self._fetch:
            time.sleep(seconds)
            caught = self._caught.pop(0) if self._caught else None
            return None if caught == signal.SIGINT and sys.stdin.isatty() else caught
        info = signal.sigtimedwait(self._wanted, max(seconds, 0))
        if info is None or info.si_signo == signal.SIGCHLD:
            return None
        return None if info.si_code == _SI_KERNEL else signal.Signals(info.si_signo)

    def __exit__(self, *_: object) -> None:
        if self._fetch:
            while signal.sigtimedwait(self._wanted, 0) is not None:
                pass  # what came while the results were written must not end this process now
            signal.pthread_sigmask(signal.SIG_SETMASK, self.outer_mask)
        else:
            for number, handler in self._old_handlers.items():
                signal.signal(number, handler)
        signal.signal(signal.SIGCHLD, self._old_child_handler)


def become_subreaper() -> bool:
    """Have orphaned descendants handed to this process instead of to init; whether it is so (Linux)."""
    if sys.platform != "linux":
        return False
    import ctypes

    pr_set_child_subreaper = 36
    libc = ctypes.CDLL(None, use_errno=True)
    return libc.prctl(pr_set_child_subreaper, 1, 0, 0, 0) == 0


def send(pid: int, number: signal.Signals) -> None:
    """Send a signal to a process that may be gone, or may have changed its user."""
    try:
        os.kill(pid, number)
    except (ProcessLookupError, PermissionError):
        return
