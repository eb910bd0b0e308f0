"""Hooks into training."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from llm_trainer.training._history import HistoryRecord
    from llm_trainer.training._trainer import Trainer

__all__ = ["Callback"]


class Callback:
    """Override what is wanted; each is called on the training thread; an exception in it ends training."""

    def on_train_begin(self, trainer: Trainer) -> None:
        """Called when everything is ready, before the first step."""

    def on_step_end(self, trainer: Trainer) -> None:
        """Called after each step; set `trainer.should_stop` to make it the last one, evaluated as a last one
        is.
        """

    def on_record(self, trainer: Trainer, record: HistoryRecord) -> None:
        """Called when a record was added to the history: every `logging_steps`, and after each evaluation."""

    def on_train_end(self, trainer: Trainer) -> None:
        """Called when training ends, also when an exception ends it."""
