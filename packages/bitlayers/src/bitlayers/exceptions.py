"""The exceptions that bitlayers raises; they are bitlab-core's."""

from bitcore.exceptions import BitLabError, QuantizationError

__all__ = ["BitLabError", "QuantizationError"]
