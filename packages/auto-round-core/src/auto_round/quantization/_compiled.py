"""Functions that `torch.compile` makes faster, and that run as they are where it cannot."""

from __future__ import annotations

import importlib.util
import logging
import os
import shutil
import sys
import warnings
from collections.abc import Callable
from importlib import import_module
from typing import Any, cast

import torch
from torch import Tensor

_LOG = logging.getLogger(__name__)
_MOST_KINDS = 64


def missing_compiler(device: torch.device) -> str | None:
    """Return what `torch.compile` lacks for a device, with the remedy, or None if nothing is known to."""
    cxx = os.environ.get("CXX") or ("clang++" if sys.platform == "darwin" else "g++")
    if shutil.which(cxx.split()[0]) is None:
        return f"there is no C++ compiler {cxx}; install one, or name it in the environment as CXX"
    if device.type == "cuda" and importlib.util.find_spec("triton") is None:
        return "triton is not installed, which torch needs to compile for a GPU"
    return None


class Compiled:
    """A function that is compiled when it is called first, and left as it is where that fails.

    Args:
        function: Takes tensors, floats and what holds them. It must not do half its work and then fail.
        dynamic: Whether one compilation serves all sizes.
        precise: Keep each rounding to a smaller type, which fused code would leave out.
    """

    def __init__(self, function: Callable[..., Any], *, dynamic: bool, precise: bool) -> None:
        self._function = function
        warnings.filterwarnings("ignore", category=UserWarning, module=r"torch\._inductor")
        # In this process: a pool of others would take memory of its own, for a handful of functions.
        options = {"compile_threads": 1, "emulate_precision_casts": precise}
        self._compiled: Callable[..., Any] | None = None
        try:
            compiled = torch.compile(function, dynamic=dynamic, fullgraph=True, options=options)  # pyright: ignore
            self._compiled = cast("Callable[..., Any]", compiled)
            # One for each kind of block and each form of a weight, in a process that may do several models.
            limits: Any = import_module("torch._dynamo.config")
            limits.recompile_limit = max(limits.recompile_limit, _MOST_KINDS)
        except Exception as failure:  # noqa: BLE001 - such as a folder for its files that cannot be made
            self.give_up(failure)

    @property
    def works(self) -> bool:
        """Whether nothing has failed yet."""
        return self._compiled is not None

    def __call__(self, *args: Any) -> Any:
        """Call the function."""
        if self._compiled is None:
            return self._function(*args)
        # A float would be compiled in, and each other value would be compiled again.
        given = [_scalar(value) if isinstance(value, float) else value for value in args]
        try:
            return self._compiled(*given)
        except torch.OutOfMemoryError:
            raise
        except Exception as failure:  # noqa: BLE001 - compilers fail in many ways
            self.give_up(failure)
        return self._function(*args)

    def give_up(self, failure: Exception) -> None:
        """Run the function as it is from now on, and say so once."""
        self._compiled = None
        reason = str(failure).strip().splitlines()
        _LOG.warning(
            "torch.compile failed, so training goes on without it, as well and more slowly: %s: %s",
            type(failure).__name__,
            reason[0] if reason else "it gives no reason",
        )


def _scalar(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float32)
