"""Peak memory of quantising a Llama from disk to disk.

The benchmark writes a random Llama in float32 as five shards: layers of 101 MB, and an embedding and a head
of 197 MB each; 2.0 GB with 16 layers. Each variant then quantises it to 4 bits in groups of 128 and exports
it, in a process of its own, on one thread, with 32 sequences of 256 tokens where it reads calibration. Two
steps of training are enough, since the first block's first step reaches the peak. A limit is set as
`memory.max_ram_mb`, so much above the imports. Nothing is compiled but where a variant says so, which is
what long work without a limit does by itself. Run with ``make bench P=auto-round-core``.
"""

from __future__ import annotations

import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from _peak_memory import VOCABULARY, compare, memory_mb, start_counting

SAMPLES, TOKENS, BATCH, STEPS = 32, 256, 8, 2
BAR_MB = 450


@dataclass(frozen=True, kw_only=True, slots=True)
class Variant:
    """One way to quantise."""

    quality: str
    export_format: str = "auto_round"
    limit_mb: int | None = None
    """Above the imports."""
    compiles: bool = False


VARIANTS = {
    "signround": Variant(quality="signround"),
    "signround, limited": Variant(quality="signround", limit_mb=BAR_MB),
    "signround, fake": Variant(quality="signround", export_format="fake"),
    "signround, compiled": Variant(quality="signround", compiles=True),
    "best": Variant(quality="best"),
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
    imports_mb = start_counting()
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
            "compile": variant.compiles,
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


if __name__ == "__main__":
    compare(
        __file__,
        __doc__,
        {name: name for name in VARIANTS},
        run_variant,
        rounds=3,
        bar=f"{BAR_MB} MB, but for what is compiled and best; 32 layers within 5% of 16.",
        distributions=("auto-round-core", "torch", "transformers", "safetensors"),
    )
