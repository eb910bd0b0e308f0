"""The compiled kernels against torch's linear layers and ggml's TQ2_0, on one thread.

Run with ``make bench P=bitlab-core``. Each call takes floats and gives floats: quantising activations is part
of it. "Cold" walks over copies of a weight that no cache holds together, "hot" takes the same weight again.
Before a shape is timed, the kernel's result is compared with integers, to the bit. TQ2_0 is measured where
llama-cpp-python is installed, or with ``--ggml`` and a folder that holds libggml-base.so and libggml-cpu.so.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

os.environ |= {"OMP_NUM_THREADS": "1"}

import torch
from _ggml import Ggml, installed
from bitcore.config import BitQuantConfig
from bitcore.kernels import KernelRegistry
from bitcore.ops import quantize_weight
from bitcore.packing import gguf_ternary
from measuring import Timing, environment, interleave, table, write_results
from torch import Tensor

GEMV = ((768, 768), (2048, 2048), (4096, 4096), (4096, 11008))
GEMM = ((32, 4096, 4096), (512, 4096, 4096), (32, 4096, 11008), (512, 4096, 11008))
ODD = ((1, 1, 1), (3, 63, 17), (1, 1000, 777), (37, 131, 4099), (33, 65, 1000))
CONFIG = BitQuantConfig()


def check(kernel: str, m: int, rows: int, columns: int) -> None:
    """Raise unless a kernel gives what integers give, to the bit."""
    weight, x = torch.randn(rows, columns), torch.randn(m, columns)
    own = KernelRegistry.get_kernel_by_name(kernel)
    scale, packed = own.prepare_weights(weight, CONFIG)
    codes = quantize_weight(weight)[1]
    most = x.abs().amax(-1, keepdim=True).clamp(min=1e-5)
    qx = (x * (1 / most * 127)).round().clamp(-128, 127)
    # Sums of integers below 2**53 are exact in any order.
    product = (qx.double() @ codes.double().t()).float()
    if not torch.equal(own(x, scale, packed, None, CONFIG), product * (most / 127 * scale)):
        raise AssertionError(f"{kernel} is not exact at {m} x {rows} x {columns}")


class Peers:
    """Linear layers of one shape, each as a list of calls: one, or as many as copies fill `cold_bytes`."""

    def __init__(
        self, m: int, rows: int, columns: int, kernels: list[str], cold_bytes: int, ggml: Ggml | None
    ) -> None:
        self.cold_bytes = cold_bytes
        weight, self.x = torch.randn(rows, columns), torch.randn(m, columns)
        self.calls: dict[str, list[Callable[[], object]]] = {}
        for name in kernels:
            kernel = KernelRegistry.get_kernel_by_name(name)
            scale, packed = kernel.prepare_weights(weight, CONFIG)
            self._add(name, packed, lambda w, k=kernel, s=scale: _bound(k.bind(s, w, None, CONFIG), self.x))
        linear, half = torch.nn.functional.linear, self.x.bfloat16()
        self._add("bf16", weight.bfloat16(), lambda w: lambda: linear(half, w))
        self._add("fp32", weight, lambda w: lambda: linear(self.x, w))
        eight = (weight / weight.abs().max() * 127).round().to(torch.int8)
        self._add("int8", eight, lambda w: lambda: _int8(self.x, w, 0.01))
        four = torch.randint(16, (rows, columns), dtype=torch.int32)
        packed_four = torch.ops.aten._convert_weight_to_int4pack_for_cpu(four, 1)
        scales = torch.ones(columns // 32, rows, 2, dtype=torch.bfloat16)
        int4 = torch.ops.aten._weight_int4pack_mm_for_cpu
        self._add("int4pack", packed_four, lambda w: lambda: int4(half, w, 32, scales))
        if ggml is not None:
            scale, codes = quantize_weight(weight)
            tq2_0 = gguf_ternary.pack(codes, scale, "TQ2_0")
            expected = self.x @ (codes * scale).t()
            error = (ggml.linear(tq2_0, self.x)() - expected).norm() / expected.norm()
            if error > 0.02:
                raise AssertionError(f"TQ2_0 is {error:.0%} off at {m} x {rows} x {columns}")
            self._add("tq2_0", tq2_0, lambda w: ggml.linear(w, self.x))

    def _add(self, name: str, weight: Tensor, make: Callable[[Tensor], Callable[[], object]]) -> None:
        copies = max(1, -(-self.cold_bytes // weight.nbytes))
        self.calls[name] = [make(weight.clone()) for _ in range(copies)]

    def time(self, rounds: int) -> dict[str, Timing]:
        """Return each layer's time; a round lasts some 30 ms, and cold goes over all copies."""
        counts = {
            name: len(calls) if self.cold_bytes else _count(calls[0]) for name, calls in self.calls.items()
        }
        variants = {name: _repeat(calls, counts[name]) for name, calls in self.calls.items()}
        found = interleave(variants, rounds=rounds)
        return {
            name: Timing(t.cpu_s / counts[name], t.wall_s / counts[name], t.rounds, t.cpu_spread)
            for name, t in found.items()
        }


