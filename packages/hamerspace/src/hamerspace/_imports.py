"""Heavy libraries, loaded when first used, with the line that installs them where they are missing."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import sys
from functools import cache
from typing import Any

PACKAGES = {
    "bitsandbytes": '"bitsandbytes>=0.49"',
    "nncf": '"nncf>=3.3"',
    "onnx": '"onnx>=1.19"',
    "onnxruntime": '"onnxruntime>=1.22"',
    "onnxscript": '"onnxscript>=0.6.2"',
    "openvino": '"openvino>=2026.0"',
    "optimum.intel": '"optimum-intel[openvino]>=2.2,<2.3"',
    "optimum.onnxruntime": '"optimum-onnx[onnxruntime]>=0.1,<0.2" "transformers>=4.57,<4.58"',
    "tensorflow": '"tensorflow>=2.20,<3"',
    "tf2onnx": '"tf2onnx>=1.17"',
    "torch": '"torch>=2.9,<3"',
    "torchao": '"torchao>=0.15"',
    "transformers": '"transformers>=5,<5.6"',
    "tvm": '"apache-tvm>=0.27.0.post1,<0.28" "apache-tvm-ffi==0.1.14.post0"',
    "xgboost": '"xgboost>=3"',
}
"""What pip is to be told for a module, by the module's name."""

_TRITON = "triton"
"""Comes with torch, where it comes at all."""


def need(module: str) -> Any:
    """Import a module, or say what installs it.

    Raises:
        ImportError: it is not installed; the message has the ``pip install`` line.
    """
    if module.partition(".")[0] == "tensorflow":
        _load_triton_first()
    try:
        return importlib.import_module(module)
    except ImportError as error:
        top = next((name for name in (module, module.partition(".")[0]) if name in PACKAGES), module)
        if has(top):
            raise
        wanted = PACKAGES.get(top, top)
        raise ImportError(
            f"{top} is needed for this and is not installed; run: pip install {wanted}"
        ) from error


@cache
def has(module: str) -> bool:
    """Whether a module could be imported, without importing it (its parents are, where it has some)."""
    try:
        return importlib.util.find_spec(module) is not None
    except ImportError:
        return False


def version(distribution: str) -> str | None:
    """A distribution's version, or None where it is not installed."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


@cache
def _load_triton_first() -> None:
    """Load triton's library before TensorFlow's: the other way round both end the process."""
    if has(_TRITON) and "tensorflow" not in sys.modules:
        importlib.import_module(_TRITON)
