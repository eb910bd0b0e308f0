"""Where the text comes from and how it becomes rows of tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

from llm_trainer.config._base import Config


@dataclass
class DataConfig(Config):
    """Settings of the data, read by `llm_trainer.data.load_splits`."""

    train_file: str | None = None
    """Text file, or folder of them, to train on."""
    validation_file: str | None = None
    """Text file, or folder of them, to evaluate on."""
    file_patterns: tuple[str, ...] = ("*.txt",)
    """Names of the files that are read from a folder, at any depth."""
    max_length: int = 1024
    """Tokens in a row."""
    min_length: int = 10
    """Documents of fewer tokens, special ones not counted, are dropped."""
    vocab_size: int = 50000
    """Vocabulary of a tokenizer that is trained on `train_file`; at least 259, the bytes and the special
    tokens."""
    pack_sequences: bool = True
    """Fill rows with several documents; False gives each document rows of its own, padded at the end."""

    def validate(self) -> None:
        """Check every field.

        Raises:
            ConfigurationError: A value is impossible; the message says what is allowed.
        """
        self._check_int("max_length", least=2)
        self._check_int("min_length", least=0)
        self._check_int("vocab_size", least=259)
        self._check_flags("pack_sequences")
        self._check_paths("train_file", "validation_file")
        patterns: object = self.file_patterns
        if not isinstance(patterns, list | tuple) or not patterns:
            self._refuse_patterns()
        for pattern in cast("Sequence[object]", patterns):
            if not isinstance(pattern, str):
                self._refuse_patterns()
        self.file_patterns = tuple(self.file_patterns)

    def _refuse_patterns(self) -> None:
        self._refuse("file_patterns", 'a list of file name patterns, such as ["*.txt", "*.md"]')
