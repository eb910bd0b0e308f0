"""Raise an exception in one thread from another, and never in a third."""

from __future__ import annotations

import ctypes
import os
import sys
import threading
from collections import deque
from collections.abc import Callable
from types import CodeType, FrameType
from typing import Any, cast

_RESEND_AFTER_S = 0.05

# Threads that are starting, threads that run, and the lock that both dictionaries are changed under.
_threading = cast(Any, threading)


class Interruption:
    """At most one exception, on its way to the thread that makes this object.

    It arrives between two instructions of Python code. For the main thread the interpreter keeps a queue
    of calls, and what is called raises or, once cancelled, does not. For another thread there is only
    ``PyThreadState_SetAsyncExc``, which goes by the thread's number. Up to Python 3.11 a thread that is
    just starting bears the number of the one that starts it, and would die of the exception with its
    starter waiting for it; therefore nothing is sent there while ``threading`` has a thread in that state.
    (Code that calls ``_thread.start_new_thread`` itself, outside of the main thread, is not covered.)
    """

    def __init__(self) -> None:
        self.cancelled = False
        self._thread = threading.current_thread()
        self._to_main = self._thread is threading.main_thread()
        self._pid = os.getpid()
        self._arrived = False

    def send(self, exception: BaseException, pause: Callable[[float], object]) -> None:
        """Have the exception raised. Returns when it is under way, has arrived, or is not wanted any more.

        Args:
            exception: what is raised.
            pause: waits for a number of seconds, or less when cancelled.
        """
        if self._to_main:
            _due.append((self, exception))
            while not self.cancelled and not self._arrived:
                # Again where it found a shielded function; the queue may be full too.
                pause(_RESEND_AFTER_S if _call_in_main_thread() else 0.001)
            return
        interruption = self

        class Arrival(BaseException):
            def __new__(cls, *_: object) -> Any:
                interruption._arrived = True
                return exception

        while not self.cancelled and not self._arrived:
            # Under this lock no thread starts, and none that is in the dictionary ends.
            with _threading._active_limbo_lock:
                if _threading._active.get(self._thread.ident) is not self._thread:
                    return
                free = sys.version_info >= (3, 12) or not _threading._limbo
                if free:
                    _set_async_exc(cast(int, self._thread.ident), Arrival)
            # Another one that is sent to the same thread replaces it; hence again.
            pause(_RESEND_AFTER_S if free else 0.001)

    def settle(self) -> None:
        """After :meth:`send` has returned: in the interrupted thread, let what is under way arrive here.

        Taking it back instead (a null exception for ``PyThreadState_SetAsyncExc``) leaves the flag that
        announces it set for good, up to Python 3.12, on which 3.11 loops forever under a tracer.
        """
        if not self._to_main and self._thread is threading.current_thread():
            for _ in range(100):
                pass

    def arrives(self) -> bool:
        """Whether it is still wanted here, to be raised at once."""
        self._arrived = not self.cancelled and self._pid == os.getpid()
        return self._arrived


class _MainThread:
    """Its truth value is asked for in the main thread, and asking raises what is due there."""

    def __bool__(self) -> bool:
        # Asking to be called again, it would be all that Python 3.11 does under a tracer.
        if not _is_shielded(sys._getframe(1)):  # pyright: ignore[reportPrivateUsage]
            exception = take_due()
            if exception is not None:
                raise exception
        return False


def take_due() -> BaseException | None:
    """What is due in the main thread, if it is this one, for the caller to raise at once."""
    if threading.current_thread() is threading.main_thread():
        while _due:
            interruption, exception = _due.popleft()
            if interruption.arrives():
                return exception
    return None


_due: deque[tuple[Interruption, BaseException]] = deque()
_main_thread = _MainThread()
_shields: set[CodeType] = set()


def shield(function: Callable[..., object]) -> None:
    """Let nothing arrive in the main thread while it runs this function.

    It arrives afterwards, at once if the function ends with :func:`take_due`.
    """
    _shields.add(function.__code__)


def _is_shielded(frame: FrameType | None) -> bool:
    while frame is not None and frame.f_code not in _shields:
        frame = frame.f_back
    return frame is not None


def _call_in_main_thread() -> bool:
    add = ctypes.pythonapi.Py_AddPendingCall
    is_true = ctypes.cast(ctypes.pythonapi.PyObject_IsTrue, ctypes.c_void_p)
    return add(is_true, ctypes.py_object(_main_thread)) == 0


def _set_async_exc(thread_id: int, kind: type[BaseException]) -> None:
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread_id), ctypes.py_object(kind))
