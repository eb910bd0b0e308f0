"""The exceptions that bitmodels raises; they are bitlab-core's."""

from bitcore.exceptions import BitLabError, KernelNotFoundError, QuantizationError

__all__ = ["BitLabError", "KernelNotFoundError", "QuantizationError"]
