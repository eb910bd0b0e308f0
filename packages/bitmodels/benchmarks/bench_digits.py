"""Handwritten digits (scikit-learn's 1,797 images of 8 x 8): ternary networks against the same with floats.

Three layers of 128, and the convolutional network; the same training for both, five seeds, accuracy on a
fifth of the images. Run with ``make bench P=bitmodels``.
"""

from __future__ import annotations

import argparse
import os
import statistics
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
SEEDS, EPOCHS, BATCH = 5, 40, 64


def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Train on four fifths, return the accuracy on the rest."""
    cut = len(images) * 4 // 5
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3, weight_decay=0.01)
    steps = EPOCHS * -(-cut // BATCH)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(EPOCHS):
        for some in torch.randperm(cut).split(BATCH):
            loss = F.cross_entropy(model(images[some]), labels[some])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    with torch.no_grad():
        return float((model.eval()(images[cut:]).argmax(-1) == labels[cut:]).float().mean())


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
        found: dict[str, list[float]] = {"ternary": [], "float": []}
        for seed in range(SEEDS):
            for kind, accuracies in found.items():
                torch.manual_seed(seed)
                model = AutoBitModel.from_config(config)
                accuracies.append(accuracy(model if kind == "ternary" else float_twin(model), images, labels))
        means = {kind: statistics.mean(accuracies) for kind, accuracies in found.items()}
        rows.append([name, *(f"{mean:.2%}" for mean in means.values())])
        rows[-1].append(f"{100 * (means['ternary'] - means['float']):+.2f} points")
        results[name] = found
        print(rows[-1], flush=True)
    print(table(["", "ternary", "float", "difference"], rows))
    path = write_results(__file__, options.json, {"environment": environment(["torch"]), **results})
    print(f"written to {path}")


if __name__ == "__main__":
    main()
