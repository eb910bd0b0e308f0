"""Measuring: worker processes, timing, fidelity, accuracy, and `Benchmarker`."""

from hamerspace.measure.benchmarker import Benchmarker
from hamerspace.measure.fidelity import Fidelity
from hamerspace.measure.metrics import ModelMetrics

__all__ = ["Benchmarker", "Fidelity", "ModelMetrics"]
