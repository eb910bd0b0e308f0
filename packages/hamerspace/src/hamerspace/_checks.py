"""Checks of numbers that callers give, which may be numpy's; what is returned is Python's own, for JSON."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any

import numpy as np

from hamerspace.exceptions import ConstraintError


def positive_integer(name: str, value: Any) -> int:
    """Return a value as an integer above 0.

    Raises:
        ConstraintError: it is none.
    """
    try:
        found = 0 if isinstance(value, (bool, np.bool)) else operator.index(value)
    except TypeError:
        found = 0
    if found < 1:
        raise ConstraintError(f"{name} is {value!r}; it is an integer above 0")
    return found


def above_0(name: str, value: Any) -> float | None:
    """Return a value as a number above 0; None stays None, which is no limit.

    Raises:
        ConstraintError: it is neither.
    """
    return None if value is None else number(name, value, lambda n: n > 0, "it is a number above 0")


def number(name: str, value: Any, fits: Callable[[float], bool], wanted: str) -> float:
    """Return a value as a number that fits.

    Raises:
        ConstraintError: it is none, or does not fit; the message says what is ``wanted``.
    """
    if isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(value, bool):
        found: Any = value.item() if isinstance(value, np.generic) else value
        if not math.isnan(found) and fits(found):
            return found
    raise ConstraintError(f"{name} is {value!r}; {wanted}")
