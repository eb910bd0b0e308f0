"""Quantise one cell with auto-round-core through its public API, in a fresh process: ``_ours.py CELL.json``.

The JSON is that of ``_peer_intel.py``, with ``quality`` and ``text`` (whose calibration text) beside it.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import tempfile
import time
from pathlib import Path

os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "CUDA_VISIBLE_DEVICES": ""}

import torch
from auto_round import AutoRound
from auto_round.config_manager import AutoRoundConfig
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer


def spent_cpu_s() -> float:
    """CPU seconds of this process and of all its children that have ended."""
    usages = (resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def main() -> None:
    torch.set_num_threads(1)
    cell = json.loads(Path(sys.argv[1]).read_text())
    tokenizer = AutoTokenizer.from_pretrained(cell["model"])
    rows = load_file(cell["windows"])[cell["calibration"]]
    config = AutoRoundConfig(
        quantization={
            "bits": cell["bits"],
            "group_size": cell["group_size"],
            "symmetric": cell["symmetric"],
            "quality": cell["quality"],
            "calibration": cell["text"],
            "iters": cell["iters"],
            "nsamples": len(rows),
            "seqlen": rows.shape[1],
            "batch_size": 8,
            "seed": cell["seed"],
            "compile": None if cell["compile"] else False,
        },
        export={"export_format": "fake"},
    )
    cpu_start, wall_start = spent_cpu_s(), time.perf_counter()
    tuner = AutoRound(cell["model"], tokenizer, config, calibration=rows)
    tuner.quantize()
    cpu_s, wall_s = spent_cpu_s() - cpu_start, time.perf_counter() - wall_start
    with tempfile.TemporaryDirectory(dir=Path(cell["weights"]).parent) as saved:
        tuner.save(saved)
        exported: dict[str, torch.Tensor] = {}
        for path in Path(saved).glob("*.safetensors"):
            exported |= load_file(path)
        original = load_file(Path(cell["model"]) / "model.safetensors")
        # What changed is what was quantised; a layer that did not may as well be the float one.
        weights = {name: w for name, w in exported.items() if not torch.equal(w, original[name])}
        save_file(weights, cell["weights"])
    report = {
        "cpu_s": cpu_s,
        "wall_s": wall_s,
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "layers": len(weights),
    }
    Path(cell["report"]).write_text(json.dumps(report))


if __name__ == "__main__":
    main()
