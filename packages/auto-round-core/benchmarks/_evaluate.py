"""Perplexity of a quantised model, the same for every method: ``_evaluate.py MODEL WEIGHTS|- REPORT``.

Everything is fp32. The float model is loaded and the tensors of the quantised layers alone are replaced;
embeddings, norms and head are the float model's own for every method (Intel's package rounds them to bf16 as
it works, which counts for or against nobody here).
"""

from __future__ import annotations

import json
import math
import os
import sys
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"

import torch
from safetensors.torch import load_file


@torch.no_grad()
def perplexity(model: Any, rows: torch.Tensor, batch: int = 8) -> float:
    """exp of the mean cross-entropy over the 255 predicted tokens of each window ``[windows, 256]``."""
    total, count = 0.0, 0
    for ids in rows.split(batch):
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
        targets = ids[:, 1:]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")
        total, count = total + float(loss), count + targets.numel()
    return math.exp(total / count)


def replace_weights(model: Any, weights: dict[str, torch.Tensor]) -> None:
    """Put the quantised layers' tensors into the float model; each of them must be there, in its shape."""
    with torch.no_grad():
        for name, weight in weights.items():
            parameter = model.get_parameter(name)
            if parameter.shape != weight.shape:
                shapes = tuple(weight.shape), tuple(parameter.shape)
                raise SystemExit(f"{name} is {shapes[0]}, and {shapes[1]} in the float model")
            parameter.copy_(weight)


def main() -> None:
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(1)
    folder, weights, report = sys.argv[1:]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    if weights != "-":
        replace_weights(model, load_file(weights))
    stored = load_file(Path(folder) / "windows.safetensors")
    found = {
        name.removeprefix("evaluation."): perplexity(model, rows)
        for name, rows in sorted(stored.items())
        if name.startswith("evaluation.")
    }
    Path(report).write_text(json.dumps(found))


if __name__ == "__main__":
    main()
