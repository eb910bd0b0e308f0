"""What `llm-trainer tokenize` does."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator
from pathlib import Path

import typer

from llm_trainer.cli._settings import TRAINED_KINDS, read_data
from llm_trainer.cli._table import print_table
from llm_trainer.config import DataConfig
from llm_trainer.data import load_splits
from llm_trainer.data._splits import training_source
from llm_trainer.exceptions import ConfigurationError
from llm_trainer.tokenizer import Tokenizer, create_tokenizer, load_tokenizer
from llm_trainer.training.utils import setup_logging


def train_tokenizer(
    output_dir: Path,
    *,
    files: list[str] | None,
    config: Path | None,
    vocab_size: int | None,
    kind: str,
    log_level: str,
) -> None:
    """Train a tokenizer on files or on the text of a configuration, and write it.

    Raises:
        ConfigurationError: There is neither or both, or the kind is unknown.
        DataError: A text is missing, empty or not text.
        TokenizerError: The vocabulary is too small.
    """
    setup_logging(log_level)
    if (config is None) == (not files):
        raise ConfigurationError("Give the text to learn from: either --files PATH... or --config FILE.")
    if kind not in TRAINED_KINDS:
        raise ConfigurationError(f"--kind is {kind!r}; it must be one of {', '.join(TRAINED_KINDS)}.")
    base = DataConfig() if config is None else read_data(config)[0]
    # A vocabulary size that is too small is refused by the configuration.
    base = dataclasses.replace(base, vocab_size=base.vocab_size if vocab_size is None else vocab_size)
    parts = (
        [base] if config is not None else [dataclasses.replace(base, train_file=file) for file in files or ()]
    )
    sources = [training_source(part) for part in parts]

    def texts() -> Iterator[str]:
        for source in sources:
            yield from source.texts()

    tokenizer = create_tokenizer(kind)
    tokenizer.train(texts(), base.vocab_size)
    tokenizer.save_pretrained(output_dir)
    stats = {name.replace("_", " "): value for name, value in tokenizer.get_vocab_stats().items()}
    print_table(f"Tokenizer in {output_dir}", {"kind": kind, **stats})


def encode_texts(
    directory: Path, texts: list[str] | None, *, special_tokens: bool, pieces: bool, log_level: str
) -> None:
    """Print the ids, or the tokens, of each text; of standard input without any."""
    setup_logging(log_level)
    tokenizer = _load(directory)
    for text in texts or [sys.stdin.read()]:
        ids = tokenizer.encode(text, add_special_tokens=special_tokens)
        typer.echo(" ".join(repr(_text(tokenizer, i)) if pieces else str(i) for i in ids))


def decode_ids(directory: Path, ids: list[int] | None, *, special_tokens: bool, log_level: str) -> None:
    """Print the text of ids; without any, of each line of standard input.

    Raises:
        ConfigurationError: A line holds something else.
        TokenizerError: An id is not in the vocabulary.
    """
    setup_logging(log_level)
    tokenizer = _load(directory)
    lines = [ids] if ids else map(_numbers, sys.stdin)
    for line in lines:
        typer.echo(tokenizer.decode(line, skip_special_tokens=not special_tokens))


def prepare_data(config: Path, output_dir: Path, *, tokenizer: Path | None, log_level: str) -> None:
    """Write the token files of a configuration's text.

    Raises:
        DataError: A text is missing, empty or not text.
    """
    setup_logging(log_level)
    data, _ = read_data(config)
    data = dataclasses.replace(data, cache_dir=str(output_dir))
    splits = load_splits(data, None if tokenizer is None else _load(tokenizer))
    for name, rows in (("train", splits.train), ("validation", splits.validation)):
        if rows is not None:
            stats = {key.replace("_", " "): value for key, value in rows.get_stats().items()}
            print_table(f"{name}, in {output_dir}", stats)


def _load(directory: Path) -> Tokenizer:
    if not directory.exists():
        raise ConfigurationError(f"{directory} does not exist; give a folder with a tokenizer.json.")
    return load_tokenizer(directory)


def _text(tokenizer: Tokenizer, token_id: int) -> str:
    return tokenizer.decode([token_id], skip_special_tokens=False)


def _numbers(line: str) -> list[int]:
    try:
        return [int(word) for word in line.split()]
    except ValueError as error:
        raise ConfigurationError(f"Token ids are whole numbers: {error}.") from error
