"""Budgets are kept, and the search finds the largest batch that fits."""

import asyncio
import contextlib
import copy
import gc
import math
import os
import pickle
import threading
import time
import warnings
import weakref
from collections.abc import Iterator

import pytest
from av_memory import MemoryBudget, MemoryBudgetExceeded, clear_memory, find_batch_size, get_cpu_memory
from hypothesis import given, is_hypothesis_test, settings
from hypothesis import strategies as st

MB = 2**20


@pytest.fixture(autouse=True)
def _steady_memory() -> None:
    """Let what an earlier test's traceback keeps alive go now, and not while a budget is watched."""
    clear_memory()


@pytest.fixture(autouse=True)
def _only_our_collector_callbacks(request: pytest.FixtureRequest) -> Iterator[None]:
    """Take away the callback in Python that Hypothesis leaves with the garbage collector.

    Python reports and loses what is raised within one, so an interruption that comes just then fails a test.
    """
    callbacks = list(gc.callbacks)
    if not is_hypothesis_test(request.function):
        gc.callbacks[:] = [one for one in callbacks if not (one.__module__ or "").startswith("hypothesis")]
    yield
    gc.callbacks[:] = callbacks


def grow(limit_mb: int = 4000) -> None:
    """Use more and more memory, a megabyte at a time."""
    kept = []
    for _ in range(limit_mb):
        kept.append(bytearray(MB))
        time.sleep(0.0005)
    raise AssertionError("nothing stopped it")


def test_a_budget_interrupts_the_block_and_says_the_figures():
    limit = get_cpu_memory() + 100
    with pytest.raises(MemoryBudgetExceeded) as caught, MemoryBudget(limit) as budget:
        grow()
    assert caught.value is budget.exceeded
    assert limit < caught.value.used_mb < limit + 100
    assert f"of {limit:.0f} MB" in str(caught.value)
    time.sleep(0.02)  # nothing arrives late


def test_a_single_burst_that_still_holds_at_the_end_is_seen():
    kept = []
    with pytest.raises(MemoryBudgetExceeded), MemoryBudget(get_cpu_memory() + 50):
        kept.append(bytearray(100 * MB))


def test_within_the_budget_nothing_happens():
    with MemoryBudget(get_cpu_memory() + 500) as budget:
        bytearray(20 * MB)
        time.sleep(0.02)
    assert budget.exceeded is None
    with budget:  # it can be used again
        pass


def test_warn_warns_once():
    with warnings.catch_warnings(record=True) as caught, MemoryBudget(get_cpu_memory() + 30, "warn"):
        warnings.simplefilter("always")
        block = bytearray(80 * MB)
        time.sleep(0.05)
    assert [warning.category for warning in caught] == [ResourceWarning]
    assert "budget" in str(caught[0].message)
    del block


def test_a_function_is_called_once_and_its_exception_comes_out():
    seen = []
    with MemoryBudget(1, seen.append) as budget:
        time.sleep(0.05)
    assert seen == [budget.exceeded]

    def refuse(exceeded: MemoryBudgetExceeded) -> None:
        raise LookupError("from the function")

    with pytest.raises(LookupError, match="from the function"), MemoryBudget(1, refuse):
        time.sleep(0.05)


def test_another_exception_of_the_block_is_not_hidden():
    with pytest.raises(KeyError, match="mine"), MemoryBudget(1):
        raise KeyError("mine")


def test_only_the_thread_that_entered_is_interrupted():
    outcome = []

    def work() -> None:
        try:
            with MemoryBudget(get_cpu_memory() + 60):
                grow()
        except MemoryBudgetExceeded:
            outcome.append("interrupted")

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert outcome == ["interrupted"]


def test_many_short_blocks_over_the_limit_never_leak_an_interruption():
    for _ in range(200):
        with pytest.raises(MemoryBudgetExceeded), MemoryBudget(1):
            pass
    for _ in range(20):
        with pytest.raises(MemoryBudgetExceeded), MemoryBudget(1):
            time.sleep(0.0049)
    for _ in range(2000):
        pass


