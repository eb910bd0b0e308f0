"""Where the text comes from and how it becomes rows of tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, cast

from llm_trainer.config._base import Config

PACKINGS = ("best_fit", "concatenate")
FILE_PATTERNS = ("*.txt", "*.jsonl", "*.jsonl.gz", "*.parquet")


@dataclass
class DataConfig(Config):
    """Settings of the data, read by `llm_trainer.data.load_splits`.

    With `train_file` the text is read from files, else from the data set `dataset_name`.
    """

    section: ClassVar[str] = "data"

    dataset_name: str = "wikitext"
    """A Hugging Face data set; or a path: of one that was saved with `save_to_disk`, of a file (text,
    `.jsonl`, `.jsonl.gz`, `.parquet`), or of a folder of such files; or `python-stdlib`, the sources of
    Python's standard library. `llm_trainer.data.read_dataset` says more."""
    dataset_config: str | None = "wikitext-103-raw-v1"
    """Configuration of the Hugging Face data set; not read for a path or `python-stdlib`."""
    dataset_split: str = "train"
    """Split to train on."""
    validation_split: str | None = "validation"
    """Split of the data set to evaluate on; None evaluates on `validation_file` or nothing. Not read with
    `train_file`."""
    text_column: str = "text"
    """Column, or key of a JSON line, that holds the text."""
    train_file: str | None = None
    """File or folder to train on, instead of the data set. A text file of more than 16 MiB is cut into
    documents of at most that, between lines."""
    validation_file: str | None = None
    """File or folder to evaluate on, instead of the validation split."""
    file_patterns: tuple[str, ...] = FILE_PATTERNS
    """Names of the files that are read from a folder, at any depth."""
    max_length: int = 1024
    """Tokens in a row."""
    min_length: int = 10
    """Documents of fewer tokens, special ones not counted, are dropped."""
    vocab_size: int = 50000
    """Vocabulary of a tokenizer that is trained on the training text; at least 259, the bytes and the special
    tokens."""
    tokenizer: str = "bpe"
    """Kind of that tokenizer, `bpe` or `char`; or the folder of one that is trained already."""
    pack_sequences: bool = True
    """Fill rows with several documents; False gives each document rows of its own, padded at the end."""
    packing: str = "best_fit"
    """`best_fit` cuts only documents that are longer than a row; `concatenate` puts all behind one another
    and cuts wherever a row is full."""
    cache_dir: str | None = None
    """Folder of the token files and the trained tokenizer, which are reused while text, tokenizer and
    settings stay the same; nothing in it is deleted but what a crash left. None means `data` in the run's
    folder, or no files (tokens in memory) where there is none."""
    preprocessing_num_workers: int = 4
    """Threads that tokenize."""
    dataloader_num_workers: int = 4
    """Most processes that prepare batches, where `TrainingConfig.dataloader_num_workers` is None: there are
    never more than cores."""

    def validate(self) -> None:
        """Check every field.

        Raises:
            ConfigurationError: A value is impossible; the message says what is allowed.
        """
        self._check_int("max_length", least=2, most=2**20)
        self._check_int("min_length", least=0)
        self._check_int("vocab_size", least=259)
        self._check_int("preprocessing_num_workers", least=1, most=1024)
        self._check_int("dataloader_num_workers", least=0, most=1024)
        self._check_flags("pack_sequences")
        self._check_choice("packing", PACKINGS)
        self._check_paths("train_file", "validation_file", "cache_dir", "dataset_name", "tokenizer")
        self._check_text("dataset_name", "dataset_split", "text_column", "tokenizer")
        self._check_text("dataset_config", "validation_split", optional=True)
        patterns: object = self.file_patterns
        if (
            not isinstance(patterns, list | tuple)
            or not patterns
            or not all(isinstance(pattern, str) for pattern in cast("Sequence[object]", patterns))
        ):
            self._refuse("file_patterns", 'a list of file name patterns, such as ["*.txt", "*.md"]')
        self.file_patterns = tuple(cast("Sequence[str]", patterns))
