"""Ternary quantisation and its kernels: this release holds the exceptions only."""

__version__ = "0.1.0"

__all__: list[str] = []
