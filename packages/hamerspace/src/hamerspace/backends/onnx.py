"""ONNX: models exported to the standard's own operators, which any of its runtimes opens."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from hamerspace.artifact import Manifest
from hamerspace.backends._onnx_files import converted, finish
from hamerspace.backends._onnx_float16 import in_half, with_half_weights
from hamerspace.backends._onnx_fusion import folded
from hamerspace.backends.base import BaseBackend, BuildContext, Built, Candidate, Verdict
from hamerspace.exceptions import UnsupportedError
from hamerspace.models.info import ModelInfo
from hamerspace.runtimes.base import Runner, RunOptions
from hamerspace.runtimes.onnxruntime import open_runner


class ONNXBackend(BaseBackend):
    """Export to ONNX, in float32 and float16, with constants folded; ONNX Runtime runs the result.

    Nothing it writes is tied to this machine or to ONNX Runtime. Quantisation and fusions that are ONNX
    Runtime's own are `ONNXRuntimeBackend`'s.
    """

    name: ClassVar[str] = "onnx"
    title: ClassVar[str] = "ONNX"
    modules: ClassVar[tuple[str, ...]] = ("onnx", "onnxruntime", "onnxscript")
    distributions: ClassVar[tuple[str, ...]] = ("onnx", "onnxruntime", "onnxscript")
    extra: ClassVar[str] = "onnxruntime"

    def supports_model(self, model_info: ModelInfo) -> Verdict:
        """Every framework's models can be exported; whether this one can shows when it is."""
        return Verdict(True, f"models of {model_info.framework} can be exported to ONNX")

    def candidates(self, model_info: ModelInfo, *, hardware: str = "cpu") -> list[Candidate]:
        """Return the recipes; calculation in float16 comes first where there is a GPU to do it."""
        offered = [
            Candidate(
                backend=self.name,
                technique="fp16-weight",
                forms=(".onnx",),
                goal="quantize",
                description="weights stored in float16, calculation in float32",
                bits=16,
                expected_speed=2.0,
            ),
            Candidate(
                backend=self.name,
                technique="fp16",
                forms=(".onnx",),
                goal="quantize",
                description="weights and calculation in float16",
                bits=16,
                expected_speed=3.0 if hardware in ("gpu", "cuda") else 1.0,
                tolerance=1e-2,
            ),
            Candidate(
                backend=self.name,
                technique="graph",
                forms=(".onnx",),
                goal="graph",
                description="constants folded, shapes inferred, what is superfluous taken out",
                expected_speed=2.0,
            ),
            Candidate(
                backend=self.name,
                technique="fp32",
                forms=(".onnx",),
                goal="graph",
                description="as it is, without records that no runtime needs"
                if model_info.framework == "onnx"
                else "exported as it is",
                expected_speed=1.9,
            ),
        ]
        return sorted(offered, key=lambda one: -one.expected_speed)

    def build(self, context: BuildContext) -> Built:
        """Export, and change what the technique says."""
        technique = context.candidate.technique
        if technique == "fp32":
            return finish(context, converted(context))
        if technique == "graph":
            return finish(context, folded(converted(context)))
        if technique == "fp16-weight":
            return finish(context, with_half_weights(folded(converted(context))))
        if technique == "fp16":
            notes = ("ONNX Runtime calculates in float32 on CPUs where it has no kernel for float16",)
            return finish(context, in_half(folded(converted(context))), notes=notes)
        raise UnsupportedError(f"backend {self.name} has no technique {technique!r}")

    def open(self, manifest: Manifest, folder: Path, options: RunOptions) -> Runner:
        """Open an artifact with ONNX Runtime."""
        return open_runner(manifest, folder, options)
