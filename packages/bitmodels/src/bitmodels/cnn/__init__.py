"""Ternary convolutional networks."""

from bitmodels.cnn._cnn import BitCNN, BitCNNConfig

__all__ = ["BitCNN", "BitCNNConfig"]
