"""Stopping at a safe place on Ctrl-C."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Self


class InterruptGuard:
    """While it is open, the first Ctrl-C sets `requested` instead of raising; a second one raises at once.

    Outside the main thread, where Python lets nobody handle signals, it does nothing; nor where Ctrl-C is
    ignored (a job in the background of a shell) or handled by other than Python.
    """

    def __init__(self) -> None:
        self.requested = False
        self._before: object = None

    def __enter__(self) -> Self:
        present = signal.getsignal(signal.SIGINT)
        handled = present is not None and present is not signal.SIG_IGN
        if handled and threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGINT, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._restore()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        del number, frame
        self.requested = True
        self._restore()

    def _restore(self) -> None:
        if callable(self._before) or isinstance(self._before, signal.Handlers):
            signal.signal(signal.SIGINT, self._before)
        self._before = None
