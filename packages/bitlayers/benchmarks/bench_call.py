"""What calling a deployed `BitLinear` costs, on one thread, beside `torch.nn.Linear` and the bound kernel.

Run with ``make bench P=bitlayers``. At 16 x 16 the kernel itself takes less than half a microsecond: there
the whole call is the overhead. "bound" is what `BitKernelBase.bind` returns, which the layer calls.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import asdict

os.environ |= {"OMP_NUM_THREADS": "1"}

import torch
from bitcore.kernels import KernelRegistry
from bitlayers import BitLinear
from measuring import environment, interleave, parse_arguments, table, write_results
from torch import nn

SIZES = (16, 64, 768)
CALLS = 2000


def main() -> None:
    options = parse_arguments(__doc__ or "")
    torch.set_num_threads(1)
    results: dict[int, dict[str, dict[str, float]]] = {}
    for size in SIZES:
        layer, linear, x = BitLinear(size, size).deploy(), nn.Linear(size, size), torch.randn(1, size)
        kernel = KernelRegistry.get_kernel_for_config(layer.quant_config)
        with torch.inference_mode():
            scale, qweight = layer.packed()
            bound = kernel.bind(scale, qweight, layer.bias, layer.quant_config)
            variants = {"BitLinear": layer, "bound": bound, "nn.Linear": linear}
            repeated = {name: _repeat(call, x) for name, call in variants.items()}
            timings = interleave(repeated, rounds=options.rounds, calls=CALLS)
        results[size] = {name: asdict(timing) for name, timing in timings.items()}
    names = list(results[SIZES[0]])
    rows = [
        [f"{size} x {size}", *(f"{found[name]['cpu_s'] * 1e6:.2f}" for name in names)]
        for size, found in results.items()
    ]
    print(table(["", *(f"{name} us" for name in names)], rows))
    path = write_results(
        __file__,
        options.json,
        {"environment": environment(["torch"]), "kernel": kernel.name, "results": results},
    )
    print(f"written to {path}")


def _repeat(call: Callable[[torch.Tensor], object], x: torch.Tensor) -> Callable[[], None]:
    def run() -> None:
        for _ in range(CALLS):
            call(x)

    return run


if __name__ == "__main__":
    main()
