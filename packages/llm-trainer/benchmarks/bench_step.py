"""Seconds of one training step on a CPU, with and without document boundaries in the rows.

Run with ``make bench P=llm-trainer``.
"""

from __future__ import annotations

from dataclasses import asdict

import torch
from llm_trainer.config import ModelConfig, TrainingConfig
from llm_trainer.models import TransformerLM
from llm_trainer.training import create_optimizer, set_seed
from llm_trainer.training._precision import Precision
from llm_trainer.training._step import take_step
from measuring import environment, interleave, parse_arguments, table, write_results


def main() -> None:
    arguments = parse_arguments(__doc__ or "")
    torch.set_num_threads(1)
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

    def step(mask: torch.Tensor) -> None:
        batch = {"input_ids": ids, "labels": ids, "attention_mask": mask}
        take_step(model, [batch], optimizer, precision, device, 1.0)

    timings = interleave(
        {"one document a row": lambda: step(one), "boundaries in half of the rows": lambda: step(two)},
        rounds=arguments.rounds,
    )
    print(f"{model.get_num_params():,} parameters, {ids.numel()} tokens a step, one thread, bfloat16")
    print(table(
        ["rows", "CPU s a step", "wall s", "tokens per CPU s"],
        [
            [name, f"{timing.cpu_s:.3f}", f"{timing.wall_s:.3f}", f"{ids.numel() / timing.cpu_s:,.0f}"]
            for name, timing in timings.items()
        ],
    ))  # fmt: skip
    results = {name: asdict(timing) for name, timing in timings.items()}
    target = write_results(
        __file__, arguments.json, {**results, "environment": environment(["llm-trainer", "torch"])}
    )
    print(f"written to {target}")


if __name__ == "__main__":
    main()
