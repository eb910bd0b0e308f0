import dataclasses
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from llm_trainer.config import ModelConfig
from llm_trainer.models import TransformerLM
from llm_trainer.tokenizer import BPETokenizer

CORPUS = [
    f"def function_{n}(value):\n    return value * {n} + {n * n}  # the {word} function\n"
    for n, word in enumerate(
        ["first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth"] * 8
    )
]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def corpus() -> list[str]:
    return CORPUS


@pytest.fixture(scope="session")
def tokenizer() -> BPETokenizer:
    trained = BPETokenizer()
    trained.train(CORPUS, vocab_size=320)
    return trained


TINY = ModelConfig(
    vocab_size=61,
    d_model=32,
    n_heads=4,
    n_layers=2,
    d_ff=48,
    max_seq_len=24,
    dropout=0.0,
    attention_dropout=0.0,
)
VARIANTS = {
    "default": {},
    "modern": {
        "norm": "rmsnorm",
        "positions": "rope",
        "activation": "relu2",
        "qk_norm": True,
        "bias": False,
        "logit_softcap": 5.0,
        "n_kv_heads": 2,
    },
    "llama": {
        "norm": "rmsnorm",
        "positions": "rope",
        "activation": "swiglu",
        "bias": False,
        "tie_embeddings": False,
    },
    "post norm": {"pre_norm": False, "positions": "learned", "activation": "silu"},
}


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """Mounts a disk of some kilobytes; skips, with the reason, where that cannot be done."""
    if os.geteuid() != 0:
        pytest.skip("mounting a small file system needs root")
    mounts: list[Path] = []

    def mount(size_kb: int) -> Path:
        disk = tmp_path / "disk"
        disk.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={size_kb}k", "tmpfs", str(disk)]
        mounted = subprocess.run(command, capture_output=True, check=False)
        if mounted.returncode:
            pytest.skip(f"no tmpfs can be mounted here: {mounted.stderr.decode().strip()}")
        mounts.append(disk)
        return disk

    yield mount
    for disk in mounts:
        subprocess.run(["umount", str(disk)], check=True)


@pytest.fixture
def tiny() -> ModelConfig:
    return dataclasses.replace(TINY)


@pytest.fixture
def build() -> Callable[..., TransformerLM]:
    """Builds tiny models with their biases and norms away from zero and one, so that a forgotten one
    shows."""

    def build_with(**changes: object) -> TransformerLM:
        model = TransformerLM(ModelConfig.from_dict(TINY.to_dict() | changes))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.1)
        return model.eval()

    return build_with


@pytest.fixture(params=VARIANTS.values(), ids=VARIANTS)
def model(request: pytest.FixtureRequest, build: Callable[..., TransformerLM]) -> TransformerLM:
    return build(**request.param)


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(0, TINY.vocab_size, (3, 17))
