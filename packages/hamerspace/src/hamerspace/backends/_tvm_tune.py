"""Measures schedules of kernels with TVM's MetaSchedule; runs in a process of its own.

TVM's stock builder and runner start a Python for each worker, which imports TVM anew and takes longer than
the limit for a trial. Here a kernel is compiled in memory and timed in this very process. One that crashes
takes the process with it; what was measured before is on disk by then, and the parent starts another.
"""

from __future__ import annotations

import json
import platform
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Final

import numpy as np

from hamerspace._imports import need
from hamerspace._processes import end_with_parent
from hamerspace.backends._tvm_records import Kernel, Records

TRIALS_A_ROUND: Final = 8
_FIRST_ROUNDS: Final = 8
"""Rounds that a kernel gets at most until a schedule of it has worked."""
_FIRST_TRIALS: Final = 2
"""Of each such round: without a record of every kernel the model cannot be built at all."""
_TIMING_S: Final = 0.01
_REPEATS: Final = 2
_MOST_CALLS: Final = 5000
_SHARE: Final = 4
"""A kernel gets at most this many times the average number of trials."""


@dataclass(frozen=True, kw_only=True)
class Order:
    """What a process is to tune."""

    folder: str
    """Of the records."""
    kernels: tuple[Kernel, ...]
    target: dict[str, Any]
    trials: int
    """For each kernel, on average."""
    seed: int

    def write(self, path: Path) -> None:
        """Write it where `main` reads it."""
        path.write_text(json.dumps(asdict(self)), encoding="utf-8")

    @classmethod
    def read(cls, path: Path) -> Order:
        """Read what `write` wrote."""
        data: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        data["kernels"] = tuple(Kernel(**one) for one in data["kernels"])
        return cls(**data)


def main(path: str, parent: int) -> None:
    """Tune what an order says, and end with the process that gave it."""
    end_with_parent(parent)
    _import_lean()
    _Tuning(Order.read(Path(path))).run()


class _Tuning:
    def __init__(self, order: Order) -> None:
        tvm, schedule = need("tvm"), need("tvm.s_tir.meta_schedule")
        self._order = order
        self._schedule = schedule
        self._target = tvm.target.Target(order.target)
        self._modules = [tvm.ir.load_json(kernel.module) for kernel in order.kernels]
        self._records = Records(Path(order.folder))
        self._database = self._records.open()
        threads = int(order.target["num-cores"])
        self._trials = _Trials(threads)
        self._threads = threads
        # The model's first guesses are random: few kernels and few trials are no reason to wait for 100.
        self._cost_model = schedule.cost_model.XGBModel(
            num_warmup_samples=4 * TRIALS_A_ROUND, num_tuning_cores=threads, tree_method="auto"
        )

    def run(self) -> None:
        """Find a schedule for each kernel first, then spend what is left where it shortens a run most."""
        places = range(len(self._modules))
        first = min(_FIRST_TRIALS, self._order.trials)
        for _ in range(_FIRST_ROUNDS):
            missing = [place for place in places if not self._has_record(place)]
            if not missing:
                break
            self._tune(missing, first * len(missing), first)
        left = self._order.trials * len(self._modules) - self._records.count()
        if left > 0:
            self._tune(list(places), left, _SHARE * self._order.trials)

    def _has_record(self, place: int) -> bool:
        name = self._order.kernels[place].name
        return self._database.query_tuning_record(self._modules[place], self._target, name) is not None

    def _tune(self, places: Sequence[int], trials: int, most: int) -> None:
        search = self._schedule.search_strategy.EvolutionarySearch
        chosen = [self._order.kernels[place] for place in places]
        # Another seed where records are there already, so that a run that goes on tries other schedules.
        seed = 1 + self._order.seed + self._records.count()
        contexts = [
            self._schedule.TuneContext(
                mod=self._modules[place],
                target=self._target,
                space_generator="post-order-apply",
                search_strategy=search(population_size=64, init_min_unmeasured=16, genetic_num_iters=2),
                task_name=self._order.kernels[place].name,
                rand_state=1 + (seed * 1009 + place) % (2**31 - 2),
                num_threads=self._threads,
            ).clone()
            for place in places
        ]
        self._schedule.tune_tasks(
            tasks=contexts,
            task_weights=[float(kernel.weight) for kernel in chosen],
            work_dir=self._order.folder,
            max_trials_global=trials,
            max_trials_per_task=most,
            num_trials_per_iter=min(TRIALS_A_ROUND, most),
            builder=self._trials.builder(),
            runner=self._trials.runner(),
            database=self._database,
            cost_model=self._cost_model,
            task_scheduler="gradient",
        )


