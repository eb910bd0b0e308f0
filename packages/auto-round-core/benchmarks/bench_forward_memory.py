"""Peak memory of one forward pass through a Llama that stays on disk, beside transformers' own ways.

The benchmark writes a random Llama in float32 as five shards: layers of 101 MB, and an embedding and a head
of 197 MB each; 2.0 GB with 16 layers. Each variant then runs one sequence of 32 tokens in a process of its
own, on one thread. Run with ``make bench P=auto-round-core``.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from _peak_memory import compare, memory_mb, start_counting

TOKENS = 32
VARIANTS = {
    "ours": "auto-round-core, ModelConverter",
    "accelerate": "transformers, device_map disk",
    "transformers": "transformers, from_pretrained",
}


def run_variant(variant: str, folder: Path) -> dict[str, float]:
    """Run in this fresh process, and return its peak, time and the logits' sum."""
    import accelerate  # noqa: F401 - counted for every variant
    import torch
    import transformers
    from auto_round.low_cpu_mem import ModelConverter
    from transformers.models.llama import modeling_llama

    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    tokens = torch.arange(100, 100 + TOKENS)[None]
    imports_mb = start_counting()
    start = time.perf_counter()
    with tempfile.TemporaryDirectory(dir=folder.parent) as offload, torch.inference_mode():
        if variant == "ours":
            model: Any = ModelConverter(folder, device="cpu").load_model_with_hooks()
        else:
            options: dict[str, Any] = {"dtype": torch.float32}
            if variant == "accelerate":
                parts = ("model.embed_tokens", "model.layers", "model.rotary_emb", "lm_head")
                options["device_map"] = {**dict.fromkeys(parts, "disk"), "model.norm": "cpu"}
                options["offload_folder"] = offload
            model = modeling_llama.LlamaForCausalLM.from_pretrained(folder, **options)
        total = float(model(input_ids=tokens, use_cache=False).logits[0, -1].abs().sum(dtype=torch.float64))
    return {
        "imports_mb": imports_mb,
        "peak_mb": memory_mb("VmHWM"),
        "seconds": time.perf_counter() - start,
        "logits": total,
    }


def same_logits(runs: Mapping[str, list[dict[str, Any]]]) -> None:
    logits = [run["logits"] for members in runs.values() for run in members]
    assert max(logits) - min(logits) < 1e-6 * max(logits), logits


if __name__ == "__main__":
    compare(
        __file__,
        __doc__,
        VARIANTS,
        run_variant,
        rounds=5,
        bar="200 MB for auto-round-core.",
        distributions=("auto-round-core", "torch", "transformers", "accelerate", "safetensors"),
        check=same_logits,
    )
