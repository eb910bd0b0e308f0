"""A model beside the original: proven to reload, its outputs compared, and both timed in turn.

Each has a process of its own, opened once, and the caller lets them run in turn, a round each. So both meet
the same load of the machine, libraries cannot disturb each other, and memory is each model's own.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from hamerspace.measure.metrics import ModelMetrics
from hamerspace.measure.statistics import Ratio, Round, all_calls, interval, wall_medians
from hamerspace.measure.worker import Worker
from hamerspace.models.info import Feeds


@dataclass(frozen=True, kw_only=True)
class SideBySide:
    """Rounds of two models in turn."""

    original: list[Round]
    other: list[Round]

    def speedup(self, hardware: str) -> Ratio:
        """Return how many times less CPU time the other takes; of wall time where a GPU does the work."""
        if hardware == "cpu":
            return Ratio.of([one.cpu_s for one in self.original], [one.cpu_s for one in self.other])
        return self.wall_speedup()

    def wall_speedup(self) -> Ratio:
        """Return how many times less wall time the other takes."""
        return Ratio.of(list(wall_medians(self.original)), list(wall_medians(self.other)))


def time_rounds(worker: Worker, feeds: Feeds, rounds: int) -> list[Round]:
    """Time one model alone."""
    calls = worker.call("prepare", feeds)
    return [one_round(worker, calls) for _ in range(rounds)]


def one_round(worker: Worker, calls: int) -> Round:
    """Let a worker time some calls."""
    cpu_s, walls = worker.call("time_round", calls)
    return Round(cpu_s=cpu_s, wall_s=tuple(walls))


def side_by_side(original: Worker, other: Worker, feeds: Feeds, rounds: int) -> SideBySide:
    """Time two models in turn, on the same inputs."""
    calls = [worker.call("prepare", feeds) for worker in (original, other)]
    found: tuple[list[Round], list[Round]] = ([], [])
    for number in range(rounds):
        # Who goes first changes, so that neither always runs on the other's warm caches.
        for place in (0, 1) if number % 2 == 0 else (1, 0):
            found[place].append(one_round((original, other)[place], calls[place]))
    return SideBySide(original=found[0], other=found[1])


def metrics(
    rounds: Sequence[Round],
    *,
    size_bytes: int,
    batch_size: int,
    hardware: str,
    accuracy: float | None,
    memory_mb: float | None,
) -> ModelMetrics:
    """Put rounds into figures."""
    calls = all_calls(rounds) * 1000
    p50, p90, p99 = (float(value) for value in np.percentile(calls, [50, 90, 99]))
    low, high = interval(list(wall_medians(rounds) * 1000))
    return ModelMetrics(
        size_mb=size_bytes / 2**20,
        latency_ms=p50,
        accuracy=accuracy,
        memory_mb=memory_mb,
        throughput=batch_size / (p50 / 1000),
        latency_p50_ms=p50,
        latency_p90_ms=p90,
        latency_p99_ms=p99,
        latency_interval_ms=(min(low, p50), max(high, p50)),
        cpu_ms=statistics.median(one.cpu_s for one in rounds) * 1000,
        batch_size=batch_size,
        hardware=hardware,
        runs=len(calls),
    )
