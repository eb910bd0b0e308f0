"""Runs libraries that TVM has compiled.

Such a library is native code, which only `hamerspace._trust` lets in.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from threading import Lock
from typing import Any, Final

import numpy as np

from hamerspace._imports import need
from hamerspace._trust import check_native
from hamerspace.artifact import SIDECAR, Manifest, check_files, inside
from hamerspace.exceptions import ArtifactError
from hamerspace.models.info import Array, Feeds, TensorSpec
from hamerspace.runtimes.base import Runner, RunOptions

_VECTORS: Final = (
    "amx", "avx", "bmi", "f16c", "fma", "sse", "ssse", "dotprod", "fullfp16", "i8mm", "neon", "sve"
)  # fmt: skip
"""How LLVM's names of the instructions in kernels begin; its other names say how a CPU is best used."""


class TVMRunner(Runner):
    """A compiled model.

    Args:
        library: TVM's module that holds it.
        inputs: of the model.
        outputs: of the model; shapes of any length are those that come out.
        order: names of inputs in the order in which the compiled function takes them.
        options: ``threads`` counts for the whole process.
    """

    def __init__(
        self,
        library: Any,
        inputs: tuple[TensorSpec, ...],
        outputs: tuple[TensorSpec, ...],
        order: Sequence[str],
        options: RunOptions,
    ) -> None:
        tvm = need("tvm")
        self.inputs, self.outputs = inputs, outputs
        self._order = tuple(order)
        self._cpu = tvm.cpu()
        if options.threads is not None:
            set_threads(options.threads)
        self._machine = need("tvm.relax").VirtualMachine(library, self._cpu)
        self._main = self._machine["main"]
        # The machine keeps values of its run, and so serves one caller at a time.
        self._lock = Lock()

    def prepare(self, feeds: Feeds) -> list[Any]:
        """Return TVM's tensors, in the order of the compiled function."""
        tensor = need("tvm").runtime.tensor
        return [tensor(np.require(feeds[name], requirements="C"), self._cpu) for name in self._order]

    def run_prepared(self, prepared: Any) -> Any:
        """Run once; kernels have ended when this returns."""
        return self._main(*prepared)

    def run(self, feeds: Feeds) -> dict[str, Array]:
        """Return outputs by name."""
        with self._lock:
            given = self.run_prepared(self.prepare(feeds))
        tensors: list[Any] = [given] if hasattr(given, "numpy") else list(given)
        names = [spec.name for spec in self.outputs] or [f"output_{place}" for place in range(len(tensors))]
        return {name: one.numpy() for name, one in zip(names, tensors, strict=True)}


def set_threads(threads: int) -> None:
    """Set how many threads TVM's kernels run in, for the whole process."""
    all_cores = 1  # kBig of TVM's ThreadGroup::AffinityMode: fast cores first
    need("tvm").get_global_func("runtime.config_threadpool")(all_cores, threads)


def open_runner(manifest: Manifest, folder: Path, options: RunOptions) -> Runner:
    """Open a library whose manifest lies beside it.

    Raises:
        UnsafeModelError: somebody else built it, and that was not allowed.
        ArtifactError: the library is missing, not the one that was saved, made for another kind of CPU, or
            named by no manifest; without one, nothing says what it takes and gives.
        ImportError: TVM is not installed.
    """
    name = manifest.main
    path = inside(folder, name, str(folder))
    if name not in manifest.files:
        raise ArtifactError(
            f"{path} has no entry in a manifest, so nothing says whether it is the library that was saved, "
            f"or what it takes; give the folder that hamerspace wrote, or the .so with its {SIDECAR} file"
        )
    if options.device != "cpu":
        raise ArtifactError(f"{path} was compiled for CPUs and cannot run on {options.device}")
    check_files(folder, {name: manifest.files[name]}, f"the manifest of {folder}")
    check_native(manifest, folder, options)
    if lacking := lacking_features(str(manifest.options.get("cpu", ""))):
        raise ArtifactError(
            f"{path} was compiled for CPUs of the kind {manifest.options['cpu']}, and this one lacks "
            f"{', '.join(lacking[:8])}; build it on this kind of machine"
        )
    try:
        library = need("tvm").runtime.load_module(str(path.resolve()))
        order = [str(one) for one in manifest.options["order"]]
        return TVMRunner(library, manifest.inputs, manifest.outputs, order, options)
    except (RuntimeError, ValueError, OSError, KeyError, TypeError, AttributeError) as error:
        raise ArtifactError(f"{path} cannot be opened by TVM: {error}") from error


def lacking_features(cpu: str) -> list[str]:
    """Vector instructions that a kind of CPU has and this machine's lacks; LLVM's names of both."""
    codegen, target = need("tvm.target.codegen"), need("tvm").target.Target
    here = str(codegen.llvm_get_system_cpu())
    if not cpu or cpu == here:
        return []
    triple = str(codegen.llvm_get_system_triple())
    there, mine = (
        {
            str(one)
            for one in codegen.llvm_get_cpu_features(
                target({"kind": "llvm", "mtriple": triple, "mcpu": name})
            )
        }
        for name in (cpu, here)
    )
    return sorted(name for name in there - mine if name.startswith(_VECTORS))
