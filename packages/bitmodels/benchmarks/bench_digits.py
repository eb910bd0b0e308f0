"""Handwritten digits (scikit-learn's 1,797 images of 8 x 8): ternary networks against the same with floats.

Three layers of 128, and the convolutional network; the same training for both, in five folds with a seed
each, so that each image is tested once. Run with ``make bench P=bitmodels``.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

os.environ |= {"OMP_NUM_THREADS": "1"}

import torch
import torch.nn.functional as F
from _twin import float_twin
from bitmodels import AutoBitModel, BitCNNConfig, BitMLPConfig
from measuring import environment, table, write_results
from sklearn.datasets import load_digits
from torch import Tensor, nn

CONFIGS = {
    "three layers, with norms": BitMLPConfig(3, 64, 128, 10),
    "three layers, without norms": BitMLPConfig(3, 64, 128, 10, norm=False),
    "convolutions": BitCNNConfig(1, 10, (16, 32)),
}
FOLDS, EPOCHS, BATCH = 5, 40, 64


def right(model: nn.Module, images: Tensor, labels: Tensor, held: Tensor) -> Tensor:
    """Train on what is not held out, and return for each of the rest whether it is named rightly."""
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3, weight_decay=0.01)
    trained = (~held).nonzero().flatten()
    steps = EPOCHS * -(-len(trained) // BATCH)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(EPOCHS):
        for some in trained[torch.randperm(len(trained))].split(BATCH):
            loss = F.cross_entropy(model(images[some]), labels[some])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    with torch.no_grad():
        return model.eval()(images[held]).argmax(-1) == labels[held]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    digits = load_digits()
    order = torch.randperm(len(digits.target), generator=torch.Generator().manual_seed(0))
    flat = torch.tensor(digits.data, dtype=torch.float32)[order] / 16
    labels = torch.tensor(digits.target)[order]
    rows: list[list[object]] = []
    results: dict[str, Any] = {}
    for name, config in CONFIGS.items():
        images = flat.view(-1, 1, 8, 8) if isinstance(config, BitCNNConfig) else flat
        found: dict[str, list[Tensor]] = {"ternary": [], "float": []}
        for fold in range(FOLDS):
            held = torch.arange(len(labels)) % FOLDS == fold
            for kind, answers in found.items():
                torch.manual_seed(fold)
                model = AutoBitModel.from_config(config)
                answers.append(right(model if kind == "ternary" else float_twin(model), images, labels, held))
        ternary, floats = (torch.cat(answers).double() for answers in found.values())
        # Both answered for the same images, so the interval is that of the differences.
        difference = 100 * (ternary - floats)
        interval = 1.96 * float(difference.std()) / len(difference) ** 0.5
        rows.append([name, f"{float(ternary.mean()):.2%}", f"{float(floats.mean()):.2%}"])
        rows[-1].append(f"{float(difference.mean()):+.2f} +- {interval:.2f} points")
        results[name] = {
            "images": len(labels),
            "right": {kind: [int(each.sum()) for each in answers] for kind, answers in found.items()},
            "difference_points": float(difference.mean()),
            "interval_points": interval,
        }
        print(rows[-1], flush=True)
    print(table(["", "ternary", "float", "difference (95%)"], rows))
    path = write_results(__file__, options.json, {"environment": environment(["torch"]), **results})
    print(f"written to {path}")


if __name__ == "__main__":
    main()
