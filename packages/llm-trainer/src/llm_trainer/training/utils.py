"""Seeds, devices, logging, memory, and checkpoints of any model."""

from __future__ import annotations

import logging
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import av_memory
import numpy as np
import torch
from rich.console import Console
from rich.logging import RichHandler
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from llm_trainer.exceptions import CheckpointError, ConfigurationError
from llm_trainer.training._checkpoint_folder import newest_checkpoint, verify_checkpoint, write_checkpoint
from llm_trainer.training._state import (
    load_state,
    random_state,
    require_finite,
    restore_random_state,
    save_state,
)

__all__ = [
    "choose_device",
    "get_device",
    "get_memory_usage",
    "load_checkpoint",
    "save_checkpoint",
    "set_seed",
    "setup_logging",
]

_STATE_FILE = "state.safetensors"
_LEVELS = ("debug", "info", "warning", "error", "critical")


def set_seed(seed: int) -> None:
    """Seed the random numbers of Python, numpy and torch on all devices."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)  # pyright: ignore[reportUnknownMemberType] - torch's annotation


def choose_device() -> tuple[torch.device, str]:
    """Return the fastest device that torch can use here, and why it is that one."""
    if torch.cuda.is_available():
        return torch.device("cuda"), f"cuda, because torch sees {torch.cuda.get_device_name()}"
    if torch.backends.mps.is_available():
        return torch.device("mps"), "mps, because torch sees an Apple GPU"
    return torch.device("cpu"), "cpu, because torch sees no CUDA device and no Apple GPU"


def get_device() -> torch.device:
    """Return the fastest device that torch can use here; `choose_device` tells why."""
    return choose_device()[0]


def setup_logging(level: str = "info", log_file: str | Path | None = None) -> logging.Logger:
    """Show this package's log messages on standard error, and write them to a file too if one is given.

    It replaces what an earlier call set up and leaves the loggers of other packages alone.

    Raises:
        ConfigurationError: The level is unknown.
        OSError: The file cannot be written to.
    """
    if level.lower() not in _LEVELS:
        raise ConfigurationError(f"level is {level!r}; it must be one of {', '.join(_LEVELS)}.")
    handlers: list[logging.Handler] = [RichHandler(console=Console(stderr=True), show_path=False)]
    if log_file is not None:
        Path(log_file).parent.mkdir(parents=True, exist_ok=True)
        handlers.append(logging.FileHandler(log_file, encoding="utf-8"))
        handlers[-1].setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logger = logging.getLogger("llm_trainer")
    for handler in list(logger.handlers):
        logger.removeHandler(handler)
        handler.close()
    for handler in handlers:
        logger.addHandler(handler)
    logger.setLevel(level.upper())
    # Or whoever has set up the root logger sees everything twice.
    logger.propagate = False
    return logger


def get_memory_usage() -> dict[str, float]:
    """Return what is in use, in MB of 2**20 bytes: `rss_mb` of this process, and of each CUDA device that it
    uses `gpu<index>_allocated_mb`, `gpu<index>_reserved_mb` and `gpu<index>_peak_mb` (allocated).
    """
    usage = {"rss_mb": av_memory.get_cpu_memory()}
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        for index in range(torch.cuda.device_count()):
            for name, read in (
                ("allocated", torch.cuda.memory_allocated),
                ("reserved", torch.cuda.memory_reserved),
                ("peak", torch.cuda.max_memory_allocated),
            ):
                usage[f"gpu{index}_{name}_mb"] = read(index) / 2**20
    return usage


def save_checkpoint(
    directory: str | Path,
    model: nn.Module,
    optimizer: Optimizer | None = None,
    scheduler: LRScheduler | None = None,
    step: int = 0,
    *,
    keep: int | None = None,
    extra: Mapping[str, Any] | None = None,
) -> Path:
    """Write `checkpoint-<step>` into a folder of checkpoints, for a training loop of your own.

    It is written aside, synced, verified and renamed, so that a crash leaves the old ones; the state of the
    random numbers is part of it. `Trainer` saves its checkpoints by itself.

    Args:
        directory: Folder of the checkpoints of one run.
        model: Any module.
        optimizer: Of the model.
        scheduler: Of the optimizer.
        step: Steps taken.
        keep: How many of the newest stay; None keeps all.
        extra: Further state: nested dictionaries, lists and tuples of tensors, numbers, text and None.

    Returns:
        The checkpoint's folder.

    Raises:
        TrainingError: A weight or the optimizer's state is not finite; nothing is written.
        OSError: It cannot be written; what was there before still is.
        CheckpointError: What was read back is not what was written; what was there before still is.
    """
    require_finite(model, optimizer, step)
    state = {
        "model": model.state_dict(),
        "optimizer": None if optimizer is None else optimizer.state_dict(),
        "scheduler": None if scheduler is None else scheduler.state_dict(),
        "kinds": {"optimizer": type(optimizer).__name__, "scheduler": type(scheduler).__name__},
        "random": random_state(),
        "extra": dict(extra or {}),
    }
    return write_checkpoint(
        Path(directory), step, "", lambda folder: save_state(folder / _STATE_FILE, state), keep
    ).path


def load_checkpoint(
    path: str | Path,
    model: nn.Module,
    optimizer: Optimizer | None = None,
    scheduler: LRScheduler | None = None,
) -> dict[str, Any]:
    """Go back to what `save_checkpoint` wrote; what is refused changes nothing.

    Args:
        path: A checkpoint's folder, or a folder of them, of which the newest whole one is taken.
        model: The module that was saved, or one of the same shapes.
        optimizer: Gets its state back, if it was saved.
        scheduler: Gets its state back, if it was saved.

    Returns:
        `step`, `path` and `extra`.

    Raises:
        CheckpointError: There is no whole checkpoint, or it is of another model, optimizer or scheduler.
    """
    folder = Path(path)
    if (folder / "manifest.json").exists() or folder.name.startswith("checkpoint-"):
        found = verify_checkpoint(folder)
    else:
        newest, passed = newest_checkpoint(folder)
        if newest is None:
            reasons = "".join(f" {reason}" for reason in passed)
            raise CheckpointError(f"There is no whole checkpoint in {folder}.{reasons}")
        found = newest
    state = load_state(found.path / _STATE_FILE)
    given = {"optimizer": optimizer, "scheduler": scheduler}
    owners = {name: owner for name, owner in given.items() if owner is not None and state[name] is not None}
    changed: list[tuple[Optimizer | LRScheduler, dict[str, Any]]] = []
    try:
        _require_same_tensors(state["model"], model.state_dict())
        for name, owner in owners.items():
            kind, wanted = state["kinds"][name], type(owner).__name__
            if kind != wanted:
                raise ValueError(f"its {name} is {kind}, the one given {wanted}")
        for name, owner in owners.items():
            changed.append((owner, owner.state_dict()))
            owner.load_state_dict(state[name])
        # Last, for it could not be undone without a copy.
        model.load_state_dict(state["model"])
    except (KeyError, ValueError, RuntimeError) as error:
        for owner, before in changed:
            owner.load_state_dict(before)
        raise CheckpointError(f"{found.path} is of another model or optimizer: {error}") from error
    restore_random_state(state["random"])
    return {"step": found.step, "path": found.path, "extra": state["extra"]}


def _require_same_tensors(found: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    for name in sorted(found.keys() ^ expected.keys()):
        raise ValueError(f"{name!r} is only in the {'checkpoint' if name in found else 'model given'}")
    for name, value in expected.items():
        shape, wanted = (tuple(getattr(side, "shape", ())) for side in (found[name], value))
        if shape != wanted:
            raise ValueError(f"{name!r} has shape {shape} in the checkpoint and {wanted} in the model given")
