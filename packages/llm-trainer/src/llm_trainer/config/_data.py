"""Where the text comes from and how it becomes rows of tokens."""

from __future__ import annotations

from collections.abc import Iterable
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
        for name in ("train_file", "validation_file"):
            value = getattr(self, name)
            if value is not None:
                setattr(self, name, str(value))
        patterns: object = self.file_patterns
        if isinstance(patterns, str) or not isinstance(patterns, Iterable) or not patterns:
            self._refuse("file_patterns", 'a list of file name patterns, such as ["*.txt", "*.md"]')
        self.file_patterns = tuple(str(pattern) for pattern in cast("Iterable[object]", patterns))
