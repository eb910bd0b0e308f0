"""Scopes report what the operating system says, and never what another scope did to them."""

import asyncio
import mmap
import os
import resource
import subprocess
import sys
import threading
import time
from pathlib import Path

import av_memory
import pytest
from av_memory import MemoryTracker, get_memory_stats, get_recording

MB = 2**20


def resident(size_mb: int) -> mmap.mmap:
    """Memory in use, straight from the kernel: the heap may hand out a block that is resident already."""
    block = mmap.mmap(-1, size_mb * MB, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    block[:: mmap.PAGESIZE] = b"x" * (size_mb * MB // mmap.PAGESIZE)
    return block


def hold(size_mb: int, seconds: float = 0.0) -> None:
    """Use memory for a while."""
    with resident(size_mb):
        time.sleep(seconds)


def test_a_scope_reports_start_end_net_peak_and_time():
    kept = []
    with MemoryTracker("grow") as tracker:
        hold(120, 0.05)
        kept.append(resident(60))
    cpu = tracker.result.cpu
    assert cpu.peak_mb - cpu.start_mb == pytest.approx(120, abs=4)
    assert cpu.net_mb == pytest.approx(60, abs=4)
    assert cpu.end_mb == pytest.approx(av_memory.get_cpu_memory(), abs=4)
    assert 0.05 <= tracker.result.wall_s < 5
    assert tracker.result.error is None
    assert tracker.result.thread == threading.current_thread().name


def test_a_new_maximum_of_the_process_is_exact_even_between_samples(run_fresh):
    out = run_fresh(
        """
        from pathlib import Path
        import av_memory
        with av_memory.MemoryTracker("burst") as tracker:
            bytearray(500 * 2**20)
        (line,) = [l for l in Path("/proc/self/status").read_text().splitlines() if l.startswith("VmHWM")]
        kernel_mb = int(line.split()[1]) / 1024
        print(tracker.result.cpu.peak_mb, kernel_mb, tracker.result.cpu.peak_exact)
        """
    )
    peak, kernel, exact = out.split()
    assert float(peak) == pytest.approx(float(kernel), rel=0.02)
    assert float(peak) > 500
    assert exact == "True"


def test_the_size_of_the_program_that_started_this_one_is_not_taken_for_a_peak(run_fresh):
    out = run_fresh(
        """
        import subprocess, sys
        block = bytearray(700 * 2**20)
        code = (
            "import av_memory, resource\\n"
            "with av_memory.MemoryTracker('burst') as t: bytearray(100 * 2**20)\\n"
            "print(t.result.cpu.peak_mb, resource.getrusage(0).ru_maxrss / 1024, t.result.cpu.peak_exact,"
            " av_memory.get_memory_stats().peak_cpu_mb)"
        )
        print(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout)
        """
    )
    peak, inherited, exact, process_peak = out.split()
    assert float(inherited) > 700  # what ru_maxrss says
    assert 100 < float(peak) < 200
    assert exact == "True"
    assert 100 < float(process_peak) < 200


def test_high_water_gives_an_exact_peak_below_the_processs_own(run_fresh):
    out = run_fresh(
        """
        import av_memory
        bytearray(300 * 2**20)
        with av_memory.MemoryTracker("small", high_water=True) as tracker:
            bytearray(100 * 2**20)  # gone before a sample could see it for certain
        with av_memory.MemoryTracker("outer", high_water=True) as outer:
            with av_memory.MemoryTracker("inner", high_water=True) as inner:
                pass
        cpu = tracker.result.cpu
        print(cpu.peak_mb - cpu.start_mb, cpu.peak_exact, outer.result.cpu.peak_exact,
              inner.result.cpu.peak_exact, av_memory.get_memory_stats().peak_cpu_mb)
        """
    )
    rise, exact, outer_exact, inner_exact, process_peak = out.split()
    assert float(rise) == pytest.approx(100, rel=0.02)
    assert exact == "True"
    # With two scopes open the counter belongs to neither.
    assert (outer_exact, inner_exact) == ("False", "False")
    assert float(process_peak) > 300  # the reset did not lose the process's own peak


def test_overlapping_scopes_do_not_disturb_one_another():
    early, late = MemoryTracker("early"), MemoryTracker("late")
    early.__enter__()
    hold(150, 0.05)
    late.__enter__()
    hold(40, 0.05)
    early.__exit__(None, None, None)
    hold(90, 0.05)
    late.__exit__(None, None, None)
    early_cpu, late_cpu = early.result.cpu, late.result.cpu
    assert early_cpu.peak_mb - early_cpu.start_mb == pytest.approx(150, abs=5)
    assert late_cpu.peak_mb - late_cpu.start_mb == pytest.approx(90, abs=5)


def test_nested_scopes_have_depths_and_the_outer_peak_covers_the_inner():
    with MemoryTracker("outer") as outer, MemoryTracker("inner") as inner:
        hold(80, 0.05)
    assert (outer.result.depth, inner.result.depth) == (0, 1)
    assert outer.result.cpu.peak_mb >= inner.result.cpu.peak_mb
    assert [scope.name for scope in get_recording().scopes] == ["inner", "outer"]


def test_scopes_in_threads_keep_their_own_depth_and_thread():
    def work(index: int) -> None:
        with MemoryTracker(f"thread {index}"):
            hold(20, 0.02)

    with MemoryTracker("main"):
        threads = [threading.Thread(target=work, args=(i,), name=f"worker-{i}") for i in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    records = {scope.name: scope for scope in get_recording().scopes}
    assert {records[f"thread {i}"].depth for i in range(4)} == {0}
    assert {records[f"thread {i}"].thread for i in range(4)} == {f"worker-{i}" for i in range(4)}
    assert records["main"].cpu.peak_mb - records["main"].cpu.start_mb > 20


def test_many_threads_at_once_lose_no_scope():
    def work() -> None:
        for _ in range(200):
            with MemoryTracker("busy"):
                pass

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert get_memory_stats().scopes["busy"].count == 1600


def test_as_a_decorator_on_functions_coroutines_and_generators():
    @MemoryTracker()
    def plain(value: int) -> int:
        """Its text."""
        return value + 1

    @MemoryTracker("recursive")
    def down(value: int) -> int:
        return 0 if value == 0 else down(value - 1)

    @MemoryTracker("coroutine")
    async def coroutine() -> int:
        await asyncio.sleep(0.01)
        return 3

    @MemoryTracker("generator")
    def generator():
        received = yield 1
        yield received

    async def both() -> list[int]:
        async with MemoryTracker("async with"):
            return await asyncio.gather(coroutine(), coroutine())

    assert plain(1) == 2
    assert plain.__doc__ == "Its text."
    assert down(3) == 0
    assert asyncio.run(both()) == [3, 3]
    running = generator()
    assert next(running) == 1
    assert running.send(7) == 7
    assert list(running) == []
    counts = {name: stats.count for name, stats in get_memory_stats().scopes.items()}
    assert counts[plain.__qualname__] == 1
    assert counts["recursive"] == 4
    assert (counts["coroutine"], counts["async with"], counts["generator"]) == (2, 1, 1)
    assert max(s.depth for s in get_recording().scopes if s.name == "recursive") == 3


def test_tasks_that_interleave_keep_their_own_depth():
    async def task() -> None:
        with MemoryTracker("task"):
            await asyncio.sleep(0.01)

    async def run() -> None:
        await asyncio.gather(*(task() for _ in range(5)))

    asyncio.run(run())
    assert [scope.depth for scope in get_recording().scopes] == [0] * 5


def test_results_and_exceptions_pass_through_unchanged():
    with pytest.raises(KeyError, match="mine"), MemoryTracker("failing") as tracker:
        raise KeyError("mine")
    assert tracker.result.error == "KeyError"


def test_misuse_is_refused():
    tracker = MemoryTracker("once")
    with pytest.raises(RuntimeError, match="nothing was tracked"):
        _ = tracker.result
    with tracker:
        with pytest.raises(RuntimeError, match="open already"):
            tracker.__enter__()
        with pytest.raises(RuntimeError, match="still open"):
            _ = tracker.result
    with pytest.raises(RuntimeError, match="left already"):
        tracker.__exit__(None, None, None)
    with tracker:  # one after the other is fine
        pass
    with pytest.raises(TypeError, match="@MemoryTracker\\(\\)"):

        @MemoryTracker
        def function() -> None: ...

    with pytest.raises(TypeError, match="string"):
        MemoryTracker(3)
    with pytest.raises(TypeError, match="functions"):
        MemoryTracker("x")(int)
    with pytest.raises(TypeError, match="asynchronous generator"):

        @MemoryTracker()
        async def stream():
            yield 1


def test_a_scope_may_be_left_in_another_thread():
    tracker = MemoryTracker("handed on")
    tracker.__enter__()
    thread = threading.Thread(target=tracker.__exit__, args=(None, None, None))
    thread.start()
    thread.join()
    assert tracker.result.wall_s > 0
    with MemoryTracker("after") as after:
        pass
    assert after.result.thread == threading.current_thread().name


def test_turned_off_it_records_nothing_and_a_switch_in_the_middle_is_harmless():
    av_memory.enable_memory_tracking(False)
    with MemoryTracker("off"):
        av_memory.enable_memory_tracking(True)
    with MemoryTracker("on"):
        av_memory.enable_memory_tracking(False)
    stats = get_memory_stats()
    assert set(stats.scopes) == {"on"}
    assert stats.tracking_enabled is False


def test_statistics_are_sums_over_the_passages():
    peaks, nets, walls = [], [], []
    kept = []
    for size in (10, 30, 50):
        with MemoryTracker("step") as tracker:
            kept.append(resident(size))
        peaks.append(tracker.result.cpu.peak_mb)
        nets.append(tracker.result.cpu.net_mb)
        walls.append(tracker.result.wall_s)
    step = get_memory_stats()["scopes"]["step"]
    assert step.count == step["count"] == 3
    assert step.max_peak_mb == pytest.approx(max(peaks))
    assert step.mean_peak_mb == pytest.approx(sum(peaks) / 3)
    assert step.mean_net_mb == pytest.approx(sum(nets) / 3)
    assert step.total_wall_s == pytest.approx(sum(walls))
    assert step.mean_wall_s == pytest.approx(sum(walls) / 3)


def test_the_stats_read_as_an_object_and_as_a_dictionary():
    import psutil

    stats = get_memory_stats()
    keys = {
        "current_cpu_mb", "peak_cpu_mb", "current_gpu_mb", "peak_gpu_mb", "gpus", "machine_total_mb",
        "machine_available_mb", "cgroup_limit_mb", "cgroup_used_mb", "scopes", "tracking_enabled",
    }  # fmt: skip
    assert set(stats) == set(dict(stats)) == keys
    assert len(stats) == len(keys)
    assert stats["peak_cpu_mb"] == stats.peak_cpu_mb
    with pytest.raises(KeyError, match="current_cpu_mb"):
        stats["no such key"]
    assert stats.current_cpu_mb == pytest.approx(psutil.Process().memory_info().rss / MB, abs=2)
    assert stats.machine_total_mb == psutil.virtual_memory().total / MB
    kernel = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    assert stats.peak_cpu_mb == pytest.approx(kernel, rel=0.02) or stats.peak_cpu_mb > kernel
    assert f"{stats['peak_gpu_mb']} MB"


def test_reset_peak_memory(run_fresh):
    out = run_fresh(
        """
        import av_memory
        bytearray(300 * 2**20)
        before = av_memory.get_memory_stats().peak_cpu_mb
        with av_memory.MemoryTracker("open") as tracker:
            bytearray(400 * 2**20)
            av_memory.reset_peak_memory()
        after = av_memory.get_memory_stats()
        print(before, after.peak_cpu_mb, after.current_cpu_mb, tracker.result.cpu.peak_mb)
        """
    )
    before, after, current, scope = map(float, out.split())
    assert before > 300
    assert after == pytest.approx(current, abs=5)
    assert scope > 400


def test_names_without_end_do_not_grow_memory_without_end(monkeypatch):
    monkeypatch.setattr("av_memory._recorder._KEPT_NAMES", 10)
    for index in range(50):
        with MemoryTracker(f"batch_{index}"):
            pass
    scopes = get_memory_stats().scopes
    assert len(scopes) == 11
    assert scopes["(other names)"].count == 40


def test_scopes_beyond_the_kept_ones_are_counted():
    for _ in range(10_050):
        with MemoryTracker("many"):
            pass
    recording = get_recording()
    assert len(recording.scopes) == 10_000
    assert recording.dropped_scopes == 50
    assert get_memory_stats().scopes["many"].count == 10_050


def test_the_recording_has_a_curve_in_order_that_reaches_the_peak():
    with MemoryTracker("curve") as tracker:
        hold(100, 0.05)
    recording = get_recording()
    (cpu,) = [series for series in recording.series if series.name == "cpu"]
    assert cpu.times_s == sorted(cpu.times_s)
    assert len(cpu.times_s) == len(cpu.values_mb) >= 7
    assert max(cpu.values_mb) == pytest.approx(tracker.result.cpu.peak_mb, abs=1)
    assert recording.limits["machine_total_mb"] > 0


def test_a_tree_counts_child_processes():
    code = "import time; block = bytearray(150 * 2**20); print('up', flush=True); time.sleep(60)"
    tracker = MemoryTracker("tree", tree=True)
    with tracker, subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as child:
        assert child.stdout.readline() == b"up\n"
        time.sleep(0.4)
        child.kill()
    result = tracker.result
    assert result.tree.peak_mb - result.tree.start_mb > 150
    assert result.cpu.peak_mb - result.cpu.start_mb < 50
    assert result.tree_pss_peak_mb > 150
    assert result.tree.end_mb < result.tree.peak_mb
    assert {series.name for series in get_recording().series} >= {"tree rss", "tree pss"}
    with MemoryTracker("no tree") as plain:
        pass
    assert plain.result.tree is None


def test_children_that_die_while_they_are_watched():
    with MemoryTracker("deaths", tree=True) as tracker:
        for _ in range(15):
            subprocess.run([sys.executable, "-S", "-c", "pass"], check=True)
    assert tracker.result.tree.peak_mb >= tracker.result.cpu.start_mb * 0.9


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_forked_child_measures_itself_and_its_parent_is_not_disturbed():
    with MemoryTracker("parent") as parent:
        time.sleep(0.02)
        read_end, write_end = os.pipe()
        pid = os.fork()
        if pid == 0:
            try:
                with MemoryTracker("child") as child:
                    block = bytearray(200 * MB)
                    time.sleep(0.05)
                    del block
                cpu = child.result.cpu
                statm = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / MB
                report = f"{cpu.peak_mb - cpu.start_mb} {av_memory.get_cpu_memory()} {statm}"
                os.write(write_end, report.encode())
            finally:
                os._exit(0)
        os.waitpid(pid, 0)
    rise, own, statm = map(float, os.read(read_end, 200).split())
    os.close(read_end)
    os.close(write_end)
    assert rise == pytest.approx(200, abs=10)
    assert own == pytest.approx(statm, abs=5)
    assert parent.result.cpu.peak_mb - parent.result.cpu.start_mb < 100
    assert set(get_memory_stats().scopes) == {"parent"}


def test_the_sampler_rests_when_no_scope_is_open():
    with MemoryTracker("wake"):
        time.sleep(0.02)
    time.sleep(0.3)
    (thread,) = [t for t in threading.enumerate() if t.name == "av-memory"]
    before = _wake_ups(thread.native_id)
    time.sleep(0.3)
    assert _wake_ups(thread.native_id) == before
    with MemoryTracker("again") as tracker:
        hold(70, 0.05)
    assert tracker.result.cpu.peak_mb - tracker.result.cpu.start_mb == pytest.approx(70, abs=4)


def _wake_ups(thread_id: int) -> int:
    lines = Path(f"/proc/self/task/{thread_id}/status").read_text().splitlines()
    (count,) = [line.split()[1] for line in lines if line.startswith("voluntary_ctxt_switches")]
    return int(count)


def test_gpu_figures_are_zero_without_cuda():
    import torch

    if torch.cuda.is_initialized():
        assert av_memory.get_gpu_memory() >= 0
    else:
        assert av_memory.get_gpu_memory() == av_memory.get_gpu_memory(0) == 0.0
    with pytest.raises(ValueError, match="count from 0"):
        av_memory.get_gpu_memory(-1)


def test_tracking_does_not_change_a_computation():
    import torch

    def compute() -> torch.Tensor:
        torch.manual_seed(3)
        layer = torch.nn.Linear(64, 64)
        for _ in range(20):
            layer(torch.randn(8, 64)).square().mean().backward()
        return layer.weight.grad

    plain = compute()
    with MemoryTracker("compute", tree=True, high_water=True):
        tracked = compute()
    assert torch.equal(plain, tracked)


def test_signal_handlers_and_finalisers_may_use_it_at_any_moment(run_fresh):
    out = run_fresh(
        """
        import faulthandler, gc, signal, time
        import av_memory
        from av_memory import MemoryTracker
        faulthandler.dump_traceback_later(30, exit=True)
        av_memory.get_memory_stats()  # imports psutil, which a handler must not find half done
        handled = finalised = passed = 0
        def handle(*_):
            global handled
            handled += 1
            with MemoryTracker("handler"):
                av_memory.get_memory_stats()
            if handled % 50 == 0:
                av_memory.to_json()
                av_memory.reset_peak_memory()
            signal.setitimer(signal.ITIMER_REAL, 0.001)  # only now, or slow handlers would pile up
        class Cycle:
            def __init__(self): self.me = self
            def __del__(self):
                global finalised
                finalised += 1
                with MemoryTracker("finaliser"): pass
        signal.signal(signal.SIGALRM, handle)
        signal.setitimer(signal.ITIMER_REAL, 0.001)
        gc.set_threshold(10)
        end = time.monotonic() + 1.5
        while time.monotonic() < end:
            Cycle()
            passed += 1
            with MemoryTracker("main"): pass
        signal.signal(signal.SIGALRM, signal.SIG_IGN)
        gc.collect()
        scopes = av_memory.get_memory_stats().scopes
        assert scopes["main"].count == passed
        assert scopes["handler"].count == handled > 20
        assert scopes["finaliser"].count == finalised > 20
        """
    )
    assert out == ""


def test_the_garbage_collector_swallows_no_interruption(run_fresh):
    out = run_fresh(
        """
        import gc, signal, sys, time
        import av_memory
        def interrupt(*_):
            raise KeyboardInterrupt
        signal.signal(signal.SIGALRM, interrupt)
        swallowed = []
        sys.unraisablehook = swallowed.append
        kept = [[] for _ in range(200_000)]  # for a collection that takes most of the time
        caught = 0
        for _ in range(20):
            try:
                signal.setitimer(signal.ITIMER_REAL, 0.02)
                end = time.monotonic() + 1
                while time.monotonic() < end:
                    gc.collect()
            except KeyboardInterrupt:
                caught += 1
        assert (caught, swallowed) == (20, [])
        """
    )
    assert out == ""


def test_a_lock_that_is_held_by_the_interrupted_code_lets_its_thread_in():
    from av_memory._recorder import RECORDER

    done = threading.Event()

    def interrupted() -> None:
        with RECORDER._lock, RECORDER._tree_lock:  # where a handler may run
            with MemoryTracker("handler", tree=True):
                pass
            get_memory_stats()
            av_memory.to_json()
        done.set()

    threading.Thread(target=interrupted, daemon=True).start()
    assert done.wait(20)


def test_without_threads_scopes_go_on_and_are_sampled_once_there_are_some(run_fresh):
    out = run_fresh(
        """
        import threading, time
        from av_memory import MemoryTracker
        start = threading.Thread.start
        def refuse(thread): raise RuntimeError("can't start new thread")
        threading.Thread.start = refuse
        with MemoryTracker("without", tree=True) as without: pass
        threading.Thread.start = start
        with MemoryTracker("with") as tracker:
            block = bytearray(100 * 2**20)
            time.sleep(0.05)
            del block
            time.sleep(0.02)
        started = any(thread.name == "av-memory" for thread in threading.enumerate())
        print(without.result.depth, tracker.result.depth, started)
        """
    )
    assert out.split() == ["0", "0", "True"]


def test_it_may_be_used_first_while_the_interpreter_ends(run_fresh):
    out = run_fresh(
        """
        import atexit
        from av_memory import MemoryTracker
        def last():
            with MemoryTracker("exit"): print("exit")
        atexit.register(last)
        class Last:
            def __del__(self):
                with MemoryTracker("finaliser"): print("finaliser")
        kept = Last()
        """
    )
    assert out.split() == ["exit", "finaliser"]


def test_the_sampler_survives_a_want_of_memory(monkeypatch):
    from av_memory._recorder import RECORDER

    def refuse(ticks: int) -> None:
        raise MemoryError

    with MemoryTracker("wake"), monkeypatch.context() as patch:
        patch.setattr(RECORDER, "_sample", refuse)
        time.sleep(0.03)
    with MemoryTracker("after") as tracker:
        hold(80, 0.05)
    assert tracker.result.cpu.peak_mb - tracker.result.cpu.start_mb == pytest.approx(80, abs=4)


def test_depth_counts_a_scope_that_is_open_past_closed_ones_between():
    a, b, c, d = (MemoryTracker(name) for name in "abcd")
    for tracker in (a, b, c):
        tracker.__enter__()
    b.__exit__(None, None, None)
    c.__exit__(None, None, None)
    with d:
        pass
    a.__exit__(None, None, None)
    assert [tracker.result.depth for tracker in (a, b, c, d)] == [0, 1, 2, 1]


def test_a_tree_that_cannot_be_read_leaves_the_code_alone(monkeypatch):
    def refuse(*_: object) -> int:
        raise OSError(24, "Too many open files")

    with monkeypatch.context() as patch:
        patch.setattr("av_memory.probes.ProcessTree.refresh", refuse)
        with MemoryTracker("never", tree=True) as never:
            time.sleep(0.02)
    assert never.result.tree is None
    with MemoryTracker("not at the end", tree=True) as tracker, monkeypatch.context() as patch:
        patch.setattr("av_memory.probes.ProcessTree.rss_bytes", refuse)
        tracker.__exit__(None, None, None)
        assert tracker.result.tree is None
        tracker.__enter__()
    with MemoryTracker("again", tree=True) as again:
        pass
    assert again.result.tree.peak_mb > 0