class _Trials:
    """Compiles schedules in memory and times them."""

    def __init__(self, threads: int) -> None:
        self._threads = threads
        self._built: dict[str, Any] = {}
        self._number = 0

    def builder(self) -> Any:
        """Return a builder for MetaSchedule."""
        base, made = need("tvm.s_tir.meta_schedule.builder"), need("tvm.ir.utils").derived_object
        trials = self

        @made
        class Builder(base.PyBuilder):
            def build(self, build_inputs: Any) -> list[Any]:
                return [base.BuilderResult(*trials.build(one)) for one in build_inputs]

        return Builder()

    def runner(self) -> Any:
        """Return a runner for MetaSchedule."""
        base, made = need("tvm.s_tir.meta_schedule.runner"), need("tvm.ir.utils").derived_object
        trials = self

        @made
        class Future(base.PyRunnerFuture):
            def __init__(self, result: Any) -> None:
                self._result = result

            def done(self) -> bool:
                return True

            def result(self) -> Any:
                return self._result

        @made
        class Runner(base.PyRunner):
            def run(self, runner_inputs: Any) -> list[Any]:
                return [Future(base.RunnerResult(*trials.time(one))) for one in runner_inputs]

        return Runner()

    def build(self, wanted: Any) -> tuple[str | None, str | None]:
        """Compile a schedule; return its name here, or what went wrong."""
        try:
            built = need("tvm").tirx.build(wanted.mod, target=wanted.target)
        except Exception as error:  # noqa: BLE001 - whatever TVM raises, this schedule is none and others may be
            return None, f"{type(error).__name__}: {error}"
        self._number += 1
        name = str(self._number)
        self._built[name] = built
        return name, None

    def time(self, wanted: Any) -> tuple[list[float] | None, str | None]:
        """Return seconds a call, or what went wrong."""
        try:
            return self._time(self._built.pop(wanted.artifact_path), wanted.args_info), None
        except Exception as error:  # noqa: BLE001 - see build
            return None, f"{type(error).__name__}: {error}"

    def _time(self, module: Any, arguments: Any) -> list[float]:
        tvm = need("tvm")
        generator = np.random.default_rng(0)
        tensors = [_fill(generator, one) for one in arguments]
        # One thread is timed by its CPU time, which other processes on the machine hardly change.
        clock = time.thread_time if self._threads == 1 else time.perf_counter
        kernel = module["main"]
        kernel(*tensors)
        start = clock()
        kernel(*tensors)
        calls = max(1, min(_MOST_CALLS, int(_TIMING_S / max(clock() - start, 1e-7))))
        loop = module.time_evaluator("main", tvm.cpu(), number=calls, repeat=1)
        seconds: list[float] = []
        for _ in range(_REPEATS):
            start = clock()
            loop(*tensors)
            seconds.append((clock() - start) / (calls + 1))  # the loop calls once more, to warm up
        return seconds


def _fill(generator: np.random.Generator, argument: Any) -> Any:
    shape, dtype = [int(length) for length in argument.shape], str(argument.dtype)
    # An index of 0 lies inside whatever tensor it points into.
    values = generator.random(shape) if dtype.startswith("float") else np.zeros(shape)
    return need("tvm").runtime.tensor(values.astype(dtype))


def _import_lean() -> None:
    """Import what tuning for a CPU needs of TVM.

    TVM imports torch wherever that is installed, and, for each tuning, parses the tensor instructions of
    every GPU that it knows, which takes longer than tuning a small model.
    """
    sys.modules["torch"] = None  # pyright: ignore[reportArgumentType]
    try:
        need("tvm.relax")
        need("tvm.s_tir.meta_schedule")
    finally:
        del sys.modules["torch"]
    name = "tvm.s_tir.tensor_intrin"
    package = ModuleType(name)
    package.__path__ = [str(Path(place) / "tensor_intrin") for place in need("tvm.s_tir").__path__]
    sys.modules[name] = package
    need(f"{name}.{'arm_cpu' if platform.machine() in ('aarch64', 'arm64') else 'x86'}")
