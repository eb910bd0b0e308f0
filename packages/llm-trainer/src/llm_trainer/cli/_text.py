"""The text that a `DataConfig` names."""

from __future__ import annotations

from llm_trainer.config import DataConfig
from llm_trainer.data._splits import held_out, training_source
from llm_trainer.exceptions import DataError


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
