"""Checkpoints of a run: which files they have, and how a trainer goes back to one."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from llm_trainer._files import shown
from llm_trainer.config import ModelConfig, TrainingConfig
from llm_trainer.exceptions import CheckpointError
from llm_trainer.models import TransformerLM
from llm_trainer.models._model_files import read_model
from llm_trainer.training._checkpoint_folder import newest_checkpoint, verify_checkpoint, write_checkpoint
from llm_trainer.training._state import load_state, require_finite, save_state
from llm_trainer.training.callbacks import Callback

if TYPE_CHECKING:
    from llm_trainer.training._loop import TrainingLoop
    from llm_trainer.training._trainer import Trainer

_logger = logging.getLogger(__name__)

STATE_FILE = "training_state.safetensors"
_STATE_VERSION = 1
# These change no weight's shape (learned positions apart) and no result of the finished model.
MAY_DIFFER = {"dropout", "attention_dropout", "gradient_checkpointing", "max_seq_len"}


def save(trainer: Trainer, loop: TrainingLoop) -> Path:
    """Write a checkpoint into `checkpoint_dir`; older ones beyond `save_total_limit` go after it verifies.

    Raises:
        TrainingError: A weight or the optimizer's state is not finite; nothing is written.
        OSError: It cannot be written; the ones that were there still are.
        CheckpointError: What was read back is not what was written; nor is it left there.
    """
    state = {
        "version": _STATE_VERSION,
        "run_id": trainer.run_id,
        "resumed_after": trainer.resumed_after,
        **loop.state_dict(),
    }
    require_finite(trainer.model, loop.optimizer, trainer.step)

    def write(folder: Path) -> None:
        trainer.save_model(folder)
        save_state(folder / STATE_FILE, state)

    info = write_checkpoint(
        Path(str(trainer.checkpoint_folder)),
        trainer.step,
        trainer.run_id,
        write,
        trainer.config.save_total_limit,
    )
    loop.saved_step = trainer.step
    return info.path


def find(resume: str | Path, folder: Path | None) -> Path | None:
    """Return the folder of a whole checkpoint; None if the newest is asked for and there is none.

    Raises:
        CheckpointError: The one that is named is missing or damaged.
    """
    if str(resume) != "latest":
        return verify_checkpoint(Path(resume)).path
    if folder is None:
        raise CheckpointError('"latest" is looked for in TrainingConfig.checkpoint_dir, which is None.')
    newest, passed = newest_checkpoint(folder)
    for reason in passed:
        _logger.warning("A checkpoint is passed over: %s", reason)
    if newest is None:
        _logger.warning("There is no whole checkpoint in %s; training begins anew.", folder)
        return None
    _logger.info("Training goes on from %s.", newest.path)
    return newest.path


def check(path: Path, model: ModelConfig, training: TrainingConfig, callbacks: Sequence[Callback]) -> None:
    """Compare a verified checkpoint with the run that is to go on from it; no tensor is read for that.

    Raises:
        CheckpointError: It is of another model or optimizer, of other callbacks, or of a newer release.
    """
    found, _ = read_model(path)
    different = differences(found, model, MAY_DIFFER)
    if different:
        raise CheckpointError(f"{path} is of another model: {different}.")
    state = load_state(path / STATE_FILE, with_tensors=False)
    if state.get("version") != _STATE_VERSION:
        raise CheckpointError(
            f"{path} has training state of version {shown(state.get('version'))}; this llm-trainer reads "
            f"{_STATE_VERSION}."
        )
    if state["optimizer_type"] != training.optimizer:
        raise CheckpointError(
            f"{path} was made with optimizer={state['optimizer_type']!r}, and TrainingConfig has "
            f"{training.optimizer!r}; use the same, or begin anew from its weights with "
            "TransformerLM.from_pretrained(checkpoint)."
        )
    made_with = [name for name, _ in state["callbacks"]]
    given = [type(callback).__name__ for callback in callbacks]
    if made_with != given:
        raise CheckpointError(
            f"{path} was made with the callbacks {made_with}, now there are {given}; give the same ones in "
            "the same order."
        )


def load(path: Path, trainer: Trainer, loop: TrainingLoop) -> None:
    """Put the model, the loop and the trainer's counts into the state of a checkpoint that `check` has
    passed.

    Raises:
        DataError: It is of other data.
    """
    model = TransformerLM.from_pretrained(path)
    state = load_state(path / STATE_FILE)
    loop.load_state_dict(state)
    trainer.run_id, trainer.resumed_after = state["run_id"], state["resumed_after"]
    trainer.model.load_state_dict(model.state_dict())


def differences(found: ModelConfig, expected: ModelConfig, ignored: set[str] | None = None) -> str:
    """Name the fields in which two models differ; nothing if there are none."""
    ignored = set(ignored or ())
    if expected.positions == "learned":
        ignored.discard("max_seq_len")
    return ", ".join(
        f"{field.name} is {getattr(found, field.name)!r}, the model's {getattr(expected, field.name)!r}"
        for field in dataclasses.fields(found)
        if field.name not in ignored and getattr(found, field.name) != getattr(expected, field.name)
    )
