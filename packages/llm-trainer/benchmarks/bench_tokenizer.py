"""Seconds to train a tokenizer and to encode with it, against Hugging Face tokenizers, on one thread.

The text is the standard library's own sources, its tests left out. Both sides get the same split pattern and
vocabulary size for training, and the same file for encoding. Run with ``make bench P=llm-trainer``.
"""

from __future__ import annotations

import os

# Read when the libraries start.
os.environ["RAYON_NUM_THREADS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import sysconfig
import tempfile
from dataclasses import asdict
from pathlib import Path

import tokenizers
from llm_trainer.data import read_texts
from llm_trainer.exceptions import DataError
from llm_trainer.tokenizer import BPETokenizer
from llm_trainer.tokenizer._patterns import SPLIT_PATTERN
from measuring import environment, interleave, parse_arguments, table, write_results
from tokenizers import models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

VOCAB_SIZE = 16384


def library_sources() -> list[str]:
    root = Path(sysconfig.get_paths()["stdlib"])
    texts: list[str] = []
    for path in sorted(root.rglob("*.py")):
        if not {"site-packages", "test", "tests"}.intersection(path.relative_to(root).parts):
            try:
                texts += read_texts(path)
            except DataError:
                continue  # empty, or not UTF-8
    return texts


def train_theirs(texts: list[str]) -> tokenizers.Tokenizer:
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(SPLIT_PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=["<|bos|>", "<|eos|>", "<|pad|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def main() -> None:
    arguments = parse_arguments(__doc__ or "")
    texts = library_sources()
    megabytes = sum(len(text.encode()) for text in texts) / 1e6
    ours = BPETokenizer()

    training = interleave(
        {
            "train, llm-trainer": lambda: ours.train(texts, VOCAB_SIZE, show_progress=False),
            "train, tokenizers": lambda: train_theirs(texts),
        },
        rounds=arguments.rounds,
    )
    with tempfile.TemporaryDirectory() as folder:
        ours.save_pretrained(folder)
        theirs = tokenizers.Tokenizer.from_file(f"{folder}/tokenizer.json")
        fast = PreTrainedTokenizerFast.from_pretrained(folder)
    compared = texts[:: max(len(texts) // 400, 1)]
    for text in compared:
        ids = fast(text, split_special_tokens=True)["input_ids"]
        assert ours.encode(text) == ids, "transformers gives other ids"
    encoding = interleave(
        {
            "encode, llm-trainer": lambda: [ours.encode_ordinary(text) for text in texts],
            "encode to lists, llm-trainer": lambda: [ours.encode(text) for text in texts],
            "encode, tokenizers": lambda: [theirs.encode(text).ids for text in texts],
            "encode_batch_fast, tokenizers": lambda: [e.ids for e in theirs.encode_batch_fast(texts)],
        },
        rounds=arguments.rounds,
    )
    timings = training | encoding
    peers = {name: "train" if name in training else "encode" for name in timings}
    print(f"{megabytes:.1f} MB in {len(texts)} documents, vocabulary {ours.vocab_size}, one thread; "
          f"the ids of {len(compared)} documents equal transformers'")  # fmt: skip
    print(table(
        ["what", "CPU s", "wall s", "MB per CPU s", "times tokenizers'"],
        [
            [
                name,
                f"{timing.cpu_s:.2f}",
                f"{timing.wall_s:.2f}",
                f"{megabytes / timing.cpu_s:.1f}",
                f"{timings[f'{peers[name]}, tokenizers'].cpu_s / timing.cpu_s:.2f}",
            ]
            for name, timing in timings.items()
        ],
    ))  # fmt: skip
    results = {name: asdict(timing) for name, timing in timings.items()}
    versions = environment(["llm-trainer", "rustbpe", "tiktoken", "tokenizers", "transformers"])
    corpus = {"megabytes": megabytes, "documents": len(texts), "vocab_size": ours.vocab_size}
    target = write_results(__file__, arguments.json, {**results, "corpus": corpus, "environment": versions})
    print(f"written to {target}")


if __name__ == "__main__":
    main()
