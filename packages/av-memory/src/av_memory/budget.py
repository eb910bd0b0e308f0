"""Limits: a budget for a stretch of a program, and the largest batch that fits."""

from __future__ import annotations

import ctypes
import math
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable
from types import TracebackType
from typing import Literal, Self, cast

from av_memory._recorder import RECORDER, SAMPLE_INTERVAL_S
from av_memory._units import BYTES_PER_MB, to_mb
from av_memory.release import clear_memory

__all__ = ["MemoryBudget", "MemoryBudgetExceeded", "find_batch_size", "out_of_memory_errors"]


class MemoryBudgetExceeded(MemoryError):
    """The resident set passed the budget."""

    def __init__(self, used_mb: float = math.nan, limit_mb: float = math.nan) -> None:
        self.used_mb = used_mb
        """What was in use when it was noticed, in MB of 2**20 bytes."""
        self.limit_mb = limit_mb
        figures = "" if math.isnan(used_mb) else f" ({used_mb:.0f} MB of {limit_mb:.0f} MB)"
        super().__init__(
            f"the process uses more memory than its budget{figures}: use smaller batches, "
            "free what is no longer needed, or raise the limit"
        )


class MemoryBudget:
    """Watch the resident set of this process while a ``with`` block runs.

    The resident set is read every 5 ms. ``"raise"`` works like Ctrl-C: the exception is raised in the
    thread that entered the block, before its next Python instruction, so a single long call into native
    code first runs to its end. If the block has ended by then, the exception is raised as it is left.

    Args:
        limit_mb: the limit for the whole process, in MB of 2**20 bytes.
        on_exceed: ``"raise"`` :class:`MemoryBudgetExceeded`; ``"warn"`` once with ``ResourceWarning``;
            or a function that is called once, in the watching thread, with the
            :class:`MemoryBudgetExceeded` as its argument. An exception that it raises comes out of the
            block's end.

    Raises:
        ValueError: the limit is not a positive number, or ``on_exceed`` is unknown.
        RuntimeError: the block is entered while it runs.
    """

    def __init__(
        self,
        limit_mb: float,
        on_exceed: Literal["raise", "warn"] | Callable[[MemoryBudgetExceeded], object] = "raise",
    ) -> None:
        if not (isinstance(limit_mb, int | float) and math.isfinite(limit_mb) and limit_mb > 0):
            raise ValueError(f"limit_mb is {limit_mb!r}; it has to be a positive number of MB")
        if on_exceed not in ("raise", "warn") and not callable(on_exceed):
            raise ValueError(f'on_exceed is {on_exceed!r}; it can be "raise", "warn" or a function')
        self.limit_mb = float(limit_mb)
        self.on_exceed = on_exceed
        self.exceeded: MemoryBudgetExceeded | None = None
        """Set when the limit was passed in the last block."""
        self._watch: threading.Thread | None = None

    def __enter__(self) -> Self:
        if self._watch is not None and self._watch.is_alive():
            raise RuntimeError("this MemoryBudget is in use already; make one for each block")
        self.exceeded = None
        self._failure: BaseException | None = None
        self._stop = threading.Event()
        self._thread_id = threading.get_ident()
        RECORDER.read_rss()  # fails here rather than in the thread where memory cannot be read
        self._watch = threading.Thread(target=self._run, name="av-memory budget", daemon=True)
        self._watch.start()
        return self

    def _run(self) -> None:
        limit_bytes = self.limit_mb * BYTES_PER_MB
        while not self._stop.wait(SAMPLE_INTERVAL_S):
            used = RECORDER.read_rss()
            if used > limit_bytes:
                self._exceed(used)
                return

    def _exceed(self, used_bytes: int) -> None:
        self.exceeded = exceeded = MemoryBudgetExceeded(to_mb(used_bytes), self.limit_mb)
        try:
            if callable(self.on_exceed):
                self.on_exceed(exceeded)
            elif self.on_exceed == "warn":
                warnings.warn(str(exceeded), ResourceWarning, stacklevel=1)
            elif threading.get_ident() != self._thread_id:
                # The last thing that this thread does: nothing waits for it while this has not arrived.
                _raise_in(self._thread_id, MemoryBudgetExceeded)
        except BaseException as failure:  # noqa: BLE001 (comes out where the block is left)
            self._failure = failure

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._end_watch()
        if self.exceeded is None and (used := RECORDER.read_rss()) > self.limit_mb * BYTES_PER_MB:
            self._exceed(used)
        if self._failure is not None:
            raise self._failure
        exceeded = self.exceeded if self.on_exceed == "raise" else None
        if exceeded is not None and (kind is None or isinstance(error, MemoryBudgetExceeded)):
            # The one that arrived from the other thread carries no figures; this one does.
            raise exceeded.with_traceback(trace) from None

    def _end_watch(self) -> None:
        """Stop watching, and let an interruption that is on its way arrive here.

        Taking it back instead (a null exception for ``PyThreadState_SetAsyncExc``) leaves the flag that
        announces it set for good, up to Python 3.12, on which 3.11 loops forever under a tracer. For the
        same reason nothing blocks here: an interruption only arrives between Python instructions.
        """
        watch = self._watch
        while watch is not None:
            try:
                self._stop.set()
                while watch.is_alive():
                    time.sleep(0)
                for _ in range(100):
                    pass
                watch = None
            except MemoryBudgetExceeded:
                continue


