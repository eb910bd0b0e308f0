"""Ending training at a safe place on Ctrl-C and SIGTERM."""

from __future__ import annotations

import signal
import threading
from collections.abc import Generator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Self


class EndWaiting(BaseException):
    """Raised by a signal where training only waits, so that it need not wait on."""


class SignalGuard:
    """While it is open, the first SIGINT or SIGTERM is noted in `received` instead of ending the process; a
    second one acts as it would have.

    Outside the main thread, where Python lets nobody handle signals, it does nothing; nor where a signal is
    ignored (Ctrl-C for a job in the background of a shell) or handled by other than Python.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._may_raise = False
        self._before: dict[signal.Signals, object] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                present = signal.getsignal(number)
                if present is not None and present is not signal.SIG_IGN:
                    self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._restore()

    @contextmanager
    def waiting(self) -> Generator[None]:
        """Within it nothing happens that must not be cut short: a signal raises `EndWaiting` at once.

        Where something swallows that exception, `received` tells all the same.
        """
        self._may_raise = True
        try:
            if self.received is not None:
                raise EndWaiting
            yield
        finally:
            self._may_raise = False

    def _handle(self, number: int, frame: FrameType | None) -> None:
        del frame
        self.received = signal.Signals(number)
        self._restore()
        if self._may_raise:
            self._may_raise = False
            raise EndWaiting

    def _restore(self) -> None:
        for number, before in self._before.items():
            if callable(before) or isinstance(before, signal.Handlers):
                signal.signal(number, before)
        self._before.clear()
