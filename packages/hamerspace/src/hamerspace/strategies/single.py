"""Strategies that are one step of one backend."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Final, Literal

from hamerspace.backends.base import Artifact, BaseBackend
from hamerspace.backends.registry import Backend, get_backend
from hamerspace.exceptions import ConstraintError
from hamerspace.models.info import ModelInfo
from hamerspace.strategies.base import Impact, OptimizationStrategy

_QUANTIZED: Final = {
    "int8-dynamic": Impact(0.27, 0.5),
    "int8-static": Impact(0.27, 0.35),
    "int8-weight": Impact(0.27, 0.8),
    "int4-weight": Impact(0.18, 0.8),
}
"""Shares of size and latency that are left, rounded up from measurements of a sentence encoder and a small
convolutional network on one thread of an x86 processor.
"""


class _OneStep(OptimizationStrategy):
    method: ClassVar[Literal["quantize", "prune", "optimize_graph"]]

    def __init__(self, technique: str | None = None, options: Mapping[str, Any] | None = None) -> None:
        self.technique = technique
        self.options = dict(options or {})

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.technique!r})"

    def apply(
        self,
        model: Any,
        model_info: ModelInfo | None = None,
        *,
        backend: Backend | str = Backend.PYTORCH,
        calibration_data: Any = None,
        output: str | Path | None = None,
    ) -> Artifact:
        """Optimise a model by one backend; see `OptimizationStrategy.apply`."""
        found: BaseBackend = get_backend(backend)
        given: dict[str, Any] = {"technique": self.technique, "output": output, **self.options}
        if self.method == "quantize":
            given["calibration_data"] = calibration_data
        return getattr(found, self.method)(model, model_info, **given)


class QuantizationStrategy(_OneStep):
    """Fewer bits for weights, or for weights and activations.

    Args:
        technique: such as ``int8-dynamic``, ``int8-static`` (which takes calibration data), ``int8-weight``
            or ``int4-weight``; None leaves it to the backend.
        options: for the backend.
    """

    method = "quantize"

    def estimate_impact(self, size: float, latency: float) -> Impact:
        """Guess size and latency afterwards; see `OptimizationStrategy.estimate_impact`."""
        left = _QUANTIZED.get(self.technique or "int8-dynamic", Impact(0.27, 0.8))
        return Impact(size * left.size, latency * left.latency)


class PruningStrategy(_OneStep):
    """Weights of small magnitude are set to zero.

    Args:
        technique: of the backend; None takes its first.
        options: for the backend.
        amount: share of weights that become zero, above 0 and below 1.

    Zeros are stored like other numbers, so that neither size nor latency falls by itself; a compressed
    archive of the model is smaller.

    Raises:
        ConstraintError: ``amount`` is out of range.
    """

    method = "prune"

    def __init__(
        self,
        technique: str | None = None,
        options: Mapping[str, Any] | None = None,
        *,
        amount: float | None = None,
    ) -> None:
        if amount is not None and not 0 < amount < 1:
            raise ConstraintError(f"amount is {amount!r}; it lies above 0 and below 1")
        super().__init__(technique, {**(options or {}), **({} if amount is None else {"amount": amount})})

    def estimate_impact(self, size: float, latency: float) -> Impact:
        """Return what was given: zeros take as much room and time as other weights."""
        return Impact(size, latency)


class GraphOptimizationStrategy(_OneStep):
    """Operators are fused and constants folded, for one runtime.

    Args:
        technique: of the backend; None takes its first.
        options: for the backend.
    """

    method = "optimize_graph"

    def estimate_impact(self, size: float, latency: float) -> Impact:
        """Guess size and latency afterwards; see `OptimizationStrategy.estimate_impact`."""
        return Impact(size, latency * 0.6)
