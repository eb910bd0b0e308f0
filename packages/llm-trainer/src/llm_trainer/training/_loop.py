"""The loop over steps, between what `Trainer.train` prepares and what it leaves."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from itertools import islice
from typing import TYPE_CHECKING

from torch import Tensor
from torch.utils.data import DataLoader

from llm_trainer.exceptions import TrainingError
from llm_trainer.training._history import HistoryRecord
from llm_trainer.training._interrupt import InterruptGuard
from llm_trainer.training._precision import Precision
from llm_trainer.training._progress import ProgressReport
from llm_trainer.training._step import StepResult, take_step
from llm_trainer.training.optimizer import create_optimizer
from llm_trainer.training.scheduler import create_scheduler

if TYPE_CHECKING:
    from llm_trainer.training._trainer import Trainer

Batch = dict[str, Tensor]


class TrainingLoop:
    """One run: its optimizer and schedule, and the counts since it began."""

    def __init__(
        self,
        trainer: Trainer,
        *,
        total_steps: int,
        steps_in_epoch: int,
        precision: Precision,
        interrupt: InterruptGuard,
        evaluate: Callable[[], float | None] | None,
        save_history: Callable[[], object],
        progress: ProgressReport | None,
    ) -> None:
        config = trainer.config
        self.trainer = trainer
        self.total_steps = total_steps
        self._steps_in_epoch = steps_in_epoch
        self._precision = precision
        self._interrupt = interrupt
        self._evaluate = evaluate
        self._save_history = save_history
        self._progress = progress
        self._optimizer = create_optimizer(
            trainer.model,
            config.optimizer,
            config.learning_rate,
            config.weight_decay,
            betas=config.betas,
            eps=config.eps,
        )
        self._scheduler = create_scheduler(
            self._optimizer,
            config.lr_scheduler,
            total_steps,
            config.resolve_warmup_steps(total_steps),
            config.min_lr_ratio,
        )
        self._began = time.perf_counter()
        self._training_s = 0.0
        self._tokens = 0
        self._skipped = 0
        self._skipped_in_row = 0
        self._unrecorded_loss = 0.0
        self._unrecorded_labels = 0

    def run(self, loader: DataLoader[Batch]) -> None:
        """Take steps until the last one, a callback's wish to stop, or an interrupt.

        Raises:
            TrainingError: More than `max_skipped_steps` steps in a row were not finite.
        """
        trainer = self.trainer
        try:
            if self._progress is not None:
                self._progress.start()
            for callback in trainer.callbacks:
                callback.on_train_begin(trainer)
            trainer.model.train()
            for batches in self._windows(loader):
                self._step(batches)
                if self._ends():
                    break
        finally:
            if self._progress is not None:
                self._progress.close()
            for callback in trainer.callbacks:
                callback.on_train_end(trainer)

    def _windows(self, loader: DataLoader[Batch]) -> Iterator[list[Batch]]:
        """Yield the batches of each step, pass after pass; the last step of a pass may have fewer."""
        while True:
            batches = iter(loader)
            while window := list(islice(batches, self.trainer.config.gradient_accumulation_steps)):
                yield window

    def _ends(self) -> bool:
        return self.trainer.step >= self.total_steps or self.trainer.should_stop or self._interrupt.requested

    def _step(self, batches: list[Batch]) -> None:
        trainer = self.trainer
        learning_rate: float = self._optimizer.param_groups[0]["lr"]
        started = time.perf_counter()
        result = take_step(
            trainer.model,
            batches,
            self._optimizer,
            self._precision,
            trainer.device,
            trainer.config.max_grad_norm,
        )
        self._training_s += time.perf_counter() - started
        trainer.step += 1
        self._count(result)
        if self._progress is not None:
            self._progress.step(trainer.step, result.loss if result.changed else None, self._tokens_per_s)
        for callback in trainer.callbacks:
            callback.on_step_end(trainer)
        self._record(learning_rate, result)
        if self._skipped_in_row > trainer.config.max_skipped_steps:
            raise TrainingError(
                f"The loss or gradient was not finite in {self._skipped_in_row} steps in a row, up to step "
                f"{trainer.step}; the weights are those before them. Try a lower learning_rate, a "
                f"longer warm-up, "
                "or bfloat16, and check the data."
            )

    def _count(self, result: StepResult) -> None:
        self._tokens += result.tokens
        if result.skipped:
            self._skipped += 1
            self._skipped_in_row += 1
        if not result.changed:
            return
        self._skipped_in_row = 0
        self._unrecorded_loss += result.loss * result.labelled
        self._unrecorded_labels += result.labelled
        # The schedule follows updates: a step that changed nothing is no reason to slow down.
        self._scheduler.step()

    @property
    def _tokens_per_s(self) -> float:
        return self._tokens / self._training_s

    def _record(self, learning_rate: float, result: StepResult) -> None:
        trainer = self.trainer
        evaluates = self._evaluate is not None and self._evaluation_is_due()
        if not (evaluates or self._ends() or trainer.step % trainer.config.logging_steps == 0):
            return
        labels = self._unrecorded_labels
        record = HistoryRecord(
            step=trainer.step,
            tokens=self._tokens,
            wall_s=time.perf_counter() - self._began,
            tokens_per_s=self._tokens_per_s,
            train_loss=self._unrecorded_loss / labels if labels else None,
            eval_loss=self._evaluate() if evaluates and self._evaluate is not None else None,
            lr=learning_rate,
            grad_norm=result.grad_norm if result.changed else None,
            skipped_steps=self._skipped,
        )
        self._unrecorded_loss, self._unrecorded_labels = 0.0, 0
        trainer.history.append(record)
        if record.eval_loss is not None:
            self._save_history()
        if self._progress is not None:
            self._progress.record(record)
        for callback in trainer.callbacks:
            callback.on_record(trainer, record)

    def _evaluation_is_due(self) -> bool:
        config, step = self.trainer.config, self.trainer.step
        if self._interrupt.requested or config.eval_strategy == "no":
            return False
        interval = config.eval_steps if config.eval_strategy == "steps" else self._steps_in_epoch
        return self._ends() or step % interval == 0
