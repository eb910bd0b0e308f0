"""What bitlab-core, bitlayers and bitmodels raise of their own, and how they speak of unknown names."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = ["BitLabError", "KernelNotFoundError", "QuantizationError", "nearest"]


class BitLabError(Exception):
    """Base of every exception of the three ternary packages."""


class QuantizationError(BitLabError, ValueError):
    """A tensor or a setting cannot be quantised as asked."""


class KernelNotFoundError(BitLabError, LookupError):
    """No kernel has this name, or none serves this configuration."""


def nearest(name: object, known: Iterable[str]) -> str:
    """Return how a message about an unknown name ends: with the one that may be meant, or a full stop."""
    close = difflib.get_close_matches(str(name), list(known), n=1)
    return f"; did you mean {close[0]}?" if close else "."
