"""On what, and in which type, blocks are computed while they are quantised."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from auto_round.config_manager import QuantizationConfig


def choose_device(device: str) -> torch.device:
    """Return the device that a configuration names; `auto` is a GPU where torch sees one."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(device)


def scale_dtype_of(config: QuantizationConfig) -> torch.dtype:
    """Return the type in which scales are kept."""
    return getattr(torch, config.scale_dtype)


def choose_dtype(device: torch.device) -> torch.dtype:
    """Return bfloat16 where the device multiplies it faster than float32, and float32 elsewhere.

    Weights are quantised from their own values in fp32 either way; this is the type of activations and of
    quantised weights in the products.
    """
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    return torch.bfloat16 if _cpu_has_bfloat16() else torch.float32


def all_finite(values: Tensor) -> bool:
    """Return whether no value is NaN or infinite.

    Both ends of the range show it, in one pass and no memory; `isfinite` takes ten times as long.
    """
    return values.numel() == 0 or bool(torch.stack(values.aminmax()).isfinite().all())


@functools.cache
def _cpu_has_bfloat16() -> bool:
    # Other processors emulate it, many times as slowly as float32.
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()  # pyright: ignore
