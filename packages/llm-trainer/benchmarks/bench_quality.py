"""What a budget of tokens buys: the presets, and nanoGPT's choices, on held-out text.

Every recipe trains a model of the same size, on the same rows in the same order, for the same number of
tokens; the held-out loss is the mean over whole files that none of them has seen. The GPT-2-like recipes are
run at several learning rates, of which the best counts. Run with ``make bench P=llm-trainer``.
"""

from __future__ import annotations

import argparse
import math
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from llm_trainer.config import DataConfig, ModelConfig, TrainingConfig
from llm_trainer.data import load_splits
from llm_trainer.models import TransformerLM
from llm_trainer.training import Trainer, set_seed
from llm_trainer.utils.metrics import bits_per_byte
from measuring import environment, table, write_results

GPT2 = {"optimizer": "adamw", "weight_decay": 0.1, "betas": (0.9, 0.95), "lr_scheduler": "cosine",
        "warmup_steps": None, "warmup_ratio": 0.05, "min_lr_ratio": 0.1}  # fmt: skip
# What nanoGPT's configurations say of a small model on one machine, with its warm-up as a share of the run.
NANOGPT = {"optimizer": "adamw", "weight_decay": 0.1, "betas": (0.9, 0.99), "lr_scheduler": "cosine",
           "warmup_steps": None, "warmup_ratio": 0.02, "min_lr_ratio": 0.1}  # fmt: skip
SPEEDRUN = {"optimizer": "muon", "learning_rate": 3e-3, "muon_learning_rate": 0.02, "weight_decay": 0.01,
            "betas": (0.9, 0.95), "lr_scheduler": "warmup_stable_decay", "decay_ratio": 0.5,
            "warmup_steps": None, "warmup_ratio": 0.02, "min_lr_ratio": 0.0}  # fmt: skip
LLAMA = {**GPT2, "learning_rate": 2e-3}


def recipes(size: str) -> dict[str, tuple[str, dict[str, Any], dict[str, Any]]]:
    """Name, preset, changes of the model, settings of the training."""
    made: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
        "speedrun": (f"speedrun-{size}", {}, SPEEDRUN)
    }
    for rate in (1e-3, 2e-3, 6e-4):
        plain = {"dropout": 0.0, "attention_dropout": 0.0, "bias": False}
        made[f"nanoGPT, lr {rate:g}"] = (f"gpt2-{size}", plain, {**NANOGPT, "learning_rate": rate})
        made[f"gpt2, lr {rate:g}"] = (f"gpt2-{size}", {}, {**GPT2, "learning_rate": rate})
    made["llama"] = (f"llama-{size}", {}, LLAMA)
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", default="mini", help="size of the presets (default mini, 20M parameters)")
    parser.add_argument("--steps", type=int, default=250, help="steps of 4,096 tokens (default 250)")
    parser.add_argument("--seeds", type=int, default=1, help="seeds of each recipe (default 1)")
    parser.add_argument("--only", nargs="*", help="recipes to run, by the beginning of their names")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, help="not used: a training is one round")
    parser.add_argument("--json", type=Path, help="where to write the results (default: results/ beside it)")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as cache:
        splits = load_splits(
            DataConfig(dataset_name="python-stdlib", vocab_size=8192, max_length=512, cache_dir=cache)
        )
        assert splits.validation is not None
        held_out = torch.utils.data.Subset(splits.validation, range(min(400, len(splits.validation))))
        for name, (preset, changes, settings) in recipes(arguments.size).items():
            if arguments.only and not name.startswith(tuple(arguments.only)):
                continue
            for seed in range(arguments.seeds):
                set_seed(seed)
                model = TransformerLM(
                    ModelConfig.preset(
                        preset, vocab_size=splits.tokenizer.vocab_size, max_seq_len=512, **changes
                    )
                )
                config = TrainingConfig(
                    batch_size=8,
                    max_steps=arguments.steps,
                    eval_strategy="no",
                    seed=seed,
                    amp_dtype="bfloat16",
                    checkpoint_dir=None,
                    report_to=(),
                    logging_steps=arguments.steps,
                    **settings,
                )
                trainer = Trainer(
                    model, splits.tokenizer, config, splits.train, held_out, device="cpu", show_progress=False
                )
                began = time.process_time()
                history = trainer.train()
                cpu_s = time.process_time() - began
                result = trainer.evaluate()
                rows.append({
                    "recipe": name, "seed": seed, "parameters": model.get_num_params(),
                    "trained_tokens": history.records[-1].tokens, "held_out_tokens": result["tokens"],
                    "loss": result["loss"], "cpu_s": cpu_s,
                    "bits_per_byte": bits_per_byte(result["loss"], splits.validation),
                })  # fmt: skip
                print(f"{name}, seed {seed}: held-out loss {result['loss']:.4f} after {cpu_s:.0f} CPU s",
                      flush=True)  # fmt: skip
    best = min((row["loss"] for row in rows if row["recipe"].startswith("gpt2")), default=math.nan)
    print()
    print(table(
        ["recipe", "seed", "parameters", "tokens", "held-out loss", "bits a byte", "against gpt2", "CPU s"],
        [
            [row["recipe"], row["seed"], f"{row['parameters']:,}", f"{row['trained_tokens']:,}",
             f"{row['loss']:.4f}", f"{row['bits_per_byte']:.3f}", f"{row['loss'] / best - 1:+.1%}",
             f"{row['cpu_s']:.0f}"]
            for row in rows
        ],
    ))  # fmt: skip
    target = write_results(
        __file__, arguments.json, {"rows": rows, "environment": environment(["llm-trainer", "torch"])}
    )
    print(f"written to {target}")


if __name__ == "__main__":
    main()
