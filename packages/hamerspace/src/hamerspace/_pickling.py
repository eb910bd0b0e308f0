"""Objects of the caller as bytes for a worker process, whatever module their classes come from."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterable
from contextlib import ExitStack
from importlib.machinery import PathFinder
from typing import Any


def dumps(value: Any, owners: Iterable[Any] = ()) -> bytes:
    """Pickle a value by cloudpickle.

    Args:
        value: what is sent.
        owners: classes and functions that it needs. Those of modules that a fresh process could not import
            are sent whole; the rest by name.
    """
    cloudpickle: Any = importlib.import_module("cloudpickle")
    with ExitStack() as stack:
        for name in {str(getattr(owner, "__module__", "")) for owner in owners}:
            module = sys.modules.get(name)
            if module is not None and name != "__main__" and not _importable(name):
                cloudpickle.register_pickle_by_value(module)
                stack.callback(cloudpickle.unregister_pickle_by_value, module)
        return cloudpickle.dumps(value)


def _importable(name: str) -> bool:
    if name in sys.builtin_module_names:
        return True
    path, whole = None, ""
    for part in name.split("."):
        whole = f"{whole}.{part}" if whole else part
        spec = PathFinder.find_spec(whole, path)
        if spec is None:
            return False
        path = spec.submodule_search_locations
    return True
