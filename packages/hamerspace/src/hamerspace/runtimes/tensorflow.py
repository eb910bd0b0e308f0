"""TensorFlow's runtimes: TFLite, SavedModels, and Keras models as compiled functions."""

from __future__ import annotations

from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np

from hamerspace._arrays import as_array
from hamerspace.artifact import Manifest
from hamerspace.exceptions import ArtifactError, BackendUnavailableError, ModelError, UnsupportedError
from hamerspace.models._tensorflow_graph import SIGNATURE, Traced
from hamerspace.models.info import Array, Feeds, TensorSpec
from hamerspace.runtimes._tensorflow_library import quiet, tensorflow, use_threads
from hamerspace.runtimes._tflite_files import check_whole
from hamerspace.runtimes.base import Runner, RunOptions


def open_runner(manifest: Manifest, folder: Path, options: RunOptions) -> Runner:
    """Open an artifact's main file.

    Raises:
        ArtifactError: TensorFlow cannot read it, or it has other inputs and outputs than the manifest says.
        UnsupportedError: TFLite on another device than the CPU.
        BackendUnavailableError: TensorFlow sees no such device.
    """
    path = folder if manifest.main == "." else folder / manifest.main
    if manifest.runtime == "tflite":
        return TFLiteRunner(path, manifest.inputs, manifest.outputs, options)
    start(options)
    from hamerspace.models import tensorflow as models
    from hamerspace.models._keras_files import open_keras
    from hamerspace.models._saved_model_files import open_saved_model

    try:
        model = open_keras(path) if manifest.runtime == "keras" else open_saved_model(path)
        traced = models.trace_model(model, manifest.inputs, manifest.outputs, manifest.structure)
    except (ModelError, ValueError) as error:
        raise ArtifactError(f"{path} cannot be opened: {error}") from error
    return FunctionRunner(traced, manifest.inputs, manifest.outputs, options)


def start(options: RunOptions) -> None:
    """Settle threads and look for the device, before TensorFlow's first operation.

    Raises:
        BackendUnavailableError: TensorFlow sees no such device.
    """
    use_threads(options.threads)
    if options.device != "cpu" and not tensorflow().config.list_physical_devices("GPU"):
        raise BackendUnavailableError(
            'TensorFlow sees no GPU; run: pip install "tensorflow[and-cuda]", or take the device cpu'
        )


class FunctionRunner(Runner):
    """A compiled function of TensorFlow."""

    def __init__(
        self,
        traced: Traced,
        inputs: tuple[TensorSpec, ...],
        outputs: tuple[TensorSpec, ...],
        options: RunOptions,
    ) -> None:
        self.inputs, self.outputs = inputs, outputs or traced.outputs
        # The function alone would not keep its variables.
        self._traced = traced
        # Where there is nothing but the CPU, naming it at every call would only cost time.
        several = bool(tensorflow().config.list_physical_devices("GPU"))
        self._device = f"/{'CPU' if options.device == 'cpu' else 'GPU'}:0" if several else None

    def prepare(self, feeds: Feeds) -> list[Any]:
        """Return tensors on the device."""
        tf = tensorflow()
        with tf.device(self._device):
            return [tf.convert_to_tensor(feeds[spec.name], spec.dtype) for spec in self.inputs]

    def run_prepared(self, prepared: Any) -> Any:
        """Run once."""
        if self._device is None:
            return self._traced.function(*prepared)
        with tensorflow().device(self._device):
            given = self._traced.function(*prepared)
        # A GPU is waited for by fetching what it gave.
        return {name: tensor.numpy() for name, tensor in given.items()}

    def run(self, feeds: Feeds) -> dict[str, Array]:
        """Return outputs by name."""
        given = self.run_prepared(self.prepare(feeds))
        return {spec.name: as_array(given[spec.name]) for spec in self.outputs}


class TFLiteRunner(Runner):
    """A TFLite model in its own interpreter, with XNNPACK."""

    def __init__(
        self,
        model: Path | bytes,
        inputs: tuple[TensorSpec, ...],
        outputs: tuple[TensorSpec, ...],
        options: RunOptions,
    ) -> None:
        if options.device != "cpu":
            raise UnsupportedError(f"TFLite runs on the CPU, not on {options.device}")
        self.inputs, self.outputs = inputs, outputs
        held: dict[str, Any] = (
            {"model_content": model} if isinstance(model, bytes) else {"model_path": str(model)}
        )
        where = "the model" if isinstance(model, bytes) else str(model)
        lite = tensorflow().lite
        check_whole(model, where)
        try:
            with quiet(native=True):
                self._interpreter = lite.Interpreter(**held, num_threads=options.threads)
                self._takes, self._gives = self._signature()
                self._interpreter.allocate_tensors()
        except (ValueError, RuntimeError) as error:
            raise ArtifactError(f"{where} cannot be opened by TFLite: {error}") from error
        wanted = {spec.name for spec in inputs}, {spec.name for spec in outputs}
        if (set(self._takes), set(self._gives)) != wanted:
            raise ArtifactError(
                f"{where} has the inputs {sorted(self._takes)} and outputs {sorted(self._gives)}, and its "
                f"manifest names {sorted(wanted[0])} and {sorted(wanted[1])}"
            )
        self._shapes = {name: tuple(int(n) for n in one["shape"]) for name, one in self._takes.items()}
        # The interpreter holds inputs and outputs, and so serves one caller at a time.
        self._lock = Lock()

    def _signature(self) -> tuple[dict[str, Any], dict[str, Any]]:
        # The interpreter plans no memory while there is a runner of one of its signatures.
        signature = self._interpreter.get_signature_runner(SIGNATURE)
        return dict(signature.get_input_details()), dict(signature.get_output_details())

    def prepare(self, feeds: Feeds) -> dict[str, Array]:
        """Return arrays as the interpreter copies them."""
        return {name: np.require(feeds[name], requirements="C") for name in self._shapes}

    def run_prepared(self, prepared: Any) -> dict[str, Array]:
        """Run once; lengths that differ from the last call's make the interpreter plan its memory anew."""
        arrays: dict[str, Array] = prepared
        shapes = {name: array.shape for name, array in arrays.items()}
        if shapes != self._shapes:
            for name, shape in shapes.items():
                self._interpreter.resize_tensor_input(self._takes[name]["index"], shape)
            self._interpreter.allocate_tensors()
            self._shapes = shapes
        for name, array in arrays.items():
            self._interpreter.set_tensor(self._takes[name]["index"], array)
        self._interpreter.invoke()
        return {
            spec.name: self._interpreter.get_tensor(self._gives[spec.name]["index"]) for spec in self.outputs
        }

    def run(self, feeds: Feeds) -> dict[str, Array]:
        """Return outputs by name."""
        with self._lock:
            return self.run_prepared(self.prepare(feeds))
