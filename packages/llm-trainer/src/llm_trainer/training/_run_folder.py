"""What a run's folder tells of the run: settings, versions, seed, and curves at the end."""

from __future__ import annotations

import importlib.metadata
import logging
import platform
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from llm_trainer import __version__
from llm_trainer.config import DataConfig
from llm_trainer.training.plots import save_loss_curve, save_run_report

if TYPE_CHECKING:
    from llm_trainer.training._trainer import Trainer

_logger = logging.getLogger(__name__)
_LIBRARIES = ("numpy", "rustbpe", "safetensors", "tiktoken", "torch")


def run_info(trainer: Trainer, data_config: DataConfig | None) -> dict[str, Any]:
    """Describe a run: the configurations, with the seed, and what they were run with and on."""
    return {
        "run_id": trainer.run_id,
        "model": trainer.model.config.to_dict(),
        "training": trainer.config.to_dict(),
        "data": None if data_config is None else data_config.to_dict(),
        "seed": trainer.config.seed,
        "parameters": trainer.model.get_num_params(),
        "tokenizer": trainer.tokenizer.fingerprint(),
        "device": str(trainer.device),
        "device_name": torch.cuda.get_device_name(trainer.device)
        if trainer.device.type == "cuda"
        else platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "versions": {
            "python": platform.python_version(),
            "llm-trainer": __version__,
            **{name: importlib.metadata.version(name) for name in _LIBRARIES},
        },
    }


def save_curves(trainer: Trainer, folder: Path, values: dict[str, Any]) -> None:
    """Draw the history as a picture, and as a page with what `run_info` says.

    A failure is only logged, for the run itself is over and well.
    """
    groups: dict[str, Any] = {name: value for name, value in values.items() if isinstance(value, dict)}
    groups["run"] = {name: value for name, value in values.items() if name not in groups}
    try:
        save_loss_curve(trainer.history, folder / "loss.png")
        save_run_report(
            trainer.history,
            folder / "report.html",
            title=trainer.config.run_name or folder.resolve().name,
            settings=groups,
            resumed_after=trainer.resumed_after,
        )
    except OSError as error:
        _logger.warning("The curves cannot be drawn: %s", error)
