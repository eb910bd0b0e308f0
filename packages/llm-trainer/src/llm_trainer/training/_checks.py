"""What can be found wrong with a run before it begins."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Sized
from typing import cast

from torch import Tensor
from torch.utils.data import Dataset, IterableDataset

from llm_trainer._files import shown
from llm_trainer.config import ModelConfig, TrainingConfig
from llm_trainer.exceptions import ConfigurationError, ModelConfigurationError, TrainingError
from llm_trainer.training.callbacks import Callback, EarlyStopping

Rows = Dataset[dict[str, Tensor]]


def configured_callbacks(config: TrainingConfig) -> list[Callback]:
    """Return the callbacks that a configuration asks for."""
    patience = config.early_stopping_patience
    return [] if patience is None else [EarlyStopping(patience, config.early_stopping_threshold)]


def check_evaluations(config: TrainingConfig, callbacks: Sequence[Callback], *, has_rows: bool) -> None:
    """Refuse what waits for evaluations where there will be none.

    Raises:
        ConfigurationError: It stops early or evaluates after each epoch, and there is nothing to evaluate on,
            or `eval_strategy` is `no`. The default strategy asks for nothing.
    """
    stops_early = any(isinstance(callback, EarlyStopping) for callback in callbacks)
    if stops_early and config.eval_strategy == "no":
        raise ConfigurationError(
            'Early stopping takes evaluations, and eval_strategy is "no"; set it to "steps" or "epoch", or '
            "early_stopping_patience to None."
        )
    if not has_rows and (stops_early or config.eval_strategy == "epoch"):
        what = "Early stopping" if stops_early else 'eval_strategy="epoch"'
        remedy = "early_stopping_patience=None" if stops_early else 'eval_strategy="steps" or "no"'
        raise ConfigurationError(
            f"{what} takes evaluations, and there is nothing to evaluate on; give eval_dataset to "
            f"Trainer(...), or validation_file in the data's configuration, or set {remedy}."
        )


def check_length(max_length: int, config: ModelConfig) -> None:
    """Refuse rows that are longer than the model reads.

    Raises:
        ModelConfigurationError: They are.
    """
    if max_length > config.max_seq_len:
        raise ModelConfigurationError(
            f"Rows of {max_length} tokens are longer than the model's max_seq_len ({config.max_seq_len}); "
            f"make the rows with max_length={config.max_seq_len}, or the model with a larger max_seq_len."
        )


def check_rows(name: str, dataset: Rows, config: ModelConfig) -> None:
    """Look at the number of rows and their length: the one that the dataset tells, or that of its first row.

    A stream is believed, for its first row can be read only once.

    Raises:
        TrainingError: There is none, or the first is not one.
        ModelConfigurationError: They are longer than the model reads.
    """
    length = getattr(dataset, "max_length", None)
    if not isinstance(dataset, IterableDataset):
        if not len(cast("Sized", dataset)):
            raise TrainingError(f"The {name} dataset has no rows.")
        if length is None:
            row: object = dataset[0]
            if not isinstance(row, Mapping) or not {"input_ids", "labels"} <= row.keys():
                raise TrainingError(
                    f"The first row of the {name} dataset is {shown(cast('object', row))}; a row is a "
                    "dictionary with input_ids and labels."
                )
            length = len(cast("Mapping[str, Tensor]", row)["input_ids"])
    check_length(length or 0, config)
