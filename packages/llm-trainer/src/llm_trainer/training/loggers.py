"""Where a run's figures go: TensorBoard, Weights & Biases, CSV, JSON Lines, by the names of `report_to`."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llm_trainer.config._training import REPORTS
from llm_trainer.exceptions import ConfigurationError, MissingPackageError
from llm_trainer.training._logs._base import RunLogger
from llm_trainer.training._logs._tables import CsvLogger, JsonlLogger
from llm_trainer.training._logs._tensorboard import TensorBoardLogger
from llm_trainer.training._logs._wandb import WandbLogger
from llm_trainer.utils.metrics import perplexity_of

if TYPE_CHECKING:
    from llm_trainer.training._history import HistoryRecord

__all__ = ["LOGGERS", "MissingLoggerError", "RunLogger", "create_loggers", "values_of"]

_NEEDS = {"tensorboard": "tensorboard", "wandb": "wandb"}

_MAKERS: dict[str, Callable[[Path], RunLogger]] = {
    "tensorboard": TensorBoardLogger,
    "csv": CsvLogger,
    "jsonl": JsonlLogger,
}

LOGGERS = REPORTS
"""The names that `report_to` may hold, beside "none"."""


class MissingLoggerError(ConfigurationError, MissingPackageError):
    """A log was asked for whose library is not installed."""


def create_loggers(
    report_to: Sequence[str] | str, folder: str | Path | None, run_name: str | None = None
) -> list[RunLogger]:
    """Return the logs with these names, not started yet; a name given twice counts once.

    Args:
        report_to: Names of `LOGGERS`; "none" or nothing asks for no log.
        folder: Where they write: `tensorboard/`, `wandb/` with `wandb_run.json`, `metrics.csv`,
            `metrics.jsonl`. Without one, only Weights & Biases can be had, which then chooses its own.
        run_name: What Weights & Biases calls the run; a name of its own if None.

    Raises:
        ConfigurationError: A name is unknown, "none" stands beside others, or a log lacks its folder.
        MissingLoggerError: The library of one is not installed; it is an `ImportError` too.
    """
    names = list(dict.fromkeys([report_to] if isinstance(report_to, str) else report_to))
    if names == ["none"]:
        return []
    for name in names:
        if name not in LOGGERS:
            known = ", ".join(f'"{known}"' for known in LOGGERS)
            raise ConfigurationError(f'report_to holds {name!r}; it may hold {known}, or "none" alone.')
    for name in names:
        _check_installed(name)
    return [_make(name, None if folder is None else Path(folder), run_name) for name in names]


def _make(name: str, folder: Path | None, run_name: str | None) -> RunLogger:
    if name == "wandb":
        return WandbLogger(folder, run_name)
    if folder is None:
        raise ConfigurationError(
            f'report_to holds "{name}", which writes into the folder of the run, and there is none; set '
            "TrainingConfig.output_dir or checkpoint_dir, or leave it out of report_to."
        )
    return _MAKERS[name](folder)


def _check_installed(name: str) -> None:
    library = _NEEDS.get(name)
    if library is None:
        return
    try:
        importlib.import_module(library)
    except ImportError as error:
        raise MissingLoggerError(
            f'report_to holds "{name}", but {library} cannot be imported ({error}); '
            f'run "pip install {library}", or leave it out of report_to.'
        ) from error


def values_of(record: HistoryRecord | Mapping[str, Any]) -> dict[str, float]:
    """Return a record's figures by the names that the logs use, those that are None left out.

    `eval_loss` becomes `eval/loss`, with `eval/perplexity` beside it; `rss_mb` and all other sizes become
    `memory/rss_mb`; everything else is `train/...`: `train/loss`, `train/lr`, `train/tokens_per_s`.
    """
    fields = record if isinstance(record, Mapping) else dataclasses.asdict(record)
    values: dict[str, float] = {}
    for name, value in fields.items():
        if name == "step" or isinstance(value, bool) or not isinstance(value, int | float):
            continue
        if name.endswith("_mb"):
            values[f"memory/{name}"] = float(value)
        elif name.startswith("eval_"):
            values[f"eval/{name.removeprefix('eval_')}"] = float(value)
        else:
            values[f"train/{name.removeprefix('train_')}"] = float(value)
    if "eval/loss" in values:
        values.setdefault("eval/perplexity", perplexity_of(values["eval/loss"]))
    return values
