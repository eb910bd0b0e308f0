"""The text that a `DataConfig` names."""

from __future__ import annotations

import dataclasses

from llm_trainer.config import DataConfig
from llm_trainer.data._sources import Source, find_dataset, find_files
from llm_trainer.exceptions import DataError


def training_source(data: DataConfig) -> Source:
    """Find the text to train on.

    Raises:
        DataError: It does not exist.
    """
    if data.train_file is not None:
        return find_files(data.train_file, data.file_patterns, data.text_column)
    return find_dataset(
        data.dataset_name, data.dataset_config, data.dataset_split, data.text_column, data.file_patterns
    )


def held_out(data: DataConfig) -> DataConfig | None:
    """Return a configuration whose training text is the text that `data` evaluates on; None without any."""
    if data.validation_file is not None:
        return dataclasses.replace(data, train_file=data.validation_file, validation_file=None)
    if data.train_file is None and data.validation_split is not None:
        return dataclasses.replace(data, dataset_split=data.validation_split, validation_split=None)
    return None


def check_text(data: DataConfig) -> None:
    """Read the first document to train and the first to evaluate on.

    Raises:
        DataError: One does not exist, is not text, or is empty.
    """
    for config in (data, held_out(data)):
        if config is not None:
            source = training_source(config)
            if next(iter(source.texts()), None) is None:
                raise DataError(f"{source.name} is empty; there is nothing to read.")
