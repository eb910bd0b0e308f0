"""Quantisation of weights and activations, and the ternary linear layer as a function."""

from bitcore._activations import EXACT_TERMS, compute_x_scale, dequantize_x, quantize_x
from bitcore._weights import compute_weight_scale, dequantize_weight, quantize_weight
from bitcore.ops import bitlinear

__all__ = [
    "EXACT_TERMS",
    "bitlinear",
    "compute_weight_scale",
    "compute_x_scale",
    "dequantize_weight",
    "dequantize_x",
    "quantize_weight",
    "quantize_x",
]
