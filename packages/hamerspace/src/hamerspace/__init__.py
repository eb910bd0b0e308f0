"""Compress any model under constraints: this release holds the package's exceptions only."""

__version__ = "0.1.0"

__all__: list[str] = []
