"""Which kernels there are, and which one serves."""

from __future__ import annotations

import os
import threading
from typing import ClassVar, TypeVar

import torch

from bitcore.config import BitQuantConfig
from bitcore.exceptions import KernelNotFoundError, nearest
from bitcore.kernels.base import BitKernelBase

__all__ = ["FORCE_VARIABLE", "KernelRegistry"]

FORCE_VARIABLE = "BITCORE_KERNEL"
"""The environment variable that names the one kernel that may be chosen."""

_Kernel = TypeVar("_Kernel", bound=BitKernelBase)


class KernelRegistry:
    """The kernels of this process. All methods are the class's own: there is one registry."""

    _kernels: ClassVar[dict[str, BitKernelBase]] = {}
    _lock: ClassVar = threading.Lock()

    @classmethod
    def register(cls, kernel: type[_Kernel]) -> type[_Kernel]:
        """Add a kernel's class, which may be used as a decorator; it takes the place of one of its name."""
        with cls._lock:
            cls._kernels = {**cls._kernels, kernel.name: kernel()}
        return kernel

    @classmethod
    def list_available_kernels(cls) -> list[str]:
        """Return the names of all kernels, those that are preferred first."""
        return [kernel.name for kernel in cls._ordered()]

    @classmethod
    def get_kernel_by_name(cls, name: str) -> BitKernelBase:
        """Return a kernel, whether it can serve here or not.

        Raises:
            KernelNotFoundError: There is none of this name.
        """
        if name not in cls._kernels:
            known = cls.list_available_kernels()
            raise KernelNotFoundError(
                f"there is no kernel {name!r} among {', '.join(known)}{nearest(name, known)}"
            )
        return cls._kernels[name]

    @classmethod
    def get_kernel_for_config(
        cls,
        config: BitQuantConfig,
        device: torch.device | str = "cpu",
        shape: tuple[int, int] | None = None,
    ) -> BitKernelBase:
        """Return the fastest kernel that can serve.

        `BITCORE_KERNEL` in the environment names one that is to be used regardless.

        Args:
            config: How weights and activations are quantised.
            device: Where they are.
            shape: Rows and columns of the weight, where they are known.

        Raises:
            KernelNotFoundError: None can, or the one that the environment names cannot; the message has the
                reasons.
        """
        where = torch.device(device)
        forced = os.environ.get(FORCE_VARIABLE)
        if forced:
            kernel = cls.get_kernel_by_name(forced)
            reason = kernel.why_not(config, where, shape)
            if reason is not None:
                raise KernelNotFoundError(f"{FORCE_VARIABLE} asks for {forced}, but {reason}.")
            return kernel
        for kernel in cls._ordered():
            if kernel.why_not(config, where, shape) is None:
                return kernel
        reasons = "; ".join(f"{name}: {reason}" for name, reason in cls.explain(config, where, shape).items())
        raise KernelNotFoundError(f"no kernel serves {config} on {where}: {reasons}.")

    @classmethod
    def explain(
        cls,
        config: BitQuantConfig,
        device: torch.device | str = "cpu",
        shape: tuple[int, int] | None = None,
    ) -> dict[str, str]:
        """Return for each kernel, those that are preferred first, whether it can serve and why not."""
        where = torch.device(device)
        reasons = {kernel.name: kernel.why_not(config, where, shape) for kernel in cls._ordered()}
        return {name: "can serve" if reason is None else reason for name, reason in reasons.items()}

    @classmethod
    def _ordered(cls) -> list[BitKernelBase]:
        return sorted(cls._kernels.values(), key=lambda kernel: -kernel.priority)
