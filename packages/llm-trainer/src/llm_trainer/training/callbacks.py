"""Hooks into training."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llm_trainer.exceptions import ConfigurationError

if TYPE_CHECKING:
    from llm_trainer.training._history import HistoryRecord
    from llm_trainer.training._trainer import Trainer

__all__ = ["Callback", "EarlyStopping"]


class Callback:
    """Override what is wanted; each is called on the training thread; an exception in it ends training.

    One that decides by what it has seen gives that to the checkpoint, so that a resumed run decides alike:

    ```python
    class StopAtLoss(Callback):
        def __init__(self, loss: float) -> None:
            self.loss, self.seen = loss, 0

        def on_record(self, trainer, record):
            self.seen += record.train_loss is not None and record.train_loss < self.loss
            trainer.should_stop = self.seen >= 3

        def state_dict(self):
            return {"seen": self.seen}

        def load_state_dict(self, state):
            self.seen = state["seen"]
    ```
    """

    def on_train_begin(self, trainer: Trainer) -> None:
        """Called when everything is ready, before the first step; in a resumed run `trainer.step` is past 0,
        and `load_state_dict` was called before.
        """

    def on_step_end(self, trainer: Trainer) -> None:
        """Called after each step; set `trainer.should_stop` to make it the last one, evaluated as a last one
        is. A run that was stopped so is over, also when it is resumed.
        """

    def on_record(self, trainer: Trainer, record: HistoryRecord) -> None:
        """Called when a record was added to the history: every `logging_steps`, and after each evaluation."""

    def on_evaluate(self, trainer: Trainer, record: HistoryRecord) -> None:
        """Called before `on_record` with a record that has an `eval_loss`."""

    def on_save(self, trainer: Trainer, path: Path) -> None:
        """Called when the checkpoint in the folder `path` is complete."""

    def on_train_end(self, trainer: Trainer) -> None:
        """Called when training ends, also when an exception ends it."""

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run must know, in values that JSON can hold."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take what `state_dict` of the same callback returned when the checkpoint was made."""


class EarlyStopping(Callback):
    """Stops when the held-out loss has not become lower for some evaluations in a row.

    A resumed run goes on counting; a new one begins anew.

    ```python
    Trainer(model, tokenizer, config, train, held_out, [EarlyStopping(patience=3, threshold=0.001)])
    ```
    """

    def __init__(self, patience: int, threshold: float = 0.0) -> None:
        """Set the limit.

        Args:
            patience: Evaluations in a row without a lower loss that end training.
            threshold: By how much, in nats a token, a loss must be below the lowest so far to count as
                lower. One that is not a number never does.

        Raises:
            ConfigurationError: The patience is below 1, or the threshold negative or not finite.
        """
        if isinstance(patience, bool) or not isinstance(patience, int) or patience < 1:
            raise ConfigurationError(f"patience is {patience!r}; it must be a whole number of at least 1.")
        if not 0 <= threshold < math.inf:
            raise ConfigurationError(f"threshold is {threshold!r}; it must be a finite number of at least 0.")
        self.patience = patience
        self.threshold = threshold
        self._reset()

    def _reset(self) -> None:
        self.best_loss: float | None = None
        """Lowest held-out loss so far."""
        self.evaluations_without_gain = 0
        """Evaluations since the one that had it."""
        self._has_stopped = False

    def on_train_begin(self, trainer: Trainer) -> None:
        """Forget an earlier run; do not go on with one that was to stop here."""
        if trainer.step == 0:
            self._reset()
        elif self.evaluations_without_gain >= self.patience:
            trainer.should_stop = True
        elif self._has_stopped:
            # It has more patience now.
            trainer.should_stop = self._has_stopped = False

    def on_record(self, trainer: Trainer, record: HistoryRecord) -> None:
        """Count, and stop at the limit."""
        loss = record.eval_loss
        if loss is None:
            return
        if loss < (math.inf if self.best_loss is None else self.best_loss - self.threshold):
            self.best_loss = loss
            self.evaluations_without_gain = 0
            return
        self.evaluations_without_gain += 1
        if self.evaluations_without_gain >= self.patience:
            trainer.should_stop = self._has_stopped = True

    def state_dict(self) -> dict[str, Any]:
        """Return the lowest loss and the count."""
        return {
            "best_loss": self.best_loss,
            "evaluations_without_gain": self.evaluations_without_gain,
            "has_stopped": self._has_stopped,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        self.best_loss = state["best_loss"]
        self.evaluations_without_gain = state["evaluations_without_gain"]
        self._has_stopped = state["has_stopped"]