def _raise_in(thread_id: int, kind: type[BaseException]) -> None:
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread_id), ctypes.py_object(kind))


def out_of_memory_errors() -> tuple[type[BaseException], ...]:
    """The exception types that mean that memory ran out, of what this process has imported."""
    kinds: list[type[BaseException]] = [MemoryError]
    torch = sys.modules.get("torch")
    if torch is not None:
        kinds.append(torch.cuda.OutOfMemoryError)
    return tuple(kinds)


def find_batch_size(
    function: Callable[[int], object],
    start: int,
    *,
    minimum: int = 1,
    steps: int = 3,
    errors: tuple[type[BaseException], ...] = (),
) -> int:
    """Find the largest batch size, up to ``start``, with which a function does not run out of memory.

    The function is called with ``start``, then with half of it and so on until a call succeeds; then
    ``steps`` more calls halve the distance between the largest size that worked and the smallest that
    did not. After a call that failed, the frames of its traceback are cleared and memory is given back,
    so that what the failure kept alive does not count against the next call.

    Args:
        function: called with a batch size; what it returns is dropped. Make it do all of a real step: a
            forward pass alone takes less than a training step.
        start: largest size to try, at least ``minimum``.
        minimum: smallest size to try, at least 1.
        steps: calls after the first that worked; 0 only halves.
        errors: exception types that count as running out of memory, besides ``MemoryError`` (of which
            :class:`MemoryBudgetExceeded` is one) and torch's ``OutOfMemoryError``. torch raises a plain
            ``RuntimeError`` when the processor's memory runs out: give ``(RuntimeError,)`` to include
            it, at the risk of taking other errors for it.

    Returns:
        The largest size that was seen to work.

    Raises:
        ValueError: a size or number of steps is out of range.
        BaseException: what ``function`` raised with ``minimum``, or anything else that it raised.
    """
    for name, value, least in (("minimum", minimum, 1), ("start", start, minimum), ("steps", steps, 0)):
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise ValueError(f"{name} is {value!r}; it has to be an integer of at least {least}")
    works, fails, size = 0, start + 1, start
    while True:
        failure = _attempt(function, size, (*out_of_memory_errors(), *errors))
        if failure is None:
            works = size
        elif size == minimum:
            failure.add_note(f"batch size {minimum}, the smallest allowed, does not fit in memory")
            raise failure
        else:
            fails = size
        del failure
        if works:
            if works == start or steps == 0 or fails - works <= 1:
                return works
            steps -= 1
            size = (works + fails) // 2
        else:
            size = max(minimum, size // 2)


def _attempt(
    function: Callable[[int], object], size: int, errors: tuple[type[BaseException], ...]
) -> BaseException | None:
    try:
        function(size)
    except errors as error:
        failure = error
    else:
        return None
    # A traceback keeps every local variable of the frames that it went through, wherever it is stored.
    pending: list[BaseException | None] = [failure]
    seen: set[int] = set()
    while pending:
        link = pending.pop()
        if link is None or id(link) in seen:
            continue
        seen.add(id(link))
        pending += [link.__cause__, link.__context__]
        if isinstance(link, BaseExceptionGroup):
            pending += cast(BaseExceptionGroup[BaseException], link).exceptions
        traceback.clear_frames(link.__traceback__)
    clear_memory(force_cuda_empty_cache=True)
    return failure
