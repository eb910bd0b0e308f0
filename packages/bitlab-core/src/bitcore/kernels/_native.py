"""Compiled kernels for x86-64: AVX2, AVX-512 with VNNI, and AMX."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from bitcore.config import BitQuantConfig
from bitcore.exceptions import QuantizationError
from bitcore.kernels._operands import check_operands
from bitcore.kernels.base import BitKernelBase

LIBRARY = Path(__file__).parent.parent / "_native" / "libbitcore.so"
"""Where the build puts it."""
_MOST_COLUMNS = 1 << 19
"""So many add up in 32 bits: a quarter of them, by codes that are up to 2 and still shifted by 6 bits."""
_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


class _Layer(ctypes.Structure):
    """`bitcore_layer` of csrc/ternary.h."""

    _fields_ = (
        ("qweight", ctypes.c_void_p),
        ("scale", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("rows", ctypes.c_int64),
        ("columns", ctypes.c_int64),
        ("parallel_for", ctypes.c_void_p),
        ("dtype", ctypes.c_int32),
        ("per_token", ctypes.c_int32),
        ("isa", ctypes.c_int32),
    )


@functools.cache
def _library() -> tuple[Any, int]:
    """Return the library's function and the best instruction set here, 0 where there is none.

    Raises:
        OSError: The library is missing, or cannot be loaded.
    """
    library = ctypes.CDLL(str(LIBRARY))
    linear = library.bitcore_linear
    linear.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p)
    linear.restype = ctypes.c_int32
    return linear, int(library.bitcore_best_isa())


@functools.cache
def _parallel_for() -> int | None:
    """Return the address of what shares work among torch's own threads, where this torch has it."""
    name = "libtorch_cpu.so"
    function = getattr(
        ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / name)), "torch_parallel_for", None
    )
    return None if function is None else ctypes.cast(function, ctypes.c_void_p).value


@functools.cache
def missing_library() -> str | None:
    """Return why there is no compiled code, or None if there is."""
    try:
        _library()
    except OSError as error:
        if not LIBRARY.exists():
            return (
                "it was built without a C++ compiler; install one and install bitlab-core again from source"
            )
        return f"{LIBRARY} cannot be loaded: {error}"
    return None


class NativeKernel(BitKernelBase):
    """Computes on packed weights with one instruction set, in torch's threads."""

    _isa: ClassVar[int]
    _needs: ClassVar[str]

    @property
    def has_cpp_backend(self) -> bool:
        """Return True."""
        return True

    def why_not(
        self,
        config: BitQuantConfig,
        device: torch.device,
        shape: tuple[int, int] | None = None,
    ) -> str | None:
        """Return why it cannot serve; see `BitKernelBase`."""
        if device.type != "cpu":
            return f"it runs on the CPU, not on {device.type}"
        if not config.quantizes_activations:
            return "it needs activations of 8 bits"
        if shape is not None and shape[1] > _MOST_COLUMNS:
            return f"it takes up to {_MOST_COLUMNS} columns"
        missing = missing_library()
        if missing is not None:
            return missing
        return None if _library()[1] >= self._isa else f"the processor has no {self._needs}"

    def bind(
        self,
        qweight_scale: Tensor,
        qweight: Tensor,
        bias: Tensor | None = None,
        config: BitQuantConfig | None = None,
    ) -> Callable[[Tensor], Tensor]:
        """Return what takes inputs and gives the layer's outputs; see `BitKernelBase`."""
        if not qweight.is_cpu:
            raise QuantizationError(f"{self.name} runs on the CPU, but the weight is on {qweight.device}.")
        config = config or BitQuantConfig()
        rows, linear = qweight_scale.numel(), _library()[0]
        scale, packed = qweight_scale.contiguous(), qweight.contiguous()
        # What stands for the layer in C, and what that points to, by the dtype of the inputs.
        layers: dict[torch.dtype, tuple[int, int, _Layer, Tensor | None]] = {}

        def layer_of(x: Tensor) -> tuple[int, int, _Layer, Tensor | None]:
            check_operands(x, scale, packed, bias)
            dtype, columns = x.dtype, x.shape[-1]
            if columns > _MOST_COLUMNS:
                raise QuantizationError(f"{self.name} takes up to {_MOST_COLUMNS} columns, not {columns}.")
            own_bias = None if bias is None else bias.detach().to(dtype).contiguous()
            layer = _Layer(
                qweight=packed.data_ptr(),
                scale=scale.data_ptr(),
                bias=None if own_bias is None else own_bias.data_ptr(),
                rows=rows,
                columns=columns,
                parallel_for=_parallel_for(),
                dtype=_DTYPES[dtype],
                per_token=config.scales_each_token,
                isa=self._isa,
            )
            layers[dtype] = made = columns, ctypes.addressof(layer), layer, own_bias
            return made

        def call(x: Tensor) -> Tensor:
            dtype, shape = x.dtype, x.shape
            if dtype not in _DTYPES or not x.is_cpu or not shape:
                check_operands(x, scale, packed, bias)
                return call(x.float()).to(dtype)
            if not x.is_contiguous():
                x = x.contiguous()
            columns = shape[-1]
            known = layers.get(dtype)
            if known is None or known[0] != columns:
                # It stays here until the call is over, whatever another thread puts in its place.
                known = layer_of(x)
            # Sizes by themselves take half as long as in a tuple.
            out = x.new_empty(*shape[:-1], rows)
            if linear(known[1], x.data_ptr(), x.numel() // columns, out.data_ptr()):
                raise MemoryError(f"there is no memory for activations of shape {list(shape)}")
            return out

        return call

    def __call__(
        self,
        x: Tensor,
        qweight_scale: Tensor,
        qweight: Tensor,
        bias: Tensor | None = None,
        config: BitQuantConfig | None = None,
    ) -> Tensor:
        """Return the layer's output; see `BitKernelBase`."""
        return self.bind(qweight_scale, qweight, bias, config)(x)


class Avx2Kernel(NativeKernel):
    """Any x86-64 processor of the last ten years."""

    name: ClassVar[str] = "avx2"
    priority: ClassVar[int] = 10
    _isa, _needs = 1, "AVX2"


class VnniKernel(NativeKernel):
    """Intel from Ice Lake on, AMD from Zen 4 on."""

    name: ClassVar[str] = "avx512_vnni"
    priority: ClassVar[int] = 20
    _isa, _needs = 2, "AVX-512 with VNNI"


class AmxKernel(NativeKernel):
    """Intel's servers from Sapphire Rapids on; single inputs go as with VNNI."""

    name: ClassVar[str] = "amx"
    priority: ClassVar[int] = 30
    _isa, _needs = 3, "AMX (or the system does not grant it)"


KERNELS: tuple[type[NativeKernel], ...] = (Avx2Kernel, VnniKernel, AmxKernel)
