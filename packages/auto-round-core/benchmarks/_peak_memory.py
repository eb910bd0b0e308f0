"""Peak memory of variants of some work on a random Llama, each in a fresh process: what the benchmarks share.

A benchmark's ``main`` calls `compare`, which starts the benchmark's own file again for each run with the
hidden options ``--variant`` and ``--folder``; in that process it prints what ``run`` returns. What counts is
the peak of resident memory from the end of the imports on, less what they left resident, in MB (2**20 bytes).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

HIDDEN, WIDE, VOCABULARY, HEADS, KEY_HEADS, SHARDS = 1536, 4096, 32000, 12, 4, 5


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


def start_counting() -> float:
    """Have the high-water mark begin here, without what imports held for a moment; return what they hold."""
    Path("/proc/self/clear_refs").write_text("5")
    return memory_mb("VmRSS")


def compare(
    script: str,
    description: str,
    names: Mapping[str, str],
    run: Callable[[str, Path], dict[str, Any]],
    *,
    rounds: int,
    bar: str,
    distributions: Sequence[str],
    check: Callable[[Mapping[str, list[dict[str, Any]]]], None] | None = None,
) -> None:
    """Measure all variants, interleaved, and print and write a table of medians.

    Args:
        script: The benchmark's file.
        description: For its ``--help``.
        names: What each variant is called in the table.
        run: Does the work of a variant on the model in a folder, and returns ``imports_mb``, ``peak_mb``,
            ``seconds`` and what else is to be kept.
        rounds: How many by default.
        bar: What is to be reached, in words.
        distributions: Whose versions are kept.
        check: Is given all runs with one model.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--layers", type=int, nargs="+", default=[16, 32], help="models to write (16 and 32)")
    parser.add_argument("--rounds", type=int, default=rounds, help=f"rounds to take the median of ({rounds})")
    parser.add_argument("--only", nargs="+", choices=names, default=list(names), help="variants to run")
    parser.add_argument("--place", type=Path, help="where to write the models; they are removed afterwards")
    parser.add_argument("--json", type=Path, help="where to write the results (default: results/ beside it)")
    parser.add_argument("--variant", choices=names, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.variant:
        print(json.dumps(run(given.variant, given.folder)))
        return

    from measuring import environment, table, write_results

    rows: list[list[str]] = []
    results: dict[str, Any] = {}
    for layers in given.layers:
        with tempfile.TemporaryDirectory(dir=given.place) as place:
            folder = Path(place) / "model"
            folder.mkdir()
            write_model(folder, layers)
            runs: dict[str, list[dict[str, Any]]] = {name: [] for name in given.only}
            for _ in range(given.rounds):
                for name in runs:
                    runs[name].append(_measured(script, name, folder))
        if check is not None:
            check(runs)
        found: dict[str, Any] = {"runs": runs}
        results[f"{layers} layers"] = found
        for name, members in runs.items():
            above = sorted(one["peak_mb"] - one["imports_mb"] for one in members)
            median_mb, seconds = (
                statistics.median(above),
                statistics.median(one["seconds"] for one in members),
            )
            found[name] = {"median_mb": median_mb, "seconds": seconds}
            spread = f"{above[0]:.1f} to {above[-1]:.1f}"
            rows.append([names[name], str(layers), f"{median_mb:.1f}", spread, f"{seconds:.1f}"])
    print(table(["variant", "layers", "peak MB", "range", "wall s"], rows))
    print(f"Bar: {bar}")
    print(
        write_results(script, given.json, {"bar": bar, **results, "environment": environment(distributions)})
    )


def _measured(script: str, name: str, folder: Path) -> dict[str, Any]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, script, "--variant", name, "--folder", str(folder)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
    return json.loads(done.stdout.splitlines()[-1])
