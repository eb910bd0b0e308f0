"""Ternary layers, which stand where torch's stand: train with float weights, deploy with 2 bits a weight."""

from bitlayers._ternary import TernaryLayer
from bitlayers.bitconv import BitConv2d
from bitlayers.bitembedding import BitEmbedding
from bitlayers.bitlinear import BitLinear
from bitlayers.norm import SubLN

__version__ = "0.1.0"

__all__ = ["BitConv2d", "BitEmbedding", "BitLinear", "SubLN", "TernaryLayer"]
