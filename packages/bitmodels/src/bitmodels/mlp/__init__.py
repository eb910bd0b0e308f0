"""Ternary multilayer perceptrons."""

from bitmodels.mlp._mlp import BitMLP, BitMLPConfig, BitMLPModel

__all__ = ["BitMLP", "BitMLPConfig", "BitMLPModel"]
