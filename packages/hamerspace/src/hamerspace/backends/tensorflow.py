"""The backend of TensorFlow: TFLite in float and int8, frozen SavedModels, and pruning of Keras models."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, Final

from hamerspace.artifact import Manifest
from hamerspace.backends.base import BaseBackend, BuildContext, Built, Candidate, Verdict
from hamerspace.exceptions import BackendError, UnsupportedError
from hamerspace.models.info import ModelInfo
from hamerspace.runtimes.base import Runner, RunOptions

TFLITE: Final = "model.tflite"
KERAS: Final = "model.keras"

_TFLITE: Final = (
    Candidate(
        backend="tensorflow",
        technique="int8-static",
        forms=(".tflite",),
        goal="quantize",
        description="TFLite, int8 weights and activations, calibrated; inputs and outputs keep their dtypes",
        needs_calibration=True,
        bits=8,
        expected_speed=3.0,
    ),
    Candidate(
        backend="tensorflow",
        technique="int8-dynamic",
        forms=(".tflite",),
        goal="quantize",
        description="TFLite, int8 weights, and activations quantised as they come",
        bits=8,
        expected_speed=2.0,
    ),
    Candidate(
        backend="tensorflow",
        technique="fp16",
        forms=(".tflite",),
        goal="quantize",
        description="TFLite, weights stored in float16 and computed with in float32",
        bits=16,
        expected_speed=1.3,
    ),
    Candidate(
        backend="tensorflow",
        technique="fp32",
        forms=(".tflite",),
        goal="graph",
        description="TFLite, float32: operations fused, run by XNNPACK",
        expected_speed=1.3,
    ),
)
_SAVED_MODEL: Final = Candidate(
    backend="tensorflow",
    technique="saved-model",
    goal="graph",
    description="a SavedModel, frozen: weights become constants, and what follows from constants is folded",
    expected_speed=1.1,
)
_PRUNED: Final = Candidate(
    backend="tensorflow",
    technique="magnitude-50",
    forms=(".keras",),
    goal="prune",
    description="the smaller half of each layer's kernel becomes zero; a smaller file, and no faster",
    options={"amount": 0.5},
)
_TECHNIQUES: Final = (*_TFLITE, _SAVED_MODEL, _PRUNED)


class TensorFlowBackend(BaseBackend):
    """Models of TensorFlow in TensorFlow's own runtimes."""

    name: ClassVar[str] = "tensorflow"
    title: ClassVar[str] = "TensorFlow"
    modules: ClassVar[tuple[str, ...]] = ("tensorflow",)
    distributions: ClassVar[tuple[str, ...]] = ("tensorflow", "keras")
    extra: ClassVar[str] = "tensorflow"

    def supports_model(self, model_info: ModelInfo) -> Verdict:
        """Models of TensorFlow alone."""
        if model_info.framework != "tensorflow":
            return Verdict(
                False,
                f"it takes models of TensorFlow, and this one is of {model_info.framework}; TFLite has no "
                "importer for it",
            )
        if model_info.form not in ("keras", "saved_model"):
            return Verdict(False, f"it does not know models of the form {model_info.form!r}")
        return Verdict(True, "a model of TensorFlow")

    def candidates(self, model_info: ModelInfo, *, hardware: str = "cpu") -> list[Candidate]:
        """Recipes for the model: TFLite is for the CPU, and only Keras models have layers to prune."""
        if not self.supports_model(model_info):
            return []
        found = [*(() if hardware in ("cuda", "gpu") else _TFLITE), _SAVED_MODEL]
        return [*found, _PRUNED] if model_info.form == "keras" else found

    def build(self, context: BuildContext) -> Built:
        """Convert or prune the model.

        Raises:
            UnsupportedError: there is no such technique, or it is not for this model.
            BackendError: TensorFlow cannot follow the model.
        """
        from hamerspace.runtimes.tensorflow import start

        technique = context.candidate.technique
        if technique not in {one.technique for one in _TECHNIQUES}:
            names = ", ".join(one.technique for one in _TECHNIQUES)
            raise UnsupportedError(f"backend tensorflow has no {technique!r}; it has {names}")
        start(RunOptions(device=context.device, threads=context.threads))
        if technique == _PRUNED.technique:
            return _build_pruned(context)
        if technique == _SAVED_MODEL.technique:
            return _build_saved_model(context)
        return _build_tflite(context)

    def open(self, manifest: Manifest, folder: Path, options: RunOptions) -> Runner:
        """Open an artifact of this backend."""
        from hamerspace.runtimes.tensorflow import open_runner

        return open_runner(manifest, folder, options)


def _build_tflite(context: BuildContext) -> Built:
    from hamerspace.backends._tensorflow_tflite import convert
    from hamerspace.models._saved_model_files import write_saved_model
    from hamerspace.runtimes.tensorflow import TFLiteRunner

    technique, info = context.candidate.technique, context.info
    if technique == "int8-static" and not context.calibration:
        raise BackendError("tensorflow/int8-static needs calibration data, and there is none")
    # From constants: the converter leaves the variables of a Keras model behind, and its weights with them.
    exported = context.once("frozen", lambda folder: write_saved_model(_frozen(context), folder))
    content, notes = convert(exported, technique, context.calibration or ())
    (context.folder / TFLITE).write_bytes(content)
    runner = TFLiteRunner(content, info.inputs, info.outputs, RunOptions(threads=context.threads))
    return Built(runtime="tflite", main=TFLITE, alone=(TFLITE,), run=runner.run, notes=notes)


def _build_saved_model(context: BuildContext) -> Built:
    from hamerspace.models._saved_model_files import write_saved_model

    traced = _frozen(context)
    write_saved_model(traced, context.folder)
    return Built(runtime="saved_model", main=".", run=_runner(traced, context))


def _frozen(context: BuildContext) -> Any:
    from hamerspace.models._tensorflow_graph import trace_frozen
    from hamerspace.models.tensorflow import traced_of

    return trace_frozen(traced_of(context.source), context.info.inputs)


def _build_pruned(context: BuildContext) -> Built:
    from hamerspace.backends._tensorflow_prune import pruned_copy, save_compressed
    from hamerspace.models.tensorflow import trace_model

    if context.info.form != "keras":
        raise UnsupportedError("only a Keras model of Keras's own layers has kernels that can be told apart")
    info = context.info
    model, note = pruned_copy(context.source.load(), context.candidate.options["amount"])
    save_compressed(model, context.folder / KERAS)
    traced = trace_model(model, info.inputs, info.outputs, info.structure)
    return Built(runtime="keras", main=KERAS, alone=(KERAS,), run=_runner(traced, context), notes=(note,))


def _runner(traced: Any, context: BuildContext) -> Any:
    from hamerspace.runtimes.tensorflow import FunctionRunner

    options = RunOptions(device=context.device, threads=context.threads)
    return FunctionRunner(traced, context.info.inputs, context.info.outputs, options).run
