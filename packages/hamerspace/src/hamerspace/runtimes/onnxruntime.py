"""ONNX Runtime: ``.onnx`` files on CPUs, and on CUDA with onnxruntime-gpu."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final, Literal, get_args

from hamerspace._imports import need
from hamerspace.artifact import Manifest
from hamerspace.exceptions import ArtifactError, BackendError
from hamerspace.models.info import Array, Feeds, TensorSpec
from hamerspace.runtimes.base import Runner, RunOptions

Level = Literal["none", "basic", "extended", "all"]
"""How far ONNX Runtime optimises a graph when it opens a model."""
_LEVELS: Final = {
    "none": "ORT_DISABLE_ALL",
    "basic": "ORT_ENABLE_BASIC",
    "extended": "ORT_ENABLE_EXTENDED",
    "all": "ORT_ENABLE_ALL",
}
_PROVIDERS: Final = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
_ERRORS_ONLY: Final = 3


def open_session(
    model: Path | bytes, options: RunOptions, *, level: Level = "all", save_to: Path | None = None
) -> Any:
    """Open an ``onnxruntime.InferenceSession``.

    Threads wait without spinning, so that processor time is what the work takes.

    Args:
        model: a file, or what a file would hold.
        options: device and threads.
        level: of graph optimisation.
        save_to: writes the optimised model there.

    Raises:
        BackendError: the installed ONNX Runtime does not know the device, or cannot open the model.
    """
    ort = need("onnxruntime")
    provider = _PROVIDERS.get(options.device)
    if provider is None or provider not in ort.get_available_providers():
        raise BackendError(
            f"the installed ONNX Runtime cannot run on {options.device}; it has "
            f"{', '.join(ort.get_available_providers())}"
        )
    settings = ort.SessionOptions()
    settings.log_severity_level = _ERRORS_ONLY
    settings.graph_optimization_level = getattr(ort.GraphOptimizationLevel, _LEVELS[level])
    settings.intra_op_num_threads = options.threads or 0
    settings.inter_op_num_threads = 1
    settings.add_session_config_entry("session.intra_op.allow_spinning", "0")
    settings.add_session_config_entry("session.inter_op.allow_spinning", "0")
    if save_to is not None:
        settings.optimized_model_filepath = str(save_to)
    providers = [provider] if options.device == "cpu" else [provider, _PROVIDERS["cpu"]]
    try:
        return ort.InferenceSession(
            str(model) if isinstance(model, Path) else model, settings, providers=providers
        )
    except Exception as error:
        what = model.name if isinstance(model, Path) else "the model"
        raise BackendError(f"ONNX Runtime cannot open {what}: {error}") from error


class OnnxRunner(Runner):
    """A session of ONNX Runtime."""

    def __init__(
        self,
        session: Any,
        inputs: tuple[TensorSpec, ...],
        outputs: tuple[TensorSpec, ...],
        device: str = "cpu",
    ) -> None:
        self.inputs, self.outputs = inputs, outputs
        self._session = session
        self._device = device
        self._taken = {one.name for one in session.get_inputs()}
        self._names = [one.name for one in session.get_outputs()]

    def prepare(self, feeds: Feeds) -> Any:
        """Return inputs on the device and outputs to be made there, bound once.

        An input that the graph does not use is left out.
        """
        make = need("onnxruntime").OrtValue.ortvalue_from_numpy
        binding = self._session.io_binding()
        for name, array in feeds.items():
            if name in self._taken:
                binding.bind_ortvalue_input(name, make(array, self._device, 0))
        for name in self._names:
            binding.bind_output(name, self._device)
        return binding

    def run_prepared(self, prepared: Any) -> Any:
        """Run once and return the binding, which holds the outputs."""
        self._session.run_with_iobinding(prepared)
        return prepared

    def run(self, feeds: Feeds) -> dict[str, Array]:
        """Return outputs by name."""
        given = {name: array for name, array in feeds.items() if name in self._taken}
        found = dict(zip(self._names, self._session.run(self._names, given), strict=True))
        if self.outputs and not all(spec.name in found for spec in self.outputs):
            return dict(zip([spec.name for spec in self.outputs], found.values(), strict=True))
        return {spec.name: found[spec.name] for spec in self.outputs} if self.outputs else found


def open_runner(manifest: Manifest, folder: Path, options: RunOptions) -> Runner:
    """Open an artifact; its option ``level`` says how far its graph is still to be optimised.

    Raises:
        ArtifactError: ``level`` is none that is known.
        BackendError: ONNX Runtime cannot open it.
    """
    level = manifest.options.get("level", "all")
    if level not in get_args(Level):
        raise ArtifactError(f"the artifact's level is {level!r}; there are {', '.join(get_args(Level))}")
    session = open_session(folder / manifest.main, options, level=level)
    return OnnxRunner(session, manifest.inputs, manifest.outputs, options.device)
