"""Training and validation data as a `DataConfig` describes them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from llm_trainer.config import DataConfig
from llm_trainer.data._dataset import LanguageModelingDataset
from llm_trainer.data._sources import read_texts
from llm_trainer.exceptions import DataError
from llm_trainer.tokenizer import BPETokenizer


@dataclass(frozen=True)
class Splits:
    """What `load_splits` returns."""

    tokenizer: BPETokenizer
    """The tokenizer that was given, or trained on the training text."""
    train: LanguageModelingDataset
    """Rows to train on."""
    validation: LanguageModelingDataset | None
    """Rows to evaluate on; None without `validation_file`."""


def load_splits(config: DataConfig, tokenizer: BPETokenizer | None = None) -> Splits:
    """Read the files of `config`, with a tokenizer trained on the training text if none is given.

    Raises:
        DataError: `train_file` is not set, or a file is missing, empty or not text.
    """
    if config.train_file is None:
        raise DataError("DataConfig.train_file is None; set it to a text file or a folder of them.")
    # Both paths are looked at before the long work starts.
    train_texts = read_texts(config.train_file, config.file_patterns)
    validation_texts = (
        None if config.validation_file is None else read_texts(config.validation_file, config.file_patterns)
    )
    if tokenizer is None:
        tokenizer = BPETokenizer()
        tokenizer.train(train_texts, vocab_size=config.vocab_size)
        train_texts = read_texts(config.train_file, config.file_patterns)
    validation = None if validation_texts is None else _rows(validation_texts, tokenizer, config)
    return Splits(tokenizer, _rows(train_texts, tokenizer, config), validation)


def _rows(texts: Iterator[str], tokenizer: BPETokenizer, config: DataConfig) -> LanguageModelingDataset:
    return LanguageModelingDataset(
        texts, tokenizer, config.max_length, config.pack_sequences, min_length=config.min_length
    )
