"""OpenVINO: ``.xml`` with ``.bin``, on CPUs."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from threading import Lock
from typing import Any, Final

import numpy as np

from hamerspace._imports import need
from hamerspace.artifact import Manifest
from hamerspace.exceptions import ArtifactError, BackendError
from hamerspace.models.info import Array, Feeds, TensorSpec
from hamerspace.runtimes.base import Runner, RunOptions

PRECISIONS: Final = ("f32", "bf16")
HINTS: Final = ("LATENCY", "THROUGHPUT", "CUMULATIVE_THROUGHPUT")


@cache
def core() -> Any:
    """The process's one ``openvino.Core``, which is slow to make."""
    return need("openvino").Core()


def has_bfloat16() -> bool:
    """Whether this CPU multiplies in bfloat16."""
    return "BF16" in core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")


def properties(precision: str, hint: str, threads: int | None) -> dict[str, Any]:
    """Return what the CPU plugin is told.

    Args:
        precision: of what is not quantised, ``f32`` or ``bf16``. Left to itself the plugin takes bf16 where
            the CPU has it, and a float32 model would not be one. Where the CPU has none, bf16 becomes f32.
        hint: what to optimise for.
        threads: None leaves that to OpenVINO.

    Raises:
        ArtifactError: a precision or hint that is not known.
    """
    if precision not in PRECISIONS or hint not in HINTS:
        raise ArtifactError(
            f"precision {precision!r} with the hint {hint!r}; there are {', '.join(PRECISIONS)}, and "
            f"{', '.join(HINTS)}"
        )
    told = {
        "INFERENCE_PRECISION_HINT": "bf16" if precision == "bf16" and has_bfloat16() else "f32",
        "PERFORMANCE_HINT": hint,
        # Pinned threads of several processes would share one core of a machine while others idle.
        "ENABLE_CPU_PINNING": False,
    }
    return told if threads is None else {**told, "INFERENCE_NUM_THREADS": threads}


def compile_graph(graph: Any, options: RunOptions, *, precision: str = "f32", hint: str = "LATENCY") -> Any:
    """Compile an ``openvino.Model``.

    Raises:
        BackendError: OpenVINO cannot run on the device, or cannot compile the model.
    """
    if options.device != "cpu":
        raise BackendError(f"OpenVINO cannot run on {options.device}; use the device cpu")
    told = properties(precision, hint, options.threads)
    try:
        return core().compile_model(graph, "CPU", told)
    except RuntimeError as error:
        raise BackendError(f"OpenVINO cannot compile the model: {_brief(error)}") from error


class OpenVINORunner(Runner):
    """A compiled model of OpenVINO.

    Args:
        compiled: an ``openvino.CompiledModel`` whose tensors have the names of the signature.
        inputs: of the signature. One that the graph does not use may be missing in it.
        outputs: of the signature; empty takes all that the graph has.
    """

    def __init__(
        self, compiled: Any, inputs: tuple[TensorSpec, ...], outputs: tuple[TensorSpec, ...]
    ) -> None:
        self.inputs, self.outputs = inputs, outputs
        self._taken = {name for port in compiled.inputs for name in port.get_names()}
        places = {name: place for place, port in enumerate(compiled.outputs) for name in port.get_names()}
        wanted = [spec.name for spec in outputs] or [port.get_any_name() for port in compiled.outputs]
        missing = [name for name in wanted if name not in places]
        if missing:
            raise ArtifactError(f"the model has no outputs {missing}; it has {list(places)}")
        self._places = {name: places[name] for name in wanted}
        self._compiled = compiled
        # Made once, and so for one caller at a time.
        self._request, self._lock = compiled.create_infer_request(), Lock()

    def prepare(self, feeds: Feeds) -> Any:
        """Return a request whose inputs are set, over the arrays' own memory."""
        request = self._compiled.create_infer_request()
        for name, tensor in self._tensors(feeds).items():
            request.set_tensor(name, tensor)
        return request

    def run_prepared(self, prepared: Any) -> Any:
        """Run once. What is returned changes with the next run."""
        return prepared.infer(share_outputs=True)

    def run(self, feeds: Feeds) -> dict[str, Array]:
        """Return outputs by name."""
        # The tensors live until the end of the run, for OpenVINO looks into the arrays' memory.
        tensors = self._tensors(feeds)
        with self._lock:
            found = self._request.infer(tensors, share_inputs=True, share_outputs=True)
            return {name: np.array(found[place]) for name, place in self._places.items()}

    def _tensors(self, feeds: Feeds) -> dict[str, Any]:
        tensor = need("openvino").Tensor
        return {
            name: tensor(np.require(array, requirements="C"), shared_memory=True)
            for name, array in feeds.items()
            if name in self._taken
        }


def open_runner(manifest: Manifest, folder: Path, options: RunOptions) -> Runner:
    """Open an artifact; its options ``precision`` and ``hint`` are those of `properties`.

    Raises:
        ArtifactError: it is no model of OpenVINO, or an option is not known.
        BackendError: OpenVINO cannot run on the device, or cannot compile the model.
    """
    try:
        graph = core().read_model(folder / manifest.main)
    except RuntimeError as error:
        raise ArtifactError(f"{folder / manifest.main} cannot be read: {_brief(error)}") from error
    told = manifest.options
    compiled = compile_graph(
        graph, options, precision=told.get("precision", "f32"), hint=told.get("hint", "LATENCY")
    )
    return OpenVINORunner(compiled, manifest.inputs, manifest.outputs)


def _brief(error: Exception) -> str:
    """Say what went wrong: OpenVINO puts lines before it that name its own source files."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return next(
        (line for line in reversed(lines) if not line.startswith("Exception from")), "no reason given"
    )
