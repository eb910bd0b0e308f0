"""What a strategy is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, NamedTuple

from hamerspace.backends.base import Artifact
from hamerspace.backends.registry import Backend
from hamerspace.models.info import ModelInfo


class Impact(NamedTuple):
    """What a strategy may be expected to do to size and latency, in the units that were given."""

    size: float
    latency: float


class OptimizationStrategy(ABC):
    """A kind of optimisation.

    `apply` makes an artifact and proves nothing; `hamerspace.Optimizer` tries, proves and measures.
    """

    @abstractmethod
    def apply(
        self,
        model: Any,
        model_info: ModelInfo | None = None,
        *,
        backend: Backend | str = Backend.PYTORCH,
        calibration_data: Any = None,
        output: str | Path | None = None,
    ) -> Artifact:
        """Optimise a model.

        Args:
            model: a live model, or the path of one.
            model_info: what `hamerspace.Optimizer` found out; needed for a live model.
            backend: who does it.
            calibration_data: see `hamerspace.Optimizer.optimize`.
            output: the artifact's folder; a temporary one by default, which goes with what is returned.

        Raises:
            UnsupportedError: the backend cannot do this to this model.
            BackendUnavailableError: its libraries are missing.
        """

    @abstractmethod
    def estimate_impact(self, size: float, latency: float) -> Impact:
        """Guess size and latency afterwards from those before. A guess: only a measurement tells."""
