"""What the result has to meet."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from hamerspace.exceptions import ConstraintError
from hamerspace.measure.benchmarker import check_positive, hardware_of


@dataclass(frozen=True)
class Constraints:
    """Limits for the optimised model, and how it is measured. None is no limit.

    Raises:
        ConstraintError: a limit is not above 0, a share not within 0 and 1, or the hardware not known.
    """

    target_size_mb: float | None = None
    """Size of all files, in MB of 2**20 bytes, at most."""
    max_latency_ms: float | None = None
    """Median wall time of a call on this machine, at most."""
    max_accuracy_drop: float | None = None
    """Accuracy of the original less that of the result, at most; 0.02 is two points of a hundred. It takes
    validation data with labels, or a ``validation_fn``, to decide it.
    """
    target_hardware: str = "cpu"
    """``cpu``, ``gpu`` (the same as ``cuda``), or ``edge`` and ``arm``, which are measured on this machine's
    processor and labelled so.
    """
    batch_size: int = 1
    """Samples a call, when speed is measured."""
    calibration_samples: int = 100
    """Samples that ranges of activations are taken from, at most."""

    def __post_init__(self) -> None:
        for name in ("target_size_mb", "max_latency_ms"):
            value = getattr(self, name)
            if value is not None and (not _is_number(value) or not 0 < value < math.inf):
                raise ConstraintError(f"{name} is {value!r}; it is a number above 0, or None for no limit")
        drop = self.max_accuracy_drop
        if drop is not None and (not _is_number(drop) or not 0 <= drop <= 1):
            raise ConstraintError(
                f"max_accuracy_drop is {drop!r}; it lies within 0 and 1, as 0.02 for two points"
            )
        hardware_of(self.target_hardware)
        check_positive("batch_size", self.batch_size)
        check_positive("calibration_samples", self.calibration_samples)

    def has_size_constraint(self) -> bool:
        """Whether size is limited."""
        return self.target_size_mb is not None

    def has_latency_constraint(self) -> bool:
        """Whether latency is limited."""
        return self.max_latency_ms is not None

    def has_accuracy_constraint(self) -> bool:
        """Whether the loss of accuracy is limited."""
        return self.max_accuracy_drop is not None

    def to_dict(self) -> dict[str, Any]:
        """Return plain data."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Constraints:
        """Read what `to_dict` gave.

        Raises:
            ConstraintError: a name is not known, or a value is out of range.
        """
        known = {field.name for field in fields(cls)}
        if unknown := sorted(set(data) - known):
            raise ConstraintError(f"constraints {unknown} are not known; there are {sorted(known)}")
        return cls(**data)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and not math.isnan(value)
