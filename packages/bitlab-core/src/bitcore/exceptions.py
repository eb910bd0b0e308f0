"""What bitlab-core, bitlayers and bitmodels raise of their own."""

__all__ = ["BitLabError", "KernelNotFoundError", "QuantizationError"]


class BitLabError(Exception):
    """Base of every exception of the three ternary packages."""


class QuantizationError(BitLabError, ValueError):
    """A tensor or a setting cannot be quantised as asked."""


class KernelNotFoundError(BitLabError, LookupError):
    """No kernel has this name, or none serves this configuration."""
