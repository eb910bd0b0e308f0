"""ONNX Runtime: quantisation, and graphs fused for it."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any, ClassVar

from hamerspace.artifact import Manifest
from hamerspace.backends._onnx_files import finish
from hamerspace.backends._onnx_fusion import attention_unpacked, fused
from hamerspace.backends._onnx_norms import with_faster_norms
from hamerspace.backends._onnx_quantize import quantize_dynamic, quantize_static, quantize_weights
from hamerspace.backends.base import BaseBackend, BuildContext, Built, Candidate, Verdict
from hamerspace.exceptions import BackendError, UnsupportedError
from hamerspace.models import onnx
from hamerspace.models.info import ModelInfo
from hamerspace.runtimes.base import Runner, RunOptions
from hamerspace.runtimes.onnxruntime import open_runner, open_session


class ONNXRuntimeBackend(BaseBackend):
    """ONNX Runtime's own optimisation and quantisation, after fusions by onnxscript.

    What it writes uses operators of the domain ``com.microsoft``, which other runtimes of ONNX may not have.
    """

    name: ClassVar[str] = "onnx_runtime"
    title: ClassVar[str] = "ONNX Runtime"
    modules: ClassVar[tuple[str, ...]] = ("onnx", "onnxruntime", "onnxscript")
    distributions: ClassVar[tuple[str, ...]] = ("onnx", "onnxruntime", "onnxscript")
    extra: ClassVar[str] = "onnxruntime"

    def supports_model(self, model_info: ModelInfo) -> Verdict:
        """Every framework's models can be exported to ONNX; whether this one can shows when it is."""
        return Verdict(True, f"models of {model_info.framework} can be exported to ONNX")

    def candidates(self, model_info: ModelInfo, *, hardware: str = "cpu") -> list[Candidate]:
        """Return the recipes. Token ids speak against static ranges; GPUs have kernels for blocks alone."""
        tokens = any(spec.is_integer for spec in model_info.inputs)
        offered = [
            Candidate(
                backend=self.name,
                technique="int8-static",
                forms=(".onnx",),
                goal="quantize",
                description="weights in int8 by channel, activations in uint8 with ranges from calibration",
                needs_calibration=True,
                bits=8,
                expected_speed=2.5 if tokens else 6.0,
                options={"method": "minmax", "reduce_range": False},
                tolerance=1e-2,
            ),
            Candidate(
                backend=self.name,
                technique="int8-dynamic",
                forms=(".onnx",),
                goal="quantize",
                description="weights in int8 by channel, embeddings by row, activations as they come",
                bits=8,
                expected_speed=4.3 if tokens else 3.5,
                options={"reduce_range": False},
                tolerance=1e-2,
            ),
            Candidate(
                backend=self.name,
                technique="int8-weight",
                forms=(".onnx",),
                goal="quantize",
                description="weights of matrix products in 8 bits by blocks, embeddings by row",
                bits=8,
                expected_speed=3.0,
                options={"block_size": 128},
                tolerance=1e-2,
            ),
            Candidate(
                backend=self.name,
                technique="int4-weight",
                forms=(".onnx",),
                goal="quantize",
                description="weights of matrix products in 4 bits by blocks, embeddings in 8 by row",
                bits=4,
                expected_speed=2.8,
                options={"block_size": 32},
                tolerance=1e-2,
            ),
            Candidate(
                backend=self.name,
                technique="graph",
                forms=(".onnx",),
                goal="graph",
                description="operators fused, the graph optimised for this processor and saved so",
                expected_speed=2.2,
            ),
        ]
        if hardware in ("gpu", "cuda"):
            offered = [one for one in offered if one.technique in ("graph", "int8-weight", "int4-weight")]
        return sorted(offered, key=lambda one: -one.expected_speed)

    def build(self, context: BuildContext) -> Built:
        """Convert to ONNX, fuse, and quantise or optimise as the technique says.

        Raises:
            BackendError: the model cannot be converted, or has nothing that the technique could change.
        """
        technique, options = context.candidate.technique, context.candidate.options
        if technique == "graph":
            return self._optimised(context)
        plain = attention_unpacked(fused(context))
        model = type(plain)()
        model.CopyFrom(plain)
        if technique == "int8-dynamic":
            quantized = quantize_dynamic(model, reduce_range=options["reduce_range"])
        elif technique == "int8-static":
            if not context.calibration:
                raise BackendError(f"{context.candidate.name} needs calibration data")
            quantized = quantize_static(
                model, context.calibration, method=options["method"], reduce_range=options["reduce_range"]
            )
        elif technique in ("int8-weight", "int4-weight"):
            bits = 8 if technique == "int8-weight" else 4
            quantized = quantize_weights(model, bits=bits, block_size=options["block_size"])
        else:
            raise UnsupportedError(f"backend {self.name} has no technique {technique!r}")
        return finish(context, with_faster_norms(context, quantized, plain))

    def open(self, manifest: Manifest, folder: Path, options: RunOptions) -> Runner:
        """Open an artifact."""
        return open_runner(manifest, folder, options)

    def _optimised(self, context: BuildContext) -> Built:
        model: Any = fused(context)
        model = with_faster_norms(context, model, model)
        with tempfile.TemporaryDirectory(prefix="hamerspace-") as room:
            source, target = Path(room) / "fused.onnx", Path(room) / "optimised.onnx"
            onnx.save(model, source)
            open_session(source, RunOptions(device=context.device, threads=context.threads), save_to=target)
            optimised = onnx.open_model(target)
        return finish(
            context,
            optimised,
            level="none",
            notes=("the graph is laid out for the instructions of this processor; make it anew for another",),
        )
