"""Kernels that multiply by packed ternary weights, and their registry."""

from bitcore.kernels._native import KERNELS as _NATIVE
from bitcore.kernels._torch import TorchKernel
from bitcore.kernels._triton import TritonKernel
from bitcore.kernels.base import BitKernelBase
from bitcore.kernels.registry import FORCE_VARIABLE, KernelRegistry

__all__ = ["FORCE_VARIABLE", "BitKernelBase", "KernelRegistry"]

for _kernel in (TorchKernel, TritonKernel, *_NATIVE):
    KernelRegistry.register(_kernel)
