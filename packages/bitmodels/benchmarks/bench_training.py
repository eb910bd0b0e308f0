"""Character models of tiny Shakespeare: floats, ternary, ternary with a teacher, and floats made ternary.

All have one size and one budget, and differ in nothing but the layers and the learning rate, of which ternary
weights want a higher one; bits per character on the last tenth of the text. ``--data`` or ``AV_DATA`` is the
folder that holds it. Run with ``make bench P=bitmodels``.
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
import time
from pathlib import Path
from typing import Any

os.environ |= {"OMP_NUM_THREADS": "1"}

import torch
import torch.nn.functional as F
from _twin import float_twin
from bitmodels import BitTransformerConfig, BitTransformerLM
from bitmodels.utils import finetune
from measuring import environment, table, write_results
from torch import Tensor, nn

LENGTH, BATCH = 64, 8
FLOAT_RATE, TERNARY_RATE = 3e-3, 6e-3
TEMPERATURE = 1.0


def batches(text: Tensor, steps: int, seed: int) -> list[tuple[Tensor, Tensor]]:
    """Windows of text and the characters after each of theirs."""
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(len(text) - LENGTH - 1, (steps, BATCH), generator=generator)
    windows = text[starts.unsqueeze(-1) + torch.arange(LENGTH + 1)]
    return [(window[:, :-1], window[:, 1:]) for window in windows]


def train(
    model: nn.Module, data: list[tuple[Tensor, Tensor]], rate: float, teacher: nn.Module | None = None
) -> None:
    """Train with AdamW, a cosine, and where there is a teacher half of the loss from its outputs."""
    optimizer = torch.optim.AdamW(model.parameters(), rate, weight_decay=0.01)
    rise = max(1, len(data) // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min((step + 1) / rise, 0.05 + 0.475 * (1 + math.cos(math.pi * step / len(data)))),
    )
    model.train()
    for inputs, targets in data:
        logits = model(inputs).flatten(0, 1)
        loss = F.cross_entropy(logits, targets.flatten())
        if teacher is not None:
            with torch.no_grad():
                wanted = teacher(inputs).flatten(0, 1).log_softmax(-1)
            taught = F.kl_div(logits.log_softmax(-1), wanted, reduction="batchmean", log_target=True)
            loss = 0.5 * loss + 0.5 * taught
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()


@torch.no_grad()
def bits_per_character(model: nn.Module, text: Tensor) -> float:
    """Return the mean over the text, in windows that do not overlap."""
    model.eval()
    count = (len(text) - 1) // LENGTH
    inputs = text[: count * LENGTH].view(count, LENGTH)
    targets = text[1 : count * LENGTH + 1].view(count, LENGTH)
    total = 0.0
    for some, wanted in zip(inputs.split(64), targets.split(64), strict=True):
        total += F.cross_entropy(model(some).flatten(0, 1), wanted.flatten(), reduction="sum").item()
    return total / (count * LENGTH) / math.log(2)


def one_seed(
    text: Tensor, held: Tensor, config: BitTransformerConfig, steps: int, seed: int
) -> dict[str, float]:
    """Return bits per character of each variant."""
    data = batches(text, steps, seed)
    found: dict[str, float] = {}

    def fresh() -> BitTransformerLM:
        torch.manual_seed(seed)
        return BitTransformerLM(config)

    floats = float_twin(fresh())
    train(floats, data, FLOAT_RATE)
    found["float"] = bits_per_character(floats, held)
    ternary = fresh()
    train(ternary, data, TERNARY_RATE)
    found["ternary"] = bits_per_character(ternary, held)
    found["ternary, deployed"] = bits_per_character(ternary.deploy(), held)
    taught = fresh()
    train(taught, data, TERNARY_RATE, floats.eval())
    found["ternary, with the float model as teacher"] = bits_per_character(taught, held)
    converted = fresh()
    converted.load_state_dict(floats.state_dict())
    found["float, rounded without training"] = bits_per_character(converted, held)
    finetune(
        converted,
        data[: len(data) // 2],
        learning_rate=FLOAT_RATE,
        warmup=0.5,
        teacher=floats,
        temperature=TEMPERATURE,
        show_progress=False,
    )
    found["float, rounded and fine-tuned for half the steps"] = bits_per_character(converted, held)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=os.environ.get("AV_DATA"), help="folder of the text")
    parser.add_argument("--steps", type=int, default=2500)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--size", type=int, default=96, help="of the residual stream (default 96)")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if options.data is None:
        parser.error("give --data or AV_DATA: the folder of tinyshakespeare/input.txt")
    torch.set_num_threads(1)
    characters = (Path(options.data) / "tinyshakespeare" / "input.txt").read_text()
    known = sorted(set(characters))
    ids = torch.tensor([known.index(character) for character in characters])
    text, held = ids[: len(ids) * 9 // 10], ids[len(ids) * 9 // 10 :]
    config = BitTransformerConfig(
        vocab_size=len(known),
        hidden_size=options.size,
        intermediate_size=options.size * 8 // 3 // 16 * 16,
        num_hidden_layers=options.layers,
        num_attention_heads=4,
        max_position_embeddings=LENGTH,
        hidden_act="silu",
    )
    runs: list[dict[str, Any]] = []
    for seed in range(options.seeds):
        start = time.process_time()
        found = one_seed(text, held, config, options.steps, seed)
        runs.append({"seed": seed, "cpu_s": time.process_time() - start, "bits": found})
        print(f"seed {seed}: " + ", ".join(f"{name} {bits:.3f}" for name, bits in found.items()), flush=True)
    means = {name: statistics.mean(run["bits"][name] for run in runs) for name in runs[0]["bits"]}
    print(
        table(
            ["", "bits a character", "against float"],
            [[name, f"{bits:.3f}", f"{bits / means['float'] - 1:+.1%}"] for name, bits in means.items()],
        )
    )
    results = {
        "environment": environment(["torch"]),
        "config": config.to_dict(),
        "steps": options.steps,
        "runs": runs,
    }
    print(f"written to {write_results(__file__, options.json, results)}")


if __name__ == "__main__":
    main()
