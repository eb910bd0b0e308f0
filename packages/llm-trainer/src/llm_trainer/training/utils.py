"""Seeds and devices."""

from __future__ import annotations

import random

import numpy as np
import torch

__all__ = ["choose_device", "get_device", "set_seed"]


def set_seed(seed: int) -> None:
    """Seed the random numbers of Python, numpy and torch on all devices."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)  # pyright: ignore[reportUnknownMemberType] - torch's annotation


def choose_device() -> tuple[torch.device, str]:
    """Return the fastest device that torch can use here, and why it is that one."""
    if torch.cuda.is_available():
        return torch.device("cuda"), f"cuda, because torch sees {torch.cuda.get_device_name()}"
    if torch.backends.mps.is_available():
        return torch.device("mps"), "mps, because torch sees an Apple GPU"
    return torch.device("cpu"), "cpu, because torch sees no CUDA device and no Apple GPU"


def get_device() -> torch.device:
    """Return the fastest device that torch can use here; `choose_device` tells why."""
    return choose_device()[0]
