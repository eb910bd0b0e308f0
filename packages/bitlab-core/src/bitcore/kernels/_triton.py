"""Triton's kernel: 2-bit weights by 8-bit activations on a GPU."""

from __future__ import annotations

import importlib
import importlib.util
import os
from typing import Any, ClassVar

import torch
from torch import Tensor

from bitcore.config import BitQuantConfig
from bitcore.kernels._operands import check_operands
from bitcore.kernels.base import BitKernelBase

_MOST_COLUMNS = 1 << 24
"""Products of 8-bit codes by -1, 0 and 1: so many add up in 32 bits."""


def interprets() -> bool:
    """Return whether Triton's programs run in its interpreter, on the CPU and slowly."""
    return os.environ.get("TRITON_INTERPRET") == "1"


class TritonKernel(BitKernelBase):
    """Rounds activations in one program, and multiplies them by packed weights in another."""

    name: ClassVar[str] = "triton"
    priority: ClassVar[int] = 5

    def why_not(
        self,
        config: BitQuantConfig,
        device: torch.device,
        shape: tuple[int, int] | None = None,
    ) -> str | None:
        """Return why it cannot serve; see `BitKernelBase`."""
        if device.type != "cuda" and not (interprets() and device.type == "cpu"):
            return f"it runs on a GPU, not on {device.type} (but with TRITON_INTERPRET=1)"
        if not config.quantizes_activations:
            return "it needs activations of 8 bits"
        if shape is not None and shape[1] > _MOST_COLUMNS:
            return f"it takes up to {_MOST_COLUMNS} columns"
        if importlib.util.find_spec("triton") is None:
            return 'triton is not installed; `pip install "triton>=3.5"` installs it'
        return None

    def __call__(
        self,
        x: Tensor,
        qweight_scale: Tensor,
        qweight: Tensor,
        bias: Tensor | None = None,
        config: BitQuantConfig | None = None,
    ) -> Tensor:
        """Return the layer's output; see `BitKernelBase`."""
        config = config or BitQuantConfig()
        check_operands(x, qweight_scale, qweight, bias)
        # Loaded when it is first used: triton is large.
        programs: Any = importlib.import_module("bitcore.kernels._triton_programs")
        flat = x.reshape(-1, x.shape[-1])
        out = x.new_empty((len(flat), len(qweight_scale)), dtype=_computed(x.dtype))
        if out.numel():
            most = None if config.scales_each_token else flat.abs().amax().float().view(1)
            own_bias = None if bias is None else bias.to(x.dtype)
            programs.linear(flat.to(out.dtype), qweight_scale, qweight, own_bias, most, out)
        return out.to(x.dtype).view(*x.shape[:-1], len(qweight_scale))


def _computed(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of the programs' inputs and outputs: they know no floats of 64 bits."""
    # The interpreter cuts the end of a bfloat16 off, where a GPU rounds.
    known = (torch.float16,) if interprets() else (torch.float16, torch.bfloat16)
    return dtype if dtype in known else torch.float32
