"""Float32 products by oneDNN on the processors where torch's own, by MKL, are the slower ones."""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

# With fewer rows, what oneDNN prepares for each product takes longer than it saves.
_FEWEST_ROWS = 64


def _prefers_onednn() -> bool:
    """Whether float32 products are faster by oneDNN: on processors of AMD, where MKL runs at half its speed
    or less.
    """
    if not (torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")):
        return False
    try:
        return "AuthenticAMD" in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return "AMD" in platform.processor()


PREFERS_ONEDNN = _prefers_onednn()


def serves(x: Tensor, weight: Tensor) -> bool:
    """Whether `linear` is the faster for these."""
    return x.device.type == "cpu" and x.dtype == weight.dtype == torch.float32 and PREFERS_ONEDNN


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if x.numel() < _FEWEST_ROWS * x.size(-1):
        return F.linear(x, weight, bias)
    return _onednn_linear(x.contiguous(), weight.contiguous(), bias)


def _onednn_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return cast("Tensor", torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], ""))


def _describe(x: Tensor, weight: Tensor, _: Tensor | None) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.size(0))


# An operator of its own, because torch's compiler takes oneDNN's only with weights that never change.
_library = cast("Any", torch.library.Library("llm_trainer", "FRAGMENT"))
_library.define("onednn_linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor")
_library.impl("onednn_linear", _linear, "CPU")
cast("Any", torch.library).register_fake("llm_trainer::onednn_linear", _describe, lib=_library)
_ops = cast("Any", torch.ops.llm_trainer)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return x W' + b. It has no gradient of its own."""
    return _ops.onednn_linear(x, weight, bias)


def times_transposed(a: Tensor, b: Tensor) -> Tensor:
    """Return a b' of two matrices, by the faster way. Where that is oneDNN it has no gradient."""
    return linear(a, b) if serves(a, b) else a @ b.T
