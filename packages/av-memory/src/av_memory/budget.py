"""Limits: a budget for a stretch of a program, and the largest batch that fits."""

from __future__ import annotations

import math
import os
import sys
import traceback
import warnings
from collections.abc import Callable
from types import TracebackType
from typing import Literal, Self, cast

from av_memory._interrupt import Interruption, shield, take_due
from av_memory._recorder import RECORDER, SAMPLE_INTERVAL_S
from av_memory._threads import Bell, start_daemon
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

    def __reduce__(self) -> tuple[object, ...]:
        return type(self), (self.used_mb, self.limit_mb), self.__dict__


class MemoryBudget:
    """Watch the resident set of this process while a ``with`` block runs.

    The resident set is read every 5 ms. ``"raise"`` works like Ctrl-C: the exception is raised in the
    thread that entered the block, before its next Python instruction, so a single long call into native
    code first runs to its end. If the block has ended by then, the exception is raised as it is left.

    It is raised at the block's end only where the block is entered while an asyncio event loop runs in
    the thread (what it would interrupt there is the loop, and every task with it), where no thread can be
    started to watch, and, up to Python 3.11, in a thread other than the main one that starts threads all
    the time. A generator that is suspended inside of the block leaves the block open: the exception then
    arrives in the thread that entered, wherever that is. If the block is left in another thread, nothing
    is sent afterwards; what was sent before still arrives unless the block was entered in the main
    thread. A forked child that leaves the block does nothing there.

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
        self._entered_by: int | None = None
        """The process in which the block is open."""

    def __enter__(self) -> Self:
        if self._entered_by == os.getpid():
            raise RuntimeError("this MemoryBudget is in use already; make one for each block")
        RECORDER.read_rss()  # fails here rather than in the thread where memory cannot be read
        self.exceeded = None
        self._failure: BaseException | None = None
        self._stop = Bell()
        self._ended = Bell()
        self._interruption = None if _event_loop_runs() else Interruption()
        self._entered_by = os.getpid()
        try:
            self._watching = True
            if start_daemon(self._run, "av-memory budget") is None:
                self._watching = False
        except BaseException:
            self._entered_by = None
            self._stop.ring()
            raise
        return self

    def _run(self) -> None:
        limit_bytes = self.limit_mb * BYTES_PER_MB
        try:
            while not self._stop.wait(SAMPLE_INTERVAL_S):
                used = RECORDER.read_rss()
                if used > limit_bytes:
                    self._exceed(used)
                    if self.on_exceed == "raise" and self._interruption is not None:
                        self._interruption.send(cast(MemoryBudgetExceeded, self.exceeded), self._stop.wait)
                    return
        except BaseException as failure:  # noqa: BLE001 (comes out where the block is left)
            self._failure = failure
        finally:
            self._watching = False
            self._ended.ring()

    def _exceed(self, used_bytes: int) -> None:
        self.exceeded = exceeded = MemoryBudgetExceeded(to_mb(used_bytes), self.limit_mb)
        if callable(self.on_exceed):
            self.on_exceed(exceeded)
        elif self.on_exceed == "warn":
            warnings.warn(str(exceeded), ResourceWarning, stacklevel=1)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._entered_by != os.getpid():
            return
        outer = self._end_watch() or take_due()
        self._entered_by = None
        if self.exceeded is None and (used := RECORDER.read_rss()) > self.limit_mb * BYTES_PER_MB:
            self._exceed(used)
        if self._failure is not None:
            raise self._failure
        if outer is not None:
            raise outer
        if kind is None and self.exceeded is not None and self.on_exceed == "raise":
            raise self.exceeded

    def _end_watch(self) -> MemoryBudgetExceeded | None:
        """Stop watching, and let an interruption that is on its way arrive here.

        Returns the one of a block around this one, if that is what arrived.
        """
        outer: MemoryBudgetExceeded | None = None
        while True:
            try:
                if self._interruption is not None:
                    self._interruption.cancelled = True
                self._stop.ring()
                while self._watching:
                    self._ended.wait(0.01)
                if self._interruption is not None:
                    self._interruption.settle()
                return outer
            except MemoryBudgetExceeded as arrived:
                if arrived is not self.exceeded:
                    outer = arrived


# An exception that arrived before their first or last line would leave a block open that nobody leaves.
shield(MemoryBudget.__enter__)
shield(MemoryBudget.__exit__)


def _event_loop_runs() -> bool:
    """Whether this thread runs an asyncio event loop now."""
    get_running_loop = getattr(sys.modules.get("asyncio"), "get_running_loop", None)
    if get_running_loop is None:  # not imported, or by another thread at this moment
        return False
    try:
        get_running_loop()
    except RuntimeError:
        return False
    return True


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
    errors: type[BaseException] | tuple[type[BaseException], ...] = (),
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
        errors: exception type, or a tuple of them, that counts as running out of memory, besides
            ``MemoryError`` (of which :class:`MemoryBudgetExceeded` is one) and torch's
            ``OutOfMemoryError``. torch raises a plain ``RuntimeError`` when the processor's memory runs
            out: give ``RuntimeError`` to include it, at the risk of taking other errors for it.

    Returns:
        The largest size that was seen to work.

    Raises:
        ValueError: a size or number of steps is out of range.
        TypeError: ``errors`` has something else than exception types in it.
        BaseException: what ``function`` raised with ``minimum``, or anything else that it raised.
    """
    for name, value, least in (("minimum", minimum, 1), ("start", start, minimum), ("steps", steps, 0)):
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise ValueError(f"{name} is {value!r}; it has to be an integer of at least {least}")
    kinds = (*out_of_memory_errors(), *(errors if isinstance(errors, tuple) else (errors,)))
    for kind in kinds:
        if not (isinstance(kind, type) and issubclass(kind, BaseException)):
            raise TypeError(f"errors has {kind!r} in it; it has to be an exception type or a tuple of them")
    works, fails, size = 0, start + 1, start
    while True:
        failure = _attempt(function, size, kinds)
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
