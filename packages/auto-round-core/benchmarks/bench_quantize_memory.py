"""Peak memory of quantising a Llama from disk to disk.

The benchmark writes a random Llama in float32 as five shards: layers of 101 MB, and an embedding and a head
of 197 MB each; 2.0 GB with 16 layers. Each variant then quantises it to 4 bits in groups of 128 and exports
it, in a process of its own, on one thread, with 32 sequences of 256 tokens where it reads calibration. Two
steps of training are enough, since the first block's first step reaches the peak. What counts is the peak of
resident memory from the end of the imports on, less what they left resident, in MB of 2**20 bytes. A limit
is set as `memory.max_ram_mb`, so much above the imports. Run with ``make bench P=auto-round-core``.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench_forward_memory import VOCABULARY, memory_mb, write_model

SAMPLES, TOKENS, BATCH, STEPS = 32, 256, 8, 2
BAR_MB = 450


@dataclass(frozen=True, kw_only=True, slots=True)
class Variant:
    """One way to quantise."""

    quality: str
    export_format: str = "auto_round"
    limit_mb: int | None = None
    """Above the imports."""
    held_to_bar: bool = True


VARIANTS = {
    "signround": Variant(quality="signround"),
    "signround, limited": Variant(quality="signround", limit_mb=BAR_MB),
    "signround, fake": Variant(quality="signround", export_format="fake"),
    "best": Variant(quality="best", held_to_bar=False),
    "rtn": Variant(quality="rtn"),
}


def run_variant(name: str, folder: Path) -> dict[str, Any]:
    """Quantise in this fresh process, and return its peak, its notes and its time."""
    import rich.progress  # noqa: F401 - counted with the imports, as what follows
    import torch
    import transformers
    from auto_round import AutoRound
    from transformers.models.llama import modeling_llama  # noqa: F401

    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    variant = VARIANTS[name]
    tokens = torch.randint(VOCABULARY, (SAMPLES, TOKENS), generator=torch.Generator().manual_seed(0))
    # The kernel then counts the high-water mark from here on, without what the imports held for a moment.
    Path("/proc/self/clear_refs").write_text("5")
    imports_mb = memory_mb("VmRSS")
    limit_mb = None if variant.limit_mb is None else int(imports_mb) + variant.limit_mb
    start = time.perf_counter()
    config = {
        "device": "cpu",
        "memory": {"workspace_dir": str(folder.parent), "max_ram_mb": limit_mb},
        "quantization": {
            "quality": variant.quality,
            "bits": 4,
            "group_size": 128,
            "iters": STEPS,
            "nsamples": SAMPLES,
            "seqlen": TOKENS,
            "batch_size": BATCH,
        },
    }
    with tempfile.TemporaryDirectory(dir=folder.parent) as place:
        with AutoRound(folder, config=config, calibration=tokens, progress=False) as rounder:
            rounder.quantize_and_save(Path(place) / "export", variant.export_format)
            report = rounder.report
        exported = sum(path.stat().st_size for path in Path(place).glob("export/*.safetensors"))
    return {
        "imports_mb": imports_mb,
        "peak_mb": memory_mb("VmHWM"),
        "seconds": time.perf_counter() - start,
        "exported_mb": exported / 2**20,
        "blocks_mb": [block.peak_mb - imports_mb for block in report.blocks],
        "notes": report.notes,
    }


def measure(name: str, folder: Path) -> dict[str, Any]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, __file__, "--variant", name, "--folder", str(folder)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, nargs="+", default=[16, 32], help="models to write (16 and 32)")
    parser.add_argument("--rounds", type=int, default=3, help="rounds to take the median of (default 3)")
    parser.add_argument("--only", nargs="+", choices=VARIANTS, default=list(VARIANTS), help="variants to run")
    parser.add_argument("--folder", type=Path, help="where to write the models; they are removed afterwards")
    parser.add_argument("--json", type=Path, help="where to write the results (default: results/ beside it)")
    parser.add_argument("--variant", choices=VARIANTS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.variant:
        print(json.dumps(run_variant(arguments.variant, arguments.folder)))
        return

    from measuring import environment, table, write_results

    rows: list[list[str]] = []
    results: dict[str, Any] = {}
    for layers in arguments.layers:
        with tempfile.TemporaryDirectory(dir=arguments.folder) as place:
            folder = Path(place) / "model"
            folder.mkdir()
            write_model(folder, layers)
            runs: dict[str, list[dict[str, Any]]] = {name: [] for name in arguments.only}
            for _ in range(arguments.rounds):
                for name in runs:
                    runs[name].append(measure(name, folder))
        results[f"{layers} layers"] = {"runs": runs}
        for name in runs:
            above = sorted(run["peak_mb"] - run["imports_mb"] for run in runs[name])
            seconds = statistics.median(run["seconds"] for run in runs[name])
            median_mb = statistics.median(above)
            results[f"{layers} layers"][name] = {"median_mb": median_mb, "seconds": seconds}
            rows.append(
                [
                    name,
                    str(layers),
                    f"{median_mb:.0f}",
                    f"{above[0]:.0f} to {above[-1]:.0f}",
                    f"{seconds:.1f}",
                ]
            )
    print(table(["variant", "layers", "peak MB", "range", "wall s"], rows))
    held = ", ".join(name for name in arguments.only if VARIANTS[name].held_to_bar)
    print(f"Bar: {BAR_MB} MB, for {held}; 32 layers within 5% of 16.")
    names = ("auto-round-core", "torch", "transformers", "safetensors")
    path = write_results(
        __file__, arguments.json, {"bar_mb": BAR_MB, **results, "environment": environment(names)}
    )
    print(path)


if __name__ == "__main__":
    main()
