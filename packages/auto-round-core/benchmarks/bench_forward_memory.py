"""Peak memory of one forward pass through a Llama that stays on disk, beside transformers' own ways.

The benchmark writes a random Llama in float32 as five shards: layers of 101 MB, and an embedding and a head
of 197 MB each; 2.0 GB with 16 layers. Each variant then runs one sequence of 32 tokens in a process of its
own, on one thread. What counts is its peak resident memory from the end of the imports on, less what they
left resident, in MB of 2**20 bytes. Run with ``make bench P=auto-round-core``.
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
from pathlib import Path
from typing import Any

HIDDEN, WIDE, VOCABULARY, HEADS, KEY_HEADS, SHARDS = 1536, 4096, 32000, 12, 4, 5
TOKENS = 32
BAR_MB = 200
VARIANTS = ("ours", "accelerate", "transformers")
NAMES = {
    "ours": "auto-round-core, ModelConverter",
    "accelerate": "transformers, device_map disk",
    "transformers": "transformers, from_pretrained",
}


def write_model(folder: Path, layers: int) -> None:
    """Write one shard after the other; a layer's norms are ones, everything else is random."""
    import torch
    from safetensors.torch import save_file

    block = {
        "self_attn.q_proj": (HIDDEN, HIDDEN),
        "self_attn.k_proj": (HIDDEN // HEADS * KEY_HEADS, HIDDEN),
        "self_attn.v_proj": (HIDDEN // HEADS * KEY_HEADS, HIDDEN),
        "self_attn.o_proj": (HIDDEN, HIDDEN),
        "mlp.gate_proj": (WIDE, HIDDEN),
        "mlp.up_proj": (WIDE, HIDDEN),
        "mlp.down_proj": (HIDDEN, WIDE),
        "input_layernorm": (HIDDEN,),
        "post_attention_layernorm": (HIDDEN,),
    }
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens": (VOCABULARY, HIDDEN)}
    for number in range(layers):
        shapes |= {f"model.layers.{number}.{name}": shape for name, shape in block.items()}
    shapes |= {"model.norm": (HIDDEN,), "lm_head": (VOCABULARY, HIDDEN)}
    config = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": HIDDEN,
        "intermediate_size": WIDE,
        "num_hidden_layers": layers,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KEY_HEADS,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": False,
        "dtype": "float32",
    }
    (folder / "config.json").write_text(json.dumps(config))
    total = sum(4 * torch.Size(shape).numel() for shape in shapes.values())
    generator = torch.Generator().manual_seed(0)
    shard: dict[str, Any] = {}
    weight_map: dict[str, str] = {}
    number, written = 1, 0
    for position, (name, shape) in enumerate(shapes.items(), 1):
        tensor = torch.ones(shape)
        if len(shape) > 1:
            tensor.normal_(0, 0.02, generator=generator)
        shard[f"{name}.weight"] = tensor
        weight_map[f"{name}.weight"] = f"model-{number:05}-of-{SHARDS:05}.safetensors"
        written += tensor.numel() * 4
        if written >= total * number / SHARDS or position == len(shapes):
            path = folder / f"model-{number:05}-of-{SHARDS:05}.safetensors"
            save_file(shard, path, metadata={"format": "pt"})
            shard = {}
            number += 1
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def memory_mb(field: str) -> float:
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in status if line.startswith(f"{field}:")) / 1024


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
    # The kernel then counts the high-water mark from here on, without what the imports held for a moment.
    Path("/proc/self/clear_refs").write_text("5")
    imports_mb = memory_mb("VmRSS")
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


def measure(variant: str, folder: Path) -> dict[str, float]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, "--variant", variant, "--folder", str(folder)]
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, nargs="+", default=[16, 32], help="models to write (16 and 32)")
    parser.add_argument("--rounds", type=int, default=5, help="rounds to take the median of (default 5)")
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
            runs: dict[str, list[dict[str, float]]] = {name: [] for name in VARIANTS}
            for _ in range(arguments.rounds):
                for name in runs:
                    runs[name].append(measure(name, folder))
        logits = [run["logits"] for name in VARIANTS for run in runs[name]]
        assert max(logits) - min(logits) < 1e-6 * max(logits), logits
        results[f"{layers} layers"] = {"runs": runs}
        for name in VARIANTS:
            above = sorted(run["peak_mb"] - run["imports_mb"] for run in runs[name])
            seconds = statistics.median(run["seconds"] for run in runs[name])
            median_mb = statistics.median(above)
            results[f"{layers} layers"][name] = {"median_mb": median_mb, "seconds": seconds}
            rows.append(
                [
                    NAMES[name],
                    str(layers),
                    f"{median_mb:.0f}",
                    f"{above[0]:.0f} to {above[-1]:.0f}",
                    f"{seconds:.1f}",
                ]
            )
    print(table(["variant", "layers", "peak MB", "range", "wall s"], rows))
    print(f"Bar: {BAR_MB} MB for auto-round-core.")
    names = ("auto-round-core", "torch", "transformers", "accelerate", "safetensors")
    path = write_results(
        __file__, arguments.json, {"bar_mb": BAR_MB, **results, "environment": environment(names)}
    )
    print(path)


if __name__ == "__main__":
    main()
