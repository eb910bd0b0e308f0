"""TVM: kernels compiled for one CPU and one shape, each with a schedule that was searched for on that CPU.

TVM's own defaults are 16 to 25 times slower than torch eager, so nothing is built without tuning: a model
with a kernel that has no tuning record fails. What was measured is kept (see `_tvm_records`), and a run that
was cut short goes on where it ended.

There is no int8 technique: TVM imports QDQ graphs of ONNX, and computes them in float32 between conversions.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import ClassVar, Final

import numpy as np

from hamerspace._checks import number, positive_integer
from hamerspace._imports import PACKAGES, has, need
from hamerspace.artifact import Manifest
from hamerspace.backends._tvm_lower import Lowered, compile_tuned, export, lower
from hamerspace.backends._tvm_process import tune
from hamerspace.backends._tvm_records import Records, root_of
from hamerspace.backends._tvm_tune import Order
from hamerspace.backends.base import BaseBackend, BuildContext, Built, Candidate, Verdict
from hamerspace.exceptions import BackendError
from hamerspace.models.info import ModelInfo
from hamerspace.runtimes.base import Runner, RunOptions
from hamerspace.runtimes.tvm import TVMRunner, open_runner

LIBRARY: Final = "model.so"
TRIALS: Final = 32
TUNING_LIMIT_S: Final = 1200.0
_BUILD_LIMIT_S: Final = 1800.0
_SHARE_OF_TUNING: Final = 2 / 3
"""Of the time for a build; what is left is for importing, compiling and linking."""
_COMPILERS: Final = ("g++", "clang++", "gcc", "clang", "c++", "cc")
_TOLERANCE: Final = 1e-4


class TVMBackend(BaseBackend):
    """Compiles models by TVM for this machine's CPU."""

    name: ClassVar[str] = "tvm"
    title: ClassVar[str] = "Apache TVM"
    modules: ClassVar[tuple[str, ...]] = ("tvm", "xgboost")
    distributions: ClassVar[tuple[str, ...]] = ("apache-tvm", "apache-tvm-ffi", "xgboost")
    extra: ClassVar[str] = "tvm"

    def is_available(self) -> Verdict:
        """Whether TVM is installed, and a C++ compiler to link with."""
        verdict = super().is_available()
        if verdict and compiler() is None:
            return Verdict(False, "no C++ compiler to link with; install g++ or clang, or name one in CXX")
        return verdict

    def supports_model(self, model_info: ModelInfo) -> Verdict:
        """Whether what imports the model is installed; operators that TVM does not know show in `build`."""
        needed = {"pytorch": ["torch"], "onnx": ["onnx"], "tensorflow": ["onnx", "tf2onnx"]}[
            model_info.framework
        ]
        if model_info.form == "torchscript":
            needed = ["torch", "onnx"]
        if missing := [module for module in needed if not has(module)]:
            wanted = " ".join(PACKAGES.get(module, module) for module in missing)
            return Verdict(
                False, f"TVM imports this model through {', '.join(missing)}; run: pip install {wanted}"
            )
        return Verdict(True, "shapes are fixed when it is built")

    def candidates(self, model_info: ModelInfo, *, hardware: str = "cpu") -> list[Candidate]:
        """Return the one recipe, for CPUs."""
        if hardware in ("gpu", "cuda") or not self.supports_model(model_info):
            return []
        return [
            Candidate(
                backend=self.name,
                technique="tuned",
                forms=(".so",),
                goal="graph",
                description="kernels of float32 for this CPU and these shapes, tuned by MetaSchedule",
                expected_speed=1.5,
                options={"trials": TRIALS, "tuning_limit_s": TUNING_LIMIT_S},
                time_limit_s=_BUILD_LIMIT_S,
            )
        ]

    def build(self, context: BuildContext) -> Built:
        """Tune, compile, link, and open what was linked.

        Options of the candidate: ``trials``, schedules to try for each kernel on average, at least 1 (more go
        to kernels that take longer); ``tuning_limit_s``, seconds after which tuning is ended, whatever it has
        found, and with it two thirds of the time that the build has.

        Raises:
            ConstraintError: an option is out of range.
            BackendError: TVM cannot import the model, a kernel has no tuning record, or the library does not
                give what the model in memory gives.
        """
        options = context.candidate.options
        trials = positive_integer("trials", options["trials"])
        limit_s = number("tuning_limit_s", options["tuning_limit_s"], lambda n: n > 0, "give seconds above 0")
        if context.time_limit_s is not None:
            limit_s = min(limit_s, _SHARE_OF_TUNING * context.time_limit_s)
        lowered = lower(context)
        records = Records.of(root_of(context.cache), lowered.kernels, lowered.target, self.versions())
        with records.locked(limit_s):
            note = _tune(records, lowered, trials, limit_s, context.seed)
            records.mend()
            executable = compile_tuned(lowered, records.open())
        export(executable, context.folder / LIBRARY)
        run_options = RunOptions(threads=context.threads)
        in_memory = TVMRunner(executable, lowered.inputs, context.info.outputs, lowered.order, run_options)
        _check_reloads(context, lowered, in_memory, run_options)
        return Built(
            runtime="tvm",
            main=LIBRARY,
            options={"order": list(lowered.order), "cpu": lowered.target["mcpu"]},
            alone=(LIBRARY,),
            run=in_memory.run,
            inputs=lowered.inputs,
            notes=(
                note,
                f"native code for CPUs of the kind {lowered.target['mcpu']}, for these shapes alone",
            ),
        )

    def open(self, manifest: Manifest, folder: Path, options: RunOptions) -> Runner:
        """Open a library; see `hamerspace.runtimes.tvm.open_runner`."""
        return open_runner(manifest, folder, options)


def compiler() -> str | None:
    """Return the C++ compiler that TVM links with: ``CXX``, ``CC``, or the first that is found."""
    named = [os.environ[name] for name in ("CXX", "CC") if os.environ.get(name)]
    return next((found for name in (*named, *_COMPILERS) if (found := shutil.which(name))), None)


def _tune(records: Records, lowered: Lowered, trials: int, limit_s: float, seed: int) -> str:
    """Tune unless that was done before; return what the user should know of it."""
    kernels = f"{len(lowered.kernels)} kernels"
    if not lowered.kernels or records.finished_trials() >= trials:
        return f"{kernels}, tuned before in {records.count()} trials"
    order = Order(
        folder=str(records.folder), kernels=lowered.kernels, target=lowered.target, trials=trials, seed=seed
    )
    if tune(records, order, limit_s):
        records.finish(trials)
        return f"{kernels}, tuned in {records.count()} trials"
    return (
        f"{kernels}, tuned in {records.count()} trials; the time was over after {limit_s:.0f} s, "
        "and another run goes on from there"
    )


def _check_reloads(context: BuildContext, lowered: Lowered, in_memory: Runner, options: RunOptions) -> None:
    library = need("tvm").runtime.load_module(str((context.folder / LIBRARY).resolve()))
    reloaded = TVMRunner(library, lowered.inputs, context.info.outputs, lowered.order, options)
    feeds = ModelInfo(framework="onnx", name="", inputs=lowered.inputs).draw(1, context.seed)
    wanted, given = in_memory.run(feeds), reloaded.run(feeds)
    for name, array in wanted.items():
        if not np.allclose(array, given[name], rtol=_TOLERANCE, atol=_TOLERANCE, equal_nan=True):
            raise BackendError(f"the library gives another {name} than the model that was linked into it")
