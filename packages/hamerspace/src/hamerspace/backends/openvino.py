"""OpenVINO: models of torch, TensorFlow and ONNX on Intel's and other x86 CPUs, quantised by NNCF."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, Final

from hamerspace._imports import need
from hamerspace.artifact import Manifest
from hamerspace.backends.base import BaseBackend, BuildContext, Built, Candidate, Verdict
from hamerspace.exceptions import UnsupportedError
from hamerspace.models.info import ModelInfo
from hamerspace.runtimes.base import Runner, RunOptions

_MAIN: Final = "model.xml"
_ALONE: Final = (_MAIN, "model.bin")
_CPU: Final = ("cpu", "edge", "arm")


class OpenVINOBackend(BaseBackend):
    """Conversion to OpenVINO, NNCF's quantisation of the converted graph, and inference in bfloat16.

    What is not quantised runs in float32 for ``fp32`` and ``fp16-weights``, and in bfloat16 for all others
    where the CPU has it; the option ``precision`` (``f32`` or ``bf16``) says otherwise. The option ``hint``
    is OpenVINO's performance hint, ``LATENCY`` by default.
    """

    name: ClassVar[str] = "openvino"
    title: ClassVar[str] = "OpenVINO"
    modules: ClassVar[tuple[str, ...]] = ("openvino", "nncf")
    distributions: ClassVar[tuple[str, ...]] = ("openvino", "nncf")
    extra: ClassVar[str] = "openvino"

    def supports_model(self, model_info: ModelInfo) -> Verdict:
        """Say which road leads from the model's framework; whether it does shows when it is taken."""
        through = {"pytorch": "torch.export or ONNX", "tensorflow": "SavedModel or ONNX", "onnx": "ONNX"}
        return Verdict(True, f"by {through[model_info.framework]}")

    def candidates(self, model_info: ModelInfo, *, hardware: str = "cpu") -> list[Candidate]:
        """Return every recipe for CPUs; there are none for GPUs."""
        offered = hardware in _CPU and self.supports_model(model_info)
        return list(_CANDIDATES) if offered else []

    def build(self, context: BuildContext) -> Built:
        """Convert, compress, and save as ``model.xml`` with ``model.bin``.

        Raises:
            BackendError: the model cannot be converted or compiled.
            UnsupportedError: the technique needs calibration data, a validation function or a CPU that is not
                there.
        """
        from hamerspace.backends._openvino_convert import graph_of, inputs_of
        from hamerspace.backends._openvino_quiet import quiet
        from hamerspace.runtimes.openvino import OpenVINORunner, compile_graph

        candidate, info = context.candidate, context.info
        _check(context)
        graph = _COMPRESSIONS[candidate.technique](context, graph_of(context))
        inputs = inputs_of(graph, info.inputs)
        told = {name: str(candidate.options[name]) for name in _AS_IT_IS}
        options = RunOptions(threads=context.threads)
        run = OpenVINORunner(compile_graph(graph, options, **told), inputs, info.outputs).run
        with quiet():
            need("openvino").save_model(
                graph,
                context.folder / _MAIN,
                compress_to_fp16=bool(candidate.options.get("half_weights", False)),
            )
        return Built(runtime="openvino", main=_MAIN, options=told, alone=_ALONE, run=run, inputs=inputs)

    def open(self, manifest: Manifest, folder: Path, options: RunOptions) -> Runner:
        """Open what `build` made."""
        from hamerspace.runtimes.openvino import open_runner

        return open_runner(manifest, folder, options)


def _check(context: BuildContext) -> None:
    from hamerspace.runtimes.openvino import has_bfloat16

    candidate = context.candidate
    if candidate.needs_calibration and not context.calibration:
        raise UnsupportedError(f"{candidate.name} needs calibration data; give validation_data")
    if candidate.technique == "int8-accuracy" and context.evaluate is None:
        raise UnsupportedError(
            f"{candidate.name} needs to be told the accuracy; give validation_fn or labels"
        )
    if candidate.technique == "bf16" and not has_bfloat16():
        raise UnsupportedError("this CPU does not multiply in bfloat16, which makes bf16 the same as fp32")


def _keep(_: BuildContext, graph: Any) -> Any:
    return graph


