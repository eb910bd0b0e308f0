"""Preparing tokens, packing them and reading batches, in CPU seconds of one thread.

Run with ``make bench P=llm-trainer``.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

os.environ |= {"RAYON_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}

import datasets
import numpy as np
import tokenizers
import torch
from llm_trainer.config import ModelConfig
from llm_trainer.data import LanguageModelingDataset, TokenStore, create_dataloader, read_dataset
from llm_trainer.data._packing import best_fit
from llm_trainer.models import TransformerLM
from llm_trainer.tokenizer import BPETokenizer
from measuring import Timing, environment, interleave, parse_arguments, table, write_results

TEXT_MB = 4
ROW, BATCH = 512, 4


def main() -> None:
    arguments = parse_arguments(__doc__ or "")
    torch.set_num_threads(1)
    datasets.disable_progress_bars()
    datasets.disable_caching()
    every = list(read_dataset("python-stdlib"))
    texts = every[: np.searchsorted(np.cumsum([len(text) for text in every]), TEXT_MB * 1e6)]
    tokenizer = BPETokenizer()
    tokenizer.train(every, vocab_size=16384)
    with tempfile.TemporaryDirectory() as folder:
        results = {
            "prepare": prepare(texts, tokenizer, Path(folder), arguments.rounds),
            "read": read(every, tokenizer, Path(folder), arguments.rounds),
            "pack": pack(arguments.rounds),
        }
    packages = ["llm-trainer", "torch", "numpy", "tiktoken", "tokenizers", "datasets"]
    target = write_results(__file__, arguments.json, {**results, "environment": environment(packages)})
    print(f"written to {target}")


def prepare(texts: list[str], tokenizer: BPETokenizer, folder: Path, rounds: int) -> dict[str, Any]:
    tokenizer.save_pretrained(folder / "tokenizer")
    peer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer" / "tokenizer.json"))
    rows = datasets.Dataset.from_dict({"text": texts})

    def encode(batch: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        return {
            "ids": [encoding.ids for encoding in peer.encode_batch(batch["text"], add_special_tokens=False)]
        }

    def with_datasets() -> datasets.Dataset:
        return rows.map(
            encode, batched=True, remove_columns=["text"], cache_file_name=str(folder / "map.arrow")
        )

    def with_store() -> TokenStore:
        return TokenStore.create(folder / "store", texts, tokenizer)

    store = with_store()
    assert store.tokens.tolist() == [
        token
        for row in with_datasets()["ids"]
        for token in (tokenizer.bos_token_id, *row, tokenizer.eos_token_id)
    ]
    tokens = store.meta["num_tokens"]
    timings = interleave({"TokenStore": with_store, "datasets.map": with_datasets}, rounds=rounds)
    print(f"{store.text_bytes / 1e6:.1f} MB of the standard library, {tokens:,} tokens, vocabulary 16384")
    print(table(
        ["text to token file", "M tokens per CPU s", "MB per CPU s", "wall s"],
        [
            [
                name,
                f"{tokens / timing.cpu_s / 1e6:.2f}",
                f"{store.text_bytes / timing.cpu_s / 1e6:.1f}",
                f"{timing.wall_s:.2f}",
            ]
            for name, timing in timings.items()
        ],
    ))  # fmt: skip
    opening = interleave({"open and verify": lambda: TokenStore.open(folder / "store")}, rounds=rounds)
    size = sum(entry["bytes"] for entry in store.meta["files"].values())
    print(f"opening verifies {size / opening['open and verify'].cpu_s / 1e6:,.0f} MB per CPU s")
    return _plain(timings | opening) | {"tokens": tokens, "bytes": store.text_bytes}


def read(texts: list[str], tokenizer: BPETokenizer, folder: Path, rounds: int) -> dict[str, Any]:
    store = TokenStore.create(folder / "all", texts, tokenizer)
    model = TransformerLM(
        ModelConfig(
            vocab_size=16384,
            d_model=384,
            n_heads=6,
            n_layers=8,
            d_ff=1536,
            max_seq_len=ROW,
            dropout=0.0,
            attention_dropout=0.0,
        )
    )
    loaders = {
        packing: create_dataloader(
            LanguageModelingDataset.from_store(store, ROW, packing=packing), BATCH, drop_last=True, seed=0
        )
        for packing in ("best_fit", "concatenate")
    }
    batch = next(iter(loaders["best_fit"]))

    def step() -> None:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model(**batch)["loss"]
        loss.backward()
        model.zero_grad()

    def one_epoch(packing: str) -> Callable[[], int]:
        return lambda: sum(1 for _ in loaders[packing])

    timings = interleave({packing: one_epoch(packing) for packing in loaders}, rounds=rounds)
    steps = interleave({"step": step}, rounds=5)
    print(
        f"a batch of {BATCH} x {ROW} tokens, against the forward and backward pass of "
        f"{model.get_num_params() / 1e6:.1f}M parameters in bfloat16 ({steps['step'].cpu_s:.2f} CPU s)"
    )
    rows = []
    for packing, timing in timings.items():
        cost = timing.cpu_s / len(loaders[packing])
        fill = loaders[packing].dataset.get_stats()["fill"]
        rows.append([packing, f"{fill:.2%}", f"{cost * 1e6:.0f}", f"{cost / steps['step'].cpu_s:.3%}"])
    print(table(["packing", "fill", "CPU us a batch", "of a step"], rows))
    return _plain(timings | steps) | {"batches": len(loaders["best_fit"])}


def pack(rounds: int) -> dict[str, Any]:
    lengths = np.random.default_rng(0).lognormal(6, 1.2, 1_000_000).astype(np.int64) + 3
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    timing = interleave({"pack": lambda: best_fit(offsets, 1024)}, rounds=rounds)
    fill = offsets[-1] / 1024 / (len(best_fit(offsets, 1024).firsts) - 1)
    print(
        f"best fit of 1,000,000 documents, {offsets[-1] / 1e6:.0f}M tokens, in rows of 1024: "
        f"{timing['pack'].cpu_s:.2f} CPU s, {fill:.3%} filled"
    )
    return _plain(timing) | {"fill": float(fill)}


def _plain(timings: dict[str, Timing]) -> dict[str, Any]:
    return {name: asdict(timing) for name, timing in timings.items()}


if __name__ == "__main__":
    main()
