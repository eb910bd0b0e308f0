"""Tokens a second of the decoder: deployed ternary layers against the same model in bfloat16, on one thread.

Both run the same code with the same cache of keys and values, and differ in their linear layers alone.
Run with ``make bench P=bitmodels``.
"""

from __future__ import annotations

import argparse
import os
from dataclasses import asdict
from functools import partial
from pathlib import Path

os.environ |= {"OMP_NUM_THREADS": "1"}

import torch
from _twin import float_twin
from bitmodels import BitTransformerConfig, BitTransformerLM
from measuring import environment, interleave, table, write_results

SIZES = ((512, 1408, 8), (1024, 2816, 8), (2048, 5632, 4))
TOKENS, PROMPT = 32, 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--vocabulary", type=int, default=8192)
    parser.add_argument("--sizes", type=int, nargs="+", default=[size for size, _, _ in SIZES])
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows, results = [], []
    for size, inner, layers in SIZES:
        if size not in options.sizes:
            continue
        config = BitTransformerConfig(
            vocab_size=options.vocabulary,
            hidden_size=size,
            intermediate_size=inner,
            num_hidden_layers=layers,
            num_attention_heads=size // 64,
        )
        torch.manual_seed(0)
        ternary = BitTransformerLM(config).bfloat16().deploy()
        half = float_twin(BitTransformerLM(config).bfloat16()).eval()
        ids = torch.randint(options.vocabulary, (1, PROMPT))
        timings = interleave(
            {
                "ternary": partial(ternary.generate, ids, TOKENS, temperature=0),
                "bf16": partial(half.generate, ids, TOKENS, temperature=0),
            },
            rounds=options.rounds,
            calls=TOKENS,
        )
        faster = timings["bf16"].cpu_s / timings["ternary"].cpu_s
        memory = ternary.memory_usage()["total_bytes"]
        held = sum(p.nbytes for p in half.parameters())
        rows.append(
            [
                f"{size} x {layers}",
                *(f"{1 / timing.cpu_s:.0f}" for timing in timings.values()),
                f"{faster:.2f}",
                f"{memory / 2**20:.0f}",
                f"{held / 2**20:.0f}",
            ]
        )
        results.append(
            {
                "config": config.to_dict(),
                "ternary_bytes": memory,
                "bf16_bytes": held,
                "timings": {name: asdict(timing) for name, timing in timings.items()},
            }
        )
        print(rows[-1], flush=True)
    header = ["size x layers", "ternary tokens/s", "bf16 tokens/s", "times", "ternary MB", "bf16 MB"]
    print(table(header, rows))
    path = write_results(__file__, options.json, {"environment": environment(["torch"]), "results": results})
    print(f"written to {path}")


if __name__ == "__main__":
    main()
