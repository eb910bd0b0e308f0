"""Quantise large language models in little memory: this release holds the package's exceptions only."""

__version__ = "0.1.0"

__all__: list[str] = []
