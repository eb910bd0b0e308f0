"""Seconds of one training step on a CPU, with and without document boundaries in the rows.

Run: python packages/llm-trainer/benchmarks/step_time.py [--threads 1] [--rounds 6] [--json FILE]
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import torch
from llm_trainer.config import ModelConfig, TrainingConfig
from llm_trainer.models import TransformerLM
from llm_trainer.training import create_optimizer, set_seed
from llm_trainer.training._precision import Precision
from llm_trainer.training._step import take_step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    set_seed(0)
    config = ModelConfig(
        vocab_size=4096,
        d_model=256,
        n_heads=4,
        n_layers=6,
        d_ff=1024,
        max_seq_len=256,
        dropout=0.0,
        attention_dropout=0.0,
        norm="rmsnorm",
        positions="rope",
        activation="relu2",
        qk_norm=True,
        bias=False,
    )
    model = TransformerLM(config)
    optimizer = create_optimizer(model)
    device = torch.device("cpu")
    precision = Precision(TrainingConfig(amp_dtype="bfloat16"), device)
    ids = torch.randint(0, 4096, (16, 256))
    one = torch.ones_like(ids)
    two = one.clone()
    two[::2, 100:] = 2
    cpu_s: dict[str, list[float]] = {"one document a row": [], "boundaries in half of the rows": []}
    wall_s: dict[str, list[float]] = {name: [] for name in cpu_s}
    for _ in range(options.rounds + 1):
        for name, mask in zip(cpu_s, (one, two), strict=True):
            batch = {"input_ids": ids, "labels": ids, "attention_mask": mask}
            cpu, wall = time.process_time(), time.perf_counter()
            take_step(model, [batch], optimizer, precision, device, 1.0)
            cpu_s[name].append(time.process_time() - cpu)
            wall_s[name].append(time.perf_counter() - wall)
    print(
        f"{model.get_num_params():,} parameters, {ids.numel()} tokens a step, {options.threads} "
        f"threads, {torch.__version__}"
    )
    result = {}
    for name in cpu_s:
        cpu, wall = statistics.median(cpu_s[name][1:]), statistics.median(wall_s[name][1:])
        result[name] = {"cpu_s": cpu, "wall_s": wall, "tokens_per_cpu_s": ids.numel() / cpu}
        print(f"{name:32} {cpu:.3f} CPU s  {wall:.3f} s  {ids.numel() / cpu:,.0f} tokens per CPU s")
    if options.json:
        result["versions"] = {
            "torch": torch.__version__,
            "processor": torch.backends.cpu.get_cpu_capability(),
        }
        options.json.write_text(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
