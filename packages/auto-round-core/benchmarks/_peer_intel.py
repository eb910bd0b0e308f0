"""Quantise one cell with Intel's auto-round, in an environment that holds it: ``_peer_intel.py CELL.json``.

The two packages share an import name, so this file runs apart (``python -I``) and imports nothing of ours.
The JSON names the float ``model``, the file of ``windows`` with the ``calibration`` tensor in it, ``bits``,
``group_size``, ``symmetric``, ``iters``, ``seed``, ``compile``, and where to write ``weights`` and
``report``.

The weights written are what a packed export of theirs holds: integers times fp16 scales. Their float copy of
them is rounded to bf16, from which the integers are read back here without loss.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from pathlib import Path
from typing import Any

os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
os.environ |= {"CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
# torch.compile works in this process alone, so that the CPU seconds of it are all seen.
os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"

import torch
from auto_round import AutoRound
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer


def spent_cpu_s() -> float:
    """CPU seconds of this process and of all its children that have ended."""
    usages = (resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def dequantized(name: str, layer: Any) -> torch.Tensor:
    """fp32 ``[out, in]``: the integers of a quantised layer times its scales."""
    out, width = layer.weight.shape
    scale = layer.scale.float().reshape(out, -1, 1)
    ratio = layer.weight.detach().float().reshape(out, scale.shape[1], -1) / scale
    integers = ratio.round()
    off = float((ratio - integers).abs().max())
    if off > 0.1:
        raise SystemExit(f"{name}: its weights are up to {off:.3f} away from integers times its scales")
    return (integers * scale).reshape(out, width)


def main() -> None:
    torch.set_num_threads(1)
    cell = json.loads(Path(sys.argv[1]).read_text())
    model = AutoModelForCausalLM.from_pretrained(cell["model"], dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(cell["model"])
    rows = load_file(cell["windows"])[cell["calibration"]]
    plain = {"disable_opt_rtn": True, "disable_model_free": True} if cell["iters"] == 0 else {}
    cpu_start, wall_start = spent_cpu_s(), time.perf_counter()
    tuner = AutoRound(
        model,
        tokenizer,
        bits=cell["bits"],
        group_size=cell["group_size"],
        sym=cell["symmetric"],
        iters=cell["iters"],
        nsamples=len(rows),
        seqlen=rows.shape[1],
        batch_size=8,
        dataset=list(rows.split(1)),
        seed=cell["seed"],
        device_map="cpu",
        enable_torch_compile=cell["compile"],
        **plain,
    )
    quantized, _ = tuner.quantize()
    cpu_s, wall_s = spent_cpu_s() - cpu_start, time.perf_counter() - wall_start
    weights = {
        f"{name}.weight": dequantized(name, layer)
        for name, layer in quantized.named_modules()
        if isinstance(getattr(layer, "scale", None), torch.Tensor)
    }
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
