"""Models in folders, and the devices that they run on."""

from __future__ import annotations

import logging
from pathlib import Path

import av_memory.probes
import torch

from llm_trainer.exceptions import ConfigurationError
from llm_trainer.models import TransformerLM
from llm_trainer.models._model_files import check_tokenizer
from llm_trainer.tokenizer import Tokenizer, load_tokenizer
from llm_trainer.training._checkpoint_folder import newest_checkpoint
from llm_trainer.training.utils import get_device

_logger = logging.getLogger(__name__)


def pick_device(name: str | None) -> torch.device:
    """Return the device of that name, or the fastest one.

    Raises:
        ConfigurationError: torch cannot use it.
    """
    if name is None:
        return get_device()
    try:
        device = torch.device(name)
        if device.type not in {"cpu", "cuda", "mps", "xpu"}:
            raise RuntimeError("it is none of cpu, cuda, mps and xpu")
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).partition("\n")[0]
        raise ConfigurationError(f"--device {name} cannot be used here: {reason}") from error
    return device


def available_bytes(device: torch.device) -> int | None:
    """Return the memory that a program can still get there; None where that is not known."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    if device.type != "cpu":
        return None
    available = av_memory.probes.machine_memory().available_bytes
    # What the group uses is mostly cache, which makes room; so its whole limit counts.
    limit = av_memory.probes.cgroup_memory().limit_bytes
    return available if limit is None else min(available, limit)


def find_model(path: Path) -> Path:
    """Return the folder of a model: `path`, or the newest checkpoint of a run that has not ended.

    Raises:
        ConfigurationError: There is none.
    """
    if not path.is_dir():
        raise ConfigurationError(f"{path} is no folder; give the one that `train` wrote, or a checkpoint.")
    if (path / "config.json").exists():
        return path
    newest, passed = newest_checkpoint(path / "checkpoints")
    if newest is None:
        raise ConfigurationError(
            f"{path} holds no model: there is no config.json in it, and no whole checkpoint in its folder "
            f"checkpoints. {' '.join(passed)}"
        )
    _logger.warning("%s has no finished model; its newest checkpoint is used, %s.", path, newest.path.name)
    return newest.path


def load_model(path: Path, device: torch.device) -> tuple[TransformerLM, Tokenizer]:
    """Read the model in a folder, and the tokenizer beside it.

    Raises:
        ConfigurationError: There is no model.
        FormatError: A file is missing or damaged, or the tokenizer is another model's.
    """
    folder = find_model(path)
    model = TransformerLM.from_pretrained(folder, device)
    tokenizer = load_tokenizer(folder)
    check_tokenizer(folder, tokenizer.fingerprint())
    return model, tokenizer
