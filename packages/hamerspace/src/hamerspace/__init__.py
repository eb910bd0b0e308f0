"""Compress any model under constraints, over many backends, and prove what comes out.

Heavy libraries are imported when a model or a backend needs them.
"""

from hamerspace.backends.base import Artifact, BaseBackend, BuildContext, Built, Candidate
from hamerspace.backends.registry import Backend, backend_names, get_backend
from hamerspace.core import (
    CompressionReport,
    Constraints,
    OptimizationConfig,
    OptimizationGoal,
    OptimizationResult,
    Optimizer,
)
from hamerspace.loading import load
from hamerspace.measure import Benchmarker, Fidelity, ModelMetrics
from hamerspace.models import ModelInfo, ModelSource, TensorSpec
from hamerspace.runtimes import LoadedModel, Runner

__version__ = "0.1.0"

__all__ = [
    "Artifact",
    "Backend",
    "BaseBackend",
    "Benchmarker",
    "BuildContext",
    "Built",
    "Candidate",
    "CompressionReport",
    "Constraints",
    "Fidelity",
    "LoadedModel",
    "ModelInfo",
    "ModelMetrics",
    "ModelSource",
    "OptimizationConfig",
    "OptimizationGoal",
    "OptimizationResult",
    "Optimizer",
    "Runner",
    "TensorSpec",
    "backend_names",
    "get_backend",
    "load",
]
