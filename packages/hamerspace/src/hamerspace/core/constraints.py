"""What the result has to meet."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Final

from hamerspace._checks import number, positive_integer
from hamerspace.exceptions import ConstraintError
from hamerspace.measure.benchmarker import hardware_of

MIN_COSINE: Final = 0.99
"""Below this a model counts as unfaithful where accuracy is not limited or cannot be measured."""


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
        limits: tuple[tuple[str, Callable[[float], bool], str], ...] = (
            ("target_size_mb", lambda n: 0 < n < math.inf, "it is a number above 0, or None for no limit"),
            ("max_latency_ms", lambda n: 0 < n < math.inf, "it is a number above 0, or None for no limit"),
            ("max_accuracy_drop", lambda n: 0 <= n <= 1, "it lies within 0 and 1, as 0.02 for two points"),
        )
        for name, fits, wanted in limits:
            if (value := getattr(self, name)) is not None:
                object.__setattr__(self, name, number(name, value, fits, wanted))
        hardware_of(self.target_hardware)
        for name in ("batch_size", "calibration_samples"):
            object.__setattr__(self, name, positive_integer(name, getattr(self, name)))

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