def spin(seconds: float = 10.0) -> None:
    """Run Python code until an interruption comes, or fail."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        pass
    raise AssertionError("nothing stopped it")


@pytest.mark.parametrize("where", ["main", "worker"])
def test_a_thread_that_just_starts_is_not_taken_for_its_starter(run_fresh, where):
    out = run_fresh(
        f"""
        import faulthandler, sys, threading, time
        from av_memory import MemoryBudget, MemoryBudgetExceeded
        faulthandler.dump_traceback_later(30, exit=True)
        died = []
        threading.excepthook = died.append
        def work():
            for _ in range(40):
                end = time.monotonic() + 0.05
                try:
                    with MemoryBudget(1):
                        while time.monotonic() < end:
                            threading.Thread(target=lambda: None).start()
                except (MemoryBudgetExceeded, RuntimeError):  # the interrupted start may say "only once"
                    pass
        if {where == "main"}:
            work()
        else:
            thread = threading.Thread(target=work)
            thread.start()
            thread.join()
        print(len(died))
        """
    )
    assert out.split() == ["0"]


def test_the_exception_can_be_copied_and_pickled_with_its_figures_and_notes():
    original = MemoryBudgetExceeded(30.0, 20.0)
    original.add_note("in step 3")
    again = pickle.loads(pickle.dumps(original))  # noqa: S301 (made in this line)
    for twin in (copy.copy(original), copy.deepcopy(original), again):
        assert type(twin) is MemoryBudgetExceeded
        assert (twin.used_mb, twin.limit_mb, str(twin)) == (30.0, 20.0, str(original))
        assert twin.__notes__ == ["in step 3"]


def in_thread(function) -> None:
    thread = threading.Thread(target=function)
    thread.start()
    thread.join()


@pytest.mark.parametrize("run", [lambda function: function(), in_thread], ids=["main", "worker"])
def test_blocks_inside_do_not_swallow_the_interruption_of_the_one_around_them(run):
    outcome = []

    def work() -> None:
        for _ in range(8):
            try:
                with MemoryBudget(1) as outer:
                    end = time.monotonic() + 0.5
                    while time.monotonic() < end:
                        with MemoryBudget(10**6):
                            pass
                    outcome.append("missed")
            except MemoryBudgetExceeded as exceeded:
                outcome.append(exceeded is outer.exceeded)

    run(work)
    assert outcome == [True] * 8


@pytest.mark.parametrize("run", [lambda function: function(), in_thread], ids=["main", "worker"])
def test_both_of_two_nested_blocks_interrupt(run):
    arrived, kept = [], []
    now = get_cpu_memory()

    def work() -> None:
        with contextlib.suppress(MemoryBudgetExceeded), MemoryBudget(now + 50), MemoryBudget(now + 250):
            for size in (150, 400):
                try:
                    kept.append(bytearray(size * MB))
                    spin(5)
                except MemoryBudgetExceeded as exceeded:
                    arrived.append(exceeded.limit_mb)

    run(work)
    assert arrived == [now + 50, now + 250]


def test_a_thread_that_gets_the_number_of_an_ended_one_is_left_alone():
    suspended, hits = [], []

    def block():
        with MemoryBudget(1):
            yield

    def abandon() -> None:
        suspended.append(block())
        next(suspended[-1])

    def bystander() -> None:
        try:
            end = time.monotonic() + 0.02
            while time.monotonic() < end:
                pass
        except MemoryBudgetExceeded:
            hits.append("hit")

    for _ in range(10):
        in_thread(abandon)
        in_thread(bystander)
    for generator in suspended:
        generator.close()
    assert hits == []


def test_a_block_that_was_left_in_another_thread_interrupts_nobody():
    budget = MemoryBudget(get_cpu_memory() + 30)
    budget.__enter__()
    in_thread(lambda: budget.__exit__(None, None, None))
    block = bytearray(80 * MB)
    end = time.monotonic() + 0.03
    while time.monotonic() < end:
        pass
    del block
    assert budget.exceeded is None


def test_within_an_event_loop_it_is_raised_at_the_end_and_other_tasks_go_on():
    steps = []

    async def bystander() -> str:
        for _ in range(20):
            await asyncio.sleep(0.002)
            steps.append(1)
        return "done"

    async def budgeted() -> None:
        with MemoryBudget(1):
            await asyncio.sleep(0.03)
            steps.append("reached the end")

    async def both() -> list[object]:
        return await asyncio.gather(budgeted(), bystander(), return_exceptions=True)

    exceeded, other = asyncio.run(both())
    assert isinstance(exceeded, MemoryBudgetExceeded)
    assert other == "done"
    assert "reached the end" in steps


def test_a_block_around_an_event_loop_interrupts_it():
    async def busy() -> None:
        spin()

    with pytest.raises(MemoryBudgetExceeded), MemoryBudget(1):
        asyncio.run(busy())


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_forked_child_may_leave_the_block():
    with MemoryBudget(10**6):
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                with MemoryBudget(10**6) as own:
                    code = 0 if own.exceeded is None else 2
            finally:
                os._exit(code)
        assert os.waitpid(pid, 0)[1] == 0
    budget = MemoryBudget(1, lambda exceeded: None)
    budget.__enter__()
    pid = os.fork()
    if pid == 0:
        budget.__exit__(None, None, None)  # the thread that watched is not here
        os._exit(7)
    deadline = time.monotonic() + 10
    while (ended := os.waitpid(pid, os.WNOHANG)) == (0, 0) and time.monotonic() < deadline:
        time.sleep(0.005)
    budget.__exit__(None, None, None)
    if ended == (0, 0):
        os.kill(pid, 9)
        os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(ended[1]) == 7


def test_without_a_thread_to_watch_it_is_raised_at_the_end(monkeypatch):
    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    with pytest.raises(MemoryBudgetExceeded), MemoryBudget(1):
        pass


@pytest.mark.parametrize("limit", [0, -1, math.nan, math.inf, "100", None])
def test_a_limit_that_is_no_positive_number_is_refused(limit):
    with pytest.raises(ValueError, match="limit_mb"):
        MemoryBudget(limit)


def test_other_misuse_of_a_budget_is_refused():
    with pytest.raises(ValueError, match="on_exceed"):
        MemoryBudget(1, "explode")
    budget = MemoryBudget(10**6)
    with budget, pytest.raises(RuntimeError, match="in use"):
        budget.__enter__()


# Each call of the search collects garbage, which takes long in a process with all suites loaded.
@settings(max_examples=30)
@given(st.integers(1, 4000), st.integers(1, 4000), st.integers(0, 12))
def test_the_search_returns_a_size_that_works_and_comes_close(start: int, fits: int, steps: int):
    tried = []

    def step(size: int) -> None:
        tried.append(size)
        if size > fits:
            raise MemoryError

    found = find_batch_size(step, start, steps=steps)
    best = min(start, fits)
    assert found <= best
    assert found in tried
    # Halving leaves less than a factor of two (plus rounding), and each step halves the distance.
    assert best - found <= max(1, math.ceil((found + 1) / 2**steps))
    assert max(tried) == start


def test_it_goes_by_type_and_other_errors_come_out_at_once():
    import torch

    def cuda(size: int) -> None:
        if size > 5:
            raise torch.cuda.OutOfMemoryError("of any wording")

    assert find_batch_size(cuda, 16, steps=5) == 5

    def wrong(size: int) -> None:
        raise RuntimeError("CUDA out of memory")  # the right words in the wrong type

    with pytest.raises(RuntimeError, match="CUDA out of memory"):
        find_batch_size(wrong, 16)
    sizes = []

    def plain(size: int) -> None:
        sizes.append(size)
        if size > 3:
            raise RuntimeError("not enough memory")

    assert find_batch_size(plain, 8, errors=(RuntimeError,), steps=0) == 2
    assert sizes == [8, 4, 2]


def test_errors_may_be_one_type_but_nothing_that_is_no_type():
    def step(size: int) -> None:
        if size > 3:
            raise ZeroDivisionError

    assert find_batch_size(step, 8, errors=ZeroDivisionError) == 3
    for wrong in ("RuntimeError", (RuntimeError, 3), int):
        with pytest.raises(TypeError, match="exception type"):
            find_batch_size(step, 8, errors=wrong)


def test_what_a_failure_kept_alive_is_gone_before_the_next_call():
    class Block:
        pass

    alive: list[weakref.ref[Block]] = []
    kept_errors = []

    def leaky(size: int) -> None:
        assert not any(ref() is not None for ref in alive), "the failed call's memory is still there"
        block = Block()
        alive.append(weakref.ref(block))
        if size > 2:
            try:
                try:
                    raise MemoryError("inner")
                except MemoryError as inner:
                    raise MemoryError("outer") from inner
            except MemoryError as error:
                kept_errors.append(error)  # as a logger that keeps exceptions would
                raise

    gc.disable()
    try:
        assert find_batch_size(leaky, 16, steps=0) == 2
    finally:
        gc.enable()
    assert len(kept_errors) == 3


def test_when_nothing_fits_the_error_comes_out_with_a_note():
    def never(size: int) -> None:
        raise MemoryError(f"at {size}")

    with pytest.raises(MemoryError, match="at 2") as caught:
        find_batch_size(never, 32, minimum=2)
    assert "does not fit" in caught.value.__notes__[0]


def test_with_real_memory_under_a_budget():
    limit = get_cpu_memory() + 200

    def step(size: int) -> None:
        with MemoryBudget(limit):
            block = bytearray(size * MB)
            time.sleep(0.02)
            del block

    found = find_batch_size(step, 1024, steps=4)
    assert 150 <= found <= 200


@pytest.mark.parametrize(
    "arguments",
    [{"start": 0}, {"start": 2, "minimum": 3}, {"start": 2.5}, {"start": 4, "steps": -1}, {"start": True}],
)
def test_sizes_out_of_range_are_refused(arguments):
    with pytest.raises(ValueError, match="has to be an integer"):
        find_batch_size(lambda size: None, **arguments)
