"""The package's logger, which says nothing below a warning until it is told to."""

from __future__ import annotations

import logging
from typing import Final

_ROOT: Final = "hamerspace"


def get_logger(name: str = _ROOT) -> logging.Logger:
    """Return a logger below the package's own, so that `set_log_level` reaches it."""
    return logging.getLogger(name if name == _ROOT or name.startswith(f"{_ROOT}.") else f"{_ROOT}.{name}")


def set_log_level(level: int | str) -> None:
    """Set the level of the package's loggers, and show what they say on standard error.

    A program that has set up handlers of its own keeps them, and no second one is added.

    Raises:
        ValueError: the level is not known.
    """
    logger = logging.getLogger(_ROOT)
    logger.setLevel(level)
    if not logger.hasHandlers():
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(levelname)s %(name)s: %(message)s"))
        logger.addHandler(handler)
