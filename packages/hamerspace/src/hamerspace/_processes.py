"""Processes that end with the process that started them, however that one ends."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
from typing import Final

_SET_DEATH_SIGNAL: Final = 1
"""PR_SET_PDEATHSIG of prctl(2)."""


def end_with_parent(parent: int) -> None:
    """Have Linux kill this process once its parent is gone; elsewhere nothing is done.

    Args:
        parent: id of the process that started this one, as that one said. A parent that was gone before this
            was called has left the process to another, which the ids show.
    """
    if sys.platform != "linux":
        return
    # A Python that is linked statically has no library to look prctl up in.
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_SET_DEATH_SIGNAL, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)
