"""What is measured of a model."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class ModelMetrics:
    """Size, speed, accuracy and memory of a model. MB are of 2**20 bytes."""

    size_mb: float
    """Of all its files as saved; of a live model, of its weights."""
    latency_ms: float
    """Median wall time of one call; of two means of a busy machine it is the one that can be repeated."""
    accuracy: float | None = None
    """What ``validation_fn`` gave, or the share of labels that were met; None where neither is there."""
    memory_mb: float | None = None
    """Peak of resident memory of a process that has just this model open."""
    throughput: float | None = None
    """Samples a second, of calls one after another."""
    latency_p50_ms: float | None = None
    latency_p90_ms: float | None = None
    latency_p99_ms: float | None = None
    latency_interval_ms: tuple[float, float] | None = None
    """Where the median lies with 95% confidence, by bootstrap over the rounds."""
    cpu_ms: float | None = None
    """Median CPU time of one call over all threads of the process; what models are ranked by on a CPU."""
    batch_size: int = 1
    hardware: str = "cpu"
    """What it was measured on: ``cpu`` or ``cuda`` of this machine."""
    runs: int = 0
    """Calls that were timed."""

    def to_dict(self) -> dict[str, Any]:
        """Return plain data."""
        return asdict(self)
