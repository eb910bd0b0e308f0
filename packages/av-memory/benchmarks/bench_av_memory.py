"""What tracking costs and how right its peaks are, beside psutil and memray doing the same job.

Run with ``make bench P=av-memory``.
"""

from __future__ import annotations

import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import av_memory
import memray
import numpy as np
import psutil
from av_memory import MemoryTracker
from measuring import environment, interleave, parse_arguments, table, write_results

SCOPES = 20_000
MB = 2**20


@contextlib.contextmanager
def psutil_scope() -> Iterator[None]:
    """A scope as one writes it by hand: the resident set before and after."""
    process = psutil.Process()
    process.memory_info()
    yield
    process.memory_info()


@contextlib.contextmanager
def psutil_sampler(interval_s: float = 0.005) -> Iterator[list[int]]:
    """Sampling with psutil at the same interval as av-memory."""
    process, stop, peak = psutil.Process(), threading.Event(), [0]

    def run() -> None:
        while not stop.wait(interval_s):
            peak[0] = max(peak[0], process.memory_info().rss)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield peak
    finally:
        stop.set()
        thread.join()


@contextlib.contextmanager
def memray_scope() -> Iterator[Path]:
    """memray's tracker, which hooks every allocation and writes it to a file."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "capture")
        with memray.Tracker(path):
            yield path


Scope = Callable[[], contextlib.AbstractContextManager[object]]


def scopes_of(make: Scope, count: int) -> Callable[[], None]:
    def run() -> None:
        for _ in range(count):
            with make():
                pass

    return run


def empty_loop() -> None:
    for _ in range(SCOPES):
        pass


def scope_cost(rounds: int) -> dict[str, float]:
    """Microseconds of wall time a scope, less an empty loop. CPU time would count the sampler's rest."""

    def enabled(run: Callable[[], None], on: bool) -> Callable[[], None]:
        def switched() -> None:
            av_memory.enable_memory_tracking(on)
            run()
            av_memory.enable_memory_tracking(True)

        return switched

    def tracker_loop() -> None:
        for _ in range(SCOPES):
            with MemoryTracker("scope"):
                pass

    timings = interleave(
        {
            "empty": empty_loop,
            "enabled": enabled(tracker_loop, True),
            "disabled": enabled(tracker_loop, False),
            "psutil": scopes_of(psutil_scope, SCOPES),
        },
        rounds=rounds,
        calls=SCOPES,
    )
    few = 20
    high_water = scopes_of(lambda: MemoryTracker("exact", high_water=True), 500)
    others = {
        "high water": interleave({"": high_water}, rounds=rounds, calls=500)[""],
        "memray": interleave({"": scopes_of(memray_scope, few)}, rounds=rounds, calls=few)[""],
    }
    empty = timings.pop("empty").wall_s
    return {name: (timing.wall_s - empty) * 1e6 for name, timing in (timings | others).items()}


def numpy_loop() -> None:
    """Three seconds or so of small and middling array work, with temporaries."""
    generator = np.random.default_rng(0)
    vector, matrix = generator.random(50_000), generator.random((96, 96))
    total = 0.0
    for _ in range(6_000):
        matrix = matrix @ matrix
        matrix /= np.abs(matrix).max()
        total += float(np.sqrt(vector * vector + 1.0).sum())
    assert np.isfinite(total)


def sampler_cost(rounds: int) -> dict[str, tuple[float, float]]:
    """Cost of watching a busy loop: CPU and wall time over the loop alone, as shares."""

    def under(scope: Scope) -> Callable[[], None]:
        def run() -> None:
            with scope():
                numpy_loop()

        return run

    timings = interleave(
        {
            "alone": numpy_loop,
            "av-memory": under(lambda: MemoryTracker("loop")),
            "psutil": under(psutil_sampler),
            "memray": under(memray_scope),
        },
        rounds=rounds,
    )
    alone = timings.pop("alone")
    return {
        name: (timing.cpu_s / alone.cpu_s - 1, timing.wall_s / alone.wall_s - 1)
        for name, timing in timings.items()
    }