def _int8_static(context: BuildContext, graph: Any) -> Any:
    from hamerspace.backends._openvino_compress import quantize

    return quantize(graph, context.calibration or ())


def _int8_accuracy(context: BuildContext, graph: Any) -> Any:
    from hamerspace.backends._openvino_compress import quantize_with_control
    from hamerspace.runtimes.openvino import OpenVINORunner

    def evaluate(compiled: Any) -> float:
        assert context.evaluate is not None  # noqa: S101 - `_check` has seen to it
        return context.evaluate(OpenVINORunner(compiled, context.info.inputs, context.info.outputs))

    drop = 0.01 if context.max_accuracy_drop is None else context.max_accuracy_drop
    rounds = context.candidate.options["max_iterations"]
    return quantize_with_control(
        graph, context.calibration or (), evaluate, max_drop=drop, max_iterations=rounds
    )


def _int8_weight(_: BuildContext, graph: Any) -> Any:
    from hamerspace.backends._openvino_compress import compress_to_int8

    return compress_to_int8(graph)


def _int4_weight(context: BuildContext, graph: Any) -> Any:
    from hamerspace.backends._openvino_compress import compress_to_int4

    return compress_to_int4(graph, context.calibration, context.candidate.options["group_size"])


_COMPRESSIONS: Final[dict[str, Callable[[BuildContext, Any], Any]]] = {
    "int8-static": _int8_static,
    "int8-accuracy": _int8_accuracy,
    "int8-weight": _int8_weight,
    "int4-weight": _int4_weight,
    "bf16": _keep,
    "fp16-weights": _keep,
    "fp32": _keep,
}

_AS_IT_IS: Final = {"precision": "f32", "hint": "LATENCY"}
"""What the runtime is told: OpenVINO's ``INFERENCE_PRECISION_HINT`` and ``PERFORMANCE_HINT``."""
_IN_BFLOAT16: Final = {**_AS_IT_IS, "precision": "bf16"}

# Saved halves differ from what was compiled before saving by half a unit in the last of 11 bits a weight; in
# bfloat16 sums may round to the neighbouring one of 8 bits.
_CANDIDATES: Final = (
    Candidate(
        backend="openvino",
        technique="int8-static",
        forms=(".xml",),
        goal="quantize",
        description="int8 weights, embeddings and activations, by NNCF on calibration data",
        needs_calibration=True,
        bits=8,
        expected_speed=6.0,
        options={**_IN_BFLOAT16},
    ),
    Candidate(
        backend="openvino",
        technique="int8-accuracy",
        forms=(".xml",),
        goal="quantize",
        description="int8-static, with operations put back until the accuracy holds",
        needs_calibration=True,
        bits=8,
        expected_speed=5.5,
        options={**_IN_BFLOAT16, "max_iterations": 20},
    ),
    Candidate(
        backend="openvino",
        technique="int8-weight",
        forms=(".xml",),
        goal="quantize",
        description="int8 weights and embeddings; activations in bfloat16 where the CPU has it",
        bits=8,
        expected_speed=4.6,
        options={**_IN_BFLOAT16},
    ),
    Candidate(
        backend="openvino",
        technique="int4-weight",
        forms=(".xml",),
        goal="quantize",
        description="int4 matrices in groups, int8 embeddings; activations in bfloat16 where the CPU has it",
        bits=4,
        expected_speed=4.5,
        options={**_IN_BFLOAT16, "group_size": 128},
    ),
    Candidate(
        backend="openvino",
        technique="bf16",
        forms=(".xml",),
        goal="quantize",
        description="inference in bfloat16, weights stored as float16",
        bits=16,
        expected_speed=4.4,
        options={**_IN_BFLOAT16, "half_weights": True},
        tolerance=5e-2,
    ),
    Candidate(
        backend="openvino",
        technique="fp16-weights",
        forms=(".xml",),
        goal="quantize",
        description="weights stored as float16, inference in float32",
        bits=16,
        expected_speed=2.4,
        options={**_AS_IT_IS, "half_weights": True},
        tolerance=1e-2,
    ),
    Candidate(
        backend="openvino",
        technique="fp32",
        forms=(".xml",),
        goal="graph",
        description="converted and fused, in float32",
        expected_speed=2.4,
        options=_AS_IT_IS,
    ),
)
