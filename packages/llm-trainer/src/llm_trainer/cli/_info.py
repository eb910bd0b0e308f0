"""What `llm-trainer info` does."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
from pathlib import Path
from typing import Any

import av_memory.probes
import torch
import typer

from llm_trainer import __version__
from llm_trainer.cli._models import available_bytes, find_model
from llm_trainer.cli._settings import read_run
from llm_trainer.cli._table import finite, print_table
from llm_trainer.config import ModelConfig, calculate_parameters, estimate_memory_usage
from llm_trainer.exceptions import CheckpointError, ConfigurationError, FormatError
from llm_trainer.models._model_files import read_model
from llm_trainer.tokenizer import load_tokenizer
from llm_trainer.training import HistoryRecord, TrainingHistory
from llm_trainer.training._checkpoint_folder import MANIFEST, verify_checkpoint
from llm_trainer.training._checkpoints import STATE_FILE
from llm_trainer.training._state import load_state
from llm_trainer.training.utils import choose_device, setup_logging

Facts = dict[str, Any]
_LIBRARIES = (
    "torch",
    "numpy",
    "safetensors",
    "tiktoken",
    "rustbpe",
    "datasets",
    "tokenizers",
    "transformers",
)


def show_info(path: Path | None, *, as_json: bool, log_level: str) -> None:
    """Print what is known of a path, or of this machine; end with exit code 1 if a checkpoint is damaged.

    Raises:
        ConfigurationError: The path is nothing that is known.
        FormatError: A model's file is damaged.
    """
    setup_logging(log_level)
    if path is None:
        sections = {"machine": _machine()}
    elif path.is_file():
        sections = _configuration(path)
    elif path.is_dir():
        sections = _folder(path)
    else:
        raise ConfigurationError(f"{path} does not exist.")
    if as_json:
        typer.echo(json.dumps(finite(sections), indent=2, default=str))
    else:
        for name, facts in sections.items():
            print_table(name, {key.replace("_", " "): value for key, value in facts.items()})
    if any(str(value).startswith("damaged") for value in sections.get("checkpoints", {}).values()):
        raise typer.Exit(1)


def _machine() -> Facts:
    memory = av_memory.probes.machine_memory()
    available = available_bytes(torch.device("cpu"))
    return {
        "llm-trainer": __version__,
        "python": platform.python_version(),
        **{name: _version(name) for name in _LIBRARIES},
        "system": platform.platform(),
        "device": choose_device()[1],
        "gpus": ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())) or None,
        "processors": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gb": memory.total_bytes / 2**30,
        "available_gb": None if available is None else available / 2**30,
    }


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _configuration(path: Path) -> dict[str, Facts]:
    run = read_run(path)
    return {
        "model": _model(run.model),
        "training": {
            "steps": run.training.max_steps,
            "passes": run.training.num_epochs if run.training.max_steps is None else None,
            "tokens_a_step": run.training.effective_batch_size * run.data.max_length,
            "optimizer": run.training.optimizer,
            "learning_rate": run.training.learning_rate,
        },
        "data": {
            "text": run.data.train_file or run.data.dataset_name,
            "tokenizer": run.data.tokenizer,
            "vocab_size": run.data.vocab_size,
            "max_length": run.data.max_length,
        },
    }


def _model(config: ModelConfig) -> Facts:
    return {
        "parameters": calculate_parameters(config),
        "size_mb": calculate_parameters(config) * 4 / 2**20,
        "training_memory_gb": estimate_memory_usage(config),
        **config.to_dict(),
    }


def _folder(path: Path) -> dict[str, Facts]:
    sections: dict[str, Facts] = {}
    checkpoints = (
        [path] if (path / MANIFEST).exists() else sorted((path / "checkpoints").glob("checkpoint-*"))
    )
    states = {checkpoint.name: _verify(checkpoint) for checkpoint in checkpoints}
    if checkpoints == [path]:
        model = path
        history = _records_of_checkpoint(path) if states[path.name].startswith("whole") else []
    else:
        model = find_model(path)
        file = path / "history.jsonl"
        history = list(TrainingHistory.load(file)) if file.exists() else []
    config, weights = read_model(model)
    sections["model"] = {"folder": model, **_model(config)}
    sections["model"]["file_mb"] = sum(file.stat().st_size for file in weights.metadata) / 2**20
    try:
        tokenizer = load_tokenizer(model)
    except FormatError as error:
        sections["tokenizer"] = {"missing": str(error)}
    else:
        sections["tokenizer"] = {"kind": tokenizer.kind, **tokenizer.get_vocab_stats()}
    if history:
        sections["training"] = _training(history)
    if states:
        sections["checkpoints"] = dict(states)
    return sections


def _verify(checkpoint: Path) -> str:
    try:
        return f"whole, step {verify_checkpoint(checkpoint).step}"
    except CheckpointError as error:
        return f"damaged: {error}"


def _records_of_checkpoint(path: Path) -> list[HistoryRecord]:
    return [HistoryRecord(**record) for record in load_state(path / STATE_FILE)["history"]]


def _training(history: list[HistoryRecord]) -> Facts:
    last = history[-1]
    held_out = [record.eval_loss for record in history if record.eval_loss is not None]
    return {
        "step": last.step,
        "tokens": last.tokens,
        "train_loss": last.train_loss,
        "eval_loss": held_out[-1] if held_out else None,
        "lowest_eval_loss": min(held_out, default=None),
        "tokens_per_s": last.tokens_per_s,
        "seconds": last.wall_s,
    }
