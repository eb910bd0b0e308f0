"""The user's side: `Optimizer`, constraints, goals, results and reports."""

from hamerspace.core.config import OptimizationConfig
from hamerspace.core.constraints import Constraints
from hamerspace.core.goals import OptimizationGoal
from hamerspace.core.optimizer import Optimizer
from hamerspace.core.report import CompressionReport
from hamerspace.core.result import OptimizationResult

__all__ = [
    "CompressionReport",
    "Constraints",
    "OptimizationConfig",
    "OptimizationGoal",
    "OptimizationResult",
    "Optimizer",
]
