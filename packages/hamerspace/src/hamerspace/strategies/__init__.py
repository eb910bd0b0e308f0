"""Strategies: a kind of optimisation as an object that can be configured, applied and composed."""

from hamerspace.strategies.base import Impact, OptimizationStrategy
from hamerspace.strategies.composite import CompositeStrategy
from hamerspace.strategies.single import GraphOptimizationStrategy, PruningStrategy, QuantizationStrategy

__all__ = [
    "CompositeStrategy",
    "GraphOptimizationStrategy",
    "Impact",
    "OptimizationStrategy",
    "PruningStrategy",
    "QuantizationStrategy",
]
