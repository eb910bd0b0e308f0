"""The most floating-point operations a second that a device does, which utilisation is a share of."""

from __future__ import annotations

import functools
import time

import torch

# Dense, of the tensor cores in float16 and bfloat16, from the makers' data sheets; the first name that fits.
_PUBLISHED = {
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "GH200": 989e12,
    "B200": 2250e12,
    "A100": 312e12,
    "A40": 150e12,
    "A10": 125e12,
    "L40S": 362e12,
    "L4": 121e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
    "T4": 65e12,
    "V100": 125e12,
}
_WIDTH = 1024


def peak_flops_per_s(device: torch.device, dtype: torch.dtype) -> float:
    """Return the published peak of a known GPU in half precision; else the best of some matrix products,
    which take a few hundredths of a second, on the threads that torch has now.
    """
    if device.type == "cuda" and dtype in {torch.float16, torch.bfloat16}:
        name = torch.cuda.get_device_name(device)
        for part, peak in _PUBLISHED.items():
            if part in name:
                return peak
    return _measured(device, dtype, torch.get_num_threads())


@functools.cache
def _measured(device: torch.device, dtype: torch.dtype, threads: int) -> float:
    del threads
    a = torch.ones(_WIDTH, _WIDTH, device=device, dtype=dtype)
    seconds: list[float] = []
    for _ in range(8):
        _synchronise(device)
        began = time.perf_counter()
        torch.mm(a, a)
        _synchronise(device)
        seconds.append(time.perf_counter() - began)
    return 2 * _WIDTH**3 / min(seconds)


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