def _bound(run: Callable[[Tensor], Tensor], x: Tensor) -> Callable[[], object]:
    return lambda: run(x)


def _int8(x: Tensor, weight: Tensor, weight_scale: float) -> Tensor:
    scale = x.abs().amax(-1, keepdim=True) / 127
    qx = (x / scale).round().clamp(-128, 127).to(torch.int8)
    return torch._int_mm(qx, weight.t()).float() * (scale * weight_scale)


def _count(call: Callable[[], object]) -> int:
    call()
    start = time.perf_counter()
    call()
    return max(3, int(0.03 / max(time.perf_counter() - start, 1e-6)))


def _repeat(calls: list[Callable[[], object]], count: int) -> Callable[[], None]:
    def run() -> None:
        for number in range(count):
            calls[number % len(calls)]()

    return run


def read_bandwidth_gb_s(rounds: int, cold_bytes: int) -> float:
    """Return how fast one thread reads memory that no cache holds, in GB of 10**9 bytes a second."""
    buffer = torch.zeros(cold_bytes // 4)
    found = interleave({"sum": buffer.sum, "max": buffer.max}, rounds=rounds)
    return buffer.nbytes / 1e9 / min(timing.wall_s for timing in found.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7, help="turns each (default 7)")
    parser.add_argument("--json", type=Path, help="where to write the results (default: results/ beside it)")
    parser.add_argument("--only", nargs="+", default=["hot", "cold", "gemm"], choices=["hot", "cold", "gemm"])
    parser.add_argument("--ggml", type=Path, default=installed(), help="the folder of ggml's libraries")
    parser.add_argument(
        "--cold-mib",
        type=int,
        default=1536,
        help="all copies of a weight together (default 1536: several times the caches of a large server)",
    )
    options = parser.parse_args()
    cold_bytes = options.cold_mib << 20
    ggml = None if options.ggml is None else Ggml(options.ggml)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    best = KernelRegistry.get_kernel_for_config(CONFIG).name
    kernels = [
        name
        for name in ("amx", "avx512_vnni", "avx2")
        if KernelRegistry.get_kernel_by_name(name).is_compatible_with(CONFIG)
    ]
    for kernel in kernels:
        for m, rows, columns in (*ODD, *((1, *shape) for shape in GEMV), *GEMM):
            check(kernel, m, rows, columns)
    bandwidth = read_bandwidth_gb_s(options.rounds, cold_bytes)
    print(f"{best}; one thread reads {bandwidth:.1f} GB/s; exact on every shape\n")
    results: list[dict[str, Any]] = []
    jobs = [("hot", 1, *shape) for shape in GEMV] if "hot" in options.only else []
    jobs += [("cold", 1, *shape) for shape in GEMV[1:]] if "cold" in options.only else []
    jobs += [("hot", *shape) for shape in GEMM] if "gemm" in options.only else []
    for kind, m, rows, columns in jobs:
        timings = Peers(m, rows, columns, kernels, cold_bytes if kind == "cold" else 0, ggml).time(
            options.rounds
        )
        packed_gb_s = rows * columns / 4 / 1e9 / timings[best].cpu_s
        results.append(
            {
                "kind": kind,
                "m": m,
                "rows": rows,
                "columns": columns,
                "packed_gb_s": packed_gb_s,
                "bandwidth_share": packed_gb_s / bandwidth,
                "timings": {name: asdict(timing) for name, timing in timings.items()},
            }
        )
        ratios = ", ".join(
            f"{name} {timing.cpu_s / timings[best].cpu_s:.1f}x"
            for name, timing in timings.items()
            if name != best
        )
        print(f"{kind} {m} x {rows} x {columns}: {timings[best].cpu_s * 1e6:.1f} us; {ratios}", flush=True)
    names = list(results[0]["timings"])
    print()
    print(
        table(
            ["", *(f"{name} us" for name in names), "GB/s"],
            [
                [
                    f"{row['kind']} {row['m']} x {row['rows']} x {row['columns']}",
                    *(f"{row['timings'][name]['cpu_s'] * 1e6:.1f}" for name in names),
                    f"{row['packed_gb_s']:.1f} ({row['bandwidth_share']:.0%})"
                    if row["kind"] == "cold"
                    else "",
                ]
                for row in results
            ],
        )
    )
    path = write_results(
        __file__,
        options.json,
        {
            "environment": environment(["torch"]),
            "bandwidth_gb_s": bandwidth,
            "kernel": best,
            "results": results,
        },
    )
    print(f"written to {path}")


if __name__ == "__main__":
    main()
