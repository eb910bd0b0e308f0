"""What an optimisation is to do."""

from __future__ import annotations

from enum import StrEnum
from typing import Any

from hamerspace.exceptions import ConstraintError


class OptimizationGoal(StrEnum):
    """Goals of `Optimizer.optimize`."""

    QUANTIZE = "quantize"
    """Fewer bits: the best of the measured quantised forms."""
    PRUNE = "prune"
    """Fewer weights."""
    DISTILL = "distill"
    """A smaller model that learns from this one."""
    AUTO = "auto"
    """The best of everything that is measured."""


def goal_of(value: Any) -> OptimizationGoal:
    """Read a goal or its name.

    Raises:
        ConstraintError: there is no such goal.
    """
    try:
        return OptimizationGoal(value.lower() if isinstance(value, str) else value)
    except ValueError:
        known = ", ".join(one.value for one in OptimizationGoal)
        raise ConstraintError(f"goal is {value!r}; it may be {known}") from None