def sampler_share(rounds: int) -> float:
    """CPU time of the sampling thread itself, by the kernel's count, over that of the watched loop.

    It is exact where the difference of two loops' times, which also holds what the thread costs the loop
    in caches and waits, scatters by some per cent.
    """

    def other_threads_s() -> float:
        main = os.getpid()
        tasks = [task for task in Path("/proc/self/task").iterdir() if int(task.name) != main]
        return sum(int((task / "schedstat").read_text().split()[0]) for task in tasks) / 1e9

    shares: list[float] = []
    for _ in range(rounds):
        with MemoryTracker("loop"):
            began, began_process = other_threads_s(), time.process_time()
            numpy_loop()
            shares.append((other_threads_s() - began) / (time.process_time() - began_process))
    return statistics.median(shares)


PEAK_JOB = """
import json, resource, sys, time
sys.path.insert(0, {folder!r})
import bench_av_memory as bench
with {scope} as scope:
    block = bytearray(500 * 2**20)
    time.sleep({hold})
    del block
kernel = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
print(json.dumps([{peak}, kernel]))
"""
PEAK_SCOPES = {
    "av-memory": ('bench.MemoryTracker("peak")', "scope.result.cpu.peak_mb * 2**20"),
    "psutil": ("bench.psutil_sampler()", "scope[0]"),
}


def peaks(hold_s: float) -> dict[str, float]:
    """Error of the peak of a 500 MB allocation against the kernel's ``ru_maxrss``, in fresh processes."""
    errors: dict[str, float] = {}
    for peer, (scope, peak) in PEAK_SCOPES.items():
        code = PEAK_JOB.format(folder=str(Path(__file__).parent), scope=scope, peak=peak, hold=hold_s)
        out = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
        seen, kernel = json.loads(out)
        errors[peer] = seen / kernel - 1
    return errors


def main() -> None:
    arguments = parse_arguments(__doc__ or "")
    started = time.time()
    cost = scope_cost(arguments.rounds)
    load = sampler_cost(max(5, arguments.rounds))
    share = sampler_share(max(5, arguments.rounds))
    held, burst = peaks(0.05), peaks(0.0)
    print(table(
        ["one scope, microseconds", "measured", "bar"],
        [
            ["av-memory, enabled", f"{cost['enabled']:.2f}", "10"],
            ["av-memory, disabled", f"{cost['disabled']:.2f}", "0.3"],
            ["av-memory, high_water", f"{cost['high water']:.1f}", ""],
            ["psutil, resident set before and after", f"{cost['psutil']:.1f}", ""],
            ["memray.Tracker", f"{cost['memray']:.0f}", ""],
        ],
    ))  # fmt: skip
    print()
    print(table(
        ["watching a busy numpy loop", "CPU time", "wall time"],
        [[name, f"{cpu:+.1%}", f"{wall:+.1%}"] for name, (cpu, wall) in load.items()],
    ))  # fmt: skip
    print(f"\nthe sampling thread itself, by the kernel's count: {share:.2%} of the loop's CPU time")
    print()
    print(table(
        ["peak of 500 MB against ru_maxrss", "held 50 ms", "freed at once"],
        [[name, f"{held[name]:+.2%}", f"{burst[name]:+.2%}"] for name in held],
    ))  # fmt: skip
    target = write_results(
        __file__,
        arguments.json,
        {
            "scope_us": cost,
            "loop_cost": load,
            "sampler_share": share,
            "peak_error_held": held,
            "peak_error_burst": burst,
            "seconds": time.time() - started,
            "environment": environment(["av-memory", "memray", "numpy", "psutil"]),
        },
    )
    print(f"\nwritten to {target}")


if __name__ == "__main__":
    main()
