"""Optimum: folders of Hugging Face, for OpenVINO by optimum-intel or for ONNX Runtime by optimum-onnx."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, Final

from hamerspace._imports import PACKAGES, has
from hamerspace.artifact import Manifest
from hamerspace.backends.base import BaseBackend, BuildContext, Built, Candidate, Verdict
from hamerspace.exceptions import UnsupportedError
from hamerspace.models.info import ModelInfo
from hamerspace.runtimes.base import Runner, RunOptions

_HALVES: Final = {"optimum.intel": "openvino", "optimum.onnxruntime": "onnxruntime"}
_CPU: Final = ("cpu", "edge", "arm")


class OptimumBackend(BaseBackend):
    """Hugging Face's exporters, quantisers and optimisers.

    optimum-intel and optimum-onnx need different versions of Optimum and transformers, so an environment has
    one of the two, and candidates are those of the one that is there. What is built is a folder that
    ``OVModelFor...`` or ``ORTModelFor...`` opens, and that runs here without Optimum.
    """

    name: ClassVar[str] = "optimum"
    title: ClassVar[str] = "Hugging Face Optimum"
    modules: ClassVar[tuple[str, ...]] = ("transformers", *_HALVES)
    distributions: ClassVar[tuple[str, ...]] = (
        "optimum",
        "optimum-intel",
        "optimum-onnx",
        "transformers",
        "openvino",
        "nncf",
        "onnxruntime",
    )
    extra: ClassVar[str] = "optimum"

    def is_available(self) -> Verdict:
        """Whether one of the two is installed, and which; one is enough."""
        there = _halves_there()
        if not there or not has("transformers"):
            return Verdict(
                False,
                "neither optimum-intel nor optimum-onnx is installed; run: pip install "
                f"{PACKAGES['optimum.intel']}, or, in an environment of its own: pip install "
                f"{PACKAGES['optimum.onnxruntime']}",
            )
        names = {"optimum.intel": "optimum-intel", "optimum.onnxruntime": "optimum-onnx"}
        shown = ", ".join(f"{name} {number}" for name, number in self.versions().items())
        absent = [names[module] for module in _HALVES if module not in there]
        return Verdict(
            True, shown + (f"; without {absent[0]}, which needs another environment" if absent else "")
        )

    def supports_model(self, model_info: ModelInfo) -> Verdict:
        """Whether it is a folder of transformers; which architectures are known shows in the build."""
        if model_info.form != "transformers":
            return Verdict(
                False,
                f"the model is {model_info.form}, and Optimum takes folders of transformers (config.json "
                "with model.safetensors)",
            )
        return Verdict(True, "a folder of transformers")

    def candidates(self, model_info: ModelInfo, *, hardware: str = "cpu") -> list[Candidate]:
        """Return the recipes of what is installed, for CPUs; there are none for GPUs."""
        if hardware not in _CPU or not self.supports_model(model_info):
            return []
        there = _halves_there()
        return [one for module, offered in _CANDIDATES.items() if module in there for one in offered]

    def build(self, context: BuildContext) -> Built:
        """Export, compress and save as a folder of Optimum's.

        Raises:
            UnsupportedError: Optimum cannot export the model, calibration data are missing, or the half of
                Optimum that the technique belongs to is not installed.
        """
        technique = context.candidate.technique
        module = "optimum.intel" if technique.startswith("ov-") else "optimum.onnxruntime"
        if module not in _halves_there():
            raise UnsupportedError(f"{context.candidate.name} needs: pip install {PACKAGES[module]}")
        if module == "optimum.intel":
            from hamerspace.backends import _optimum_openvino as half
        else:
            from hamerspace.backends import _optimum_onnx as half
        return half.build(context)

    def open(self, manifest: Manifest, folder: Path, options: RunOptions) -> Runner:
        """Open what `build` made, by OpenVINO or ONNX Runtime themselves."""
        from hamerspace.runtimes.opening import open_runtime

        return open_runtime(manifest, folder, options)


def _halves_there() -> list[str]:
    return [module for module, runtime in _HALVES.items() if has(module) and has(runtime)]


_CANDIDATES: Final = {
    "optimum.intel": (
        Candidate(
            backend="optimum",
            technique="ov-int8-static",
            forms=(".xml",),
            goal="quantize",
            description="OVQuantizer: int8 weights and activations on calibration data",
            needs_calibration=True,
            bits=8,
            expected_speed=6.0,
            options={"precision": "bf16", "activations": True},
        ),
        Candidate(
            backend="optimum",
            technique="ov-int8-weight",
            forms=(".xml",),
            goal="quantize",
            description="OVQuantizer: int8 weights; activations in bfloat16 where the CPU has it",
            bits=8,
            expected_speed=4.6,
            options={"precision": "bf16", "weight_bits": 8},
        ),
        Candidate(
            backend="optimum",
            technique="ov-int4-weight",
            forms=(".xml",),
            goal="quantize",
            description="OVQuantizer: int4 matrices, int8 embeddings; activations as in ov-int8-weight",
            bits=4,
            expected_speed=4.5,
            options={"precision": "bf16", "weight_bits": 4},
        ),
        Candidate(
            backend="optimum",
            technique="ov-fp32",
            forms=(".xml",),
            goal="graph",
            description="exported to OpenVINO in float32",
            expected_speed=2.4,
        ),
    ),
    "optimum.onnxruntime": (
        Candidate(
            backend="optimum",
            technique="ort-int8-dynamic",
            forms=(".onnx",),
            goal="quantize",
            description="ORTQuantizer: int8 weights a channel, activations quantised as they come",
            bits=8,
            expected_speed=4.0,
        ),
        Candidate(
            backend="optimum",
            technique="ort-graph",
            forms=(".onnx",),
            goal="graph",
            description="ORTOptimizer: attention, normalisation and activations fused, in float32",
            expected_speed=2.2,
        ),
        Candidate(
            backend="optimum",
            technique="ort-fp32",
            forms=(".onnx",),
            goal="graph",
            description="exported to ONNX in float32",
            expected_speed=1.9,
        ),
    ),
}
