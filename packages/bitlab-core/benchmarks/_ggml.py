"""ggml's product of a TQ2_0 matrix and floats, from the library of llama-cpp-python, on one thread."""

from __future__ import annotations

import ctypes
import importlib.util
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_F32, _TQ2_0 = 0, 35
"""Of ggml's enumeration of types."""
_OVERHEAD = 1 << 20
"""Bytes for ggml's own account of tensors and of the graph."""


class _Init(ctypes.Structure):
    _fields_ = (("mem_size", ctypes.c_size_t), ("mem_buffer", ctypes.c_void_p), ("no_alloc", ctypes.c_bool))


class _Plan(ctypes.Structure):
    _fields_ = (
        ("work_size", ctypes.c_size_t),
        ("work_data", ctypes.c_void_p),
        ("n_threads", ctypes.c_int),
        ("threadpool", ctypes.c_void_p),
        ("abort_callback", ctypes.c_void_p),
        ("abort_callback_data", ctypes.c_void_p),
    )


class _Pool(ctypes.Structure):
    _fields_ = (
        ("cpumask", ctypes.c_bool * 512),
        ("n_threads", ctypes.c_int),
        ("prio", ctypes.c_int),
        ("poll", ctypes.c_uint32),
        ("strict_cpu", ctypes.c_bool),
        ("paused", ctypes.c_bool),
    )


def installed() -> Path | None:
    """Return the folder of ggml's libraries in llama-cpp-python, or None where it is not installed."""
    spec = importlib.util.find_spec("llama_cpp")
    if spec is None or spec.origin is None:
        return None
    folder = Path(spec.origin).parent / "lib"
    return folder if (folder / "libggml-cpu.so").exists() else None


class Ggml:
    """Makes products from the libraries in a folder."""

    def __init__(self, folder: Path) -> None:
        self._base: Any = ctypes.CDLL(str(folder / "libggml-base.so"), mode=ctypes.RTLD_GLOBAL)
        self._cpu: Any = ctypes.CDLL(str(folder / "libggml-cpu.so"))
        pointer, number = ctypes.c_void_p, ctypes.c_int64
        for library, name, result, *arguments in (
            (self._base, "ggml_init", pointer, _Init),
            (self._base, "ggml_free", None, pointer),
            (self._base, "ggml_new_tensor_2d", pointer, pointer, ctypes.c_int, number, number),
            (self._base, "ggml_mul_mat", pointer, pointer, pointer, pointer),
            (self._base, "ggml_get_data", pointer, pointer),
            (self._base, "ggml_new_graph", pointer, pointer),
            (self._base, "ggml_build_forward_expand", None, pointer, pointer),
            (self._base, "ggml_threadpool_params_default", _Pool, ctypes.c_int),
            (self._cpu, "ggml_cpu_init", None),
            (self._cpu, "ggml_threadpool_new", pointer, ctypes.POINTER(_Pool)),
            (self._cpu, "ggml_graph_plan", _Plan, pointer, ctypes.c_int, pointer),
            (self._cpu, "ggml_graph_compute", ctypes.c_int, pointer, pointer),
        ):
            function = getattr(library, name)
            function.restype, function.argtypes = result, arguments
        self._cpu.ggml_cpu_init()
        settings = self._base.ggml_threadpool_params_default(1)
        self._pool = self._cpu.ggml_threadpool_new(ctypes.byref(settings))

    def linear(self, packed: Tensor, x: Tensor) -> Callable[[], Tensor]:
        """Return what multiplies `x` by a weight in TQ2_0, each time into the same memory.

        Args:
            packed: What `bitcore.packing.gguf_ternary` packed, [rows, bytes].
            x: fp32 [inputs, columns].
        """
        (inputs, columns), rows = x.shape, len(packed)
        base = self._base
        sizes = packed.nbytes + x.nbytes + 4 * inputs * rows
        context = base.ggml_init(_Init(sizes + _OVERHEAD, None, False))
        weight = base.ggml_new_tensor_2d(context, _TQ2_0, columns, rows)
        own_x = base.ggml_new_tensor_2d(context, _F32, columns, inputs)
        product = base.ggml_mul_mat(context, weight, own_x)
        graph = base.ggml_new_graph(context)
        base.ggml_build_forward_expand(graph, product)
        plan = self._cpu.ggml_graph_plan(graph, 1, self._pool)
        work = torch.empty(max(plan.work_size, 1), dtype=torch.uint8)
        plan.work_data = work.data_ptr()
        ctypes.memmove(base.ggml_get_data(weight), packed.data_ptr(), packed.nbytes)
        ctypes.memmove(base.ggml_get_data(own_x), x.data_ptr(), x.nbytes)
        buffer = (ctypes.c_float * (inputs * rows)).from_address(base.ggml_get_data(product))
        out = torch.frombuffer(buffer, dtype=torch.float32).view(inputs, rows)
        compute, address = self._cpu.ggml_graph_compute, ctypes.addressof(plan)

        def call(_kept: tuple[object, ...] = (plan, work, buffer)) -> Tensor:
            if compute(graph, address):
                raise RuntimeError("ggml cannot compute the product")
            return out

        weakref.finalize(call, base.ggml_free, context)
        return call
