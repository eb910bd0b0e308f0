"""The loop over steps, between what `Trainer.train` prepares and what it leaves."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any, cast

import av_memory
from torch import Tensor, nn

from llm_trainer.data import PositionedLoader
from llm_trainer.exceptions import ConfigurationError, TrainingError
from llm_trainer.training._history import HistoryRecord, TrainingHistory
from llm_trainer.training._precision import Precision
from llm_trainer.training._progress import ProgressReport
from llm_trainer.training._signals import EndWaiting, SignalGuard
from llm_trainer.training._state import random_state, restore_random_state
from llm_trainer.training._step import StepResult, take_step
from llm_trainer.training.loggers import RunLogger, values_of
from llm_trainer.training.optimizer import create_optimizer
from llm_trainer.training.scheduler import create_scheduler
from llm_trainer.utils.metrics import batch_loss

if TYPE_CHECKING:
    from llm_trainer.training._trainer import Trainer

Batch = dict[str, Tensor]


@dataclasses.dataclass(frozen=True)
class _Taken:
    """What the record of a step says of the step itself."""

    lr: float
    grad_norm: float | None


@dataclasses.dataclass
class _Counts:
    """What is counted from the run's first step on."""

    updates: int = 0
    """Steps that changed the weights."""
    tokens: int = 0
    skipped: int = 0
    skipped_in_row: int = 0
    training_s: float = 0.0
    """Time in steps."""
    wall_s: float = 0.0
    """Time in earlier sittings of a run that was resumed."""
    unrecorded_loss: float = 0.0
    """Sum over the tokens since the last record."""
    unrecorded_labels: int = 0
    loss: float = 0.0
    """Sum over all tokens."""
    labels: int = 0
    evaluated_epochs: int = 0
    """Passes over the data after which there was an evaluation."""
    place: tuple[int, int] = (0, 0)
    """The epoch, and the batch of it that is to be trained on next; changed in one go, for a signal may come
    between two."""


class TrainingLoop:
    """One run: its optimizer and schedule, its place in the data, and the counts since it began."""

    def __init__(
        self,
        trainer: Trainer,
        *,
        loader: PositionedLoader,
        batches_in_epoch: int | None,
        precision: Precision,
    ) -> None:
        config = trainer.config
        self.trainer = trainer
        self.counts = _Counts()
        self.saved_step: int | None = None
        """The step that the newest checkpoint holds with all that belongs to it."""
        self._loader = loader
        self._batches_in_epoch = batches_in_epoch
        self._precision = precision
        self._pending: _Taken | None = None
        """The newest step, while it is not recorded and evaluated as is due."""
        self._last: _Taken | None = None
        self._resumed_random: Mapping[str, Any] | None = None
        self._batches: Iterator[Batch] | None = None
        self.optimizer = create_optimizer(
            trainer.model,
            config.optimizer,
            config.learning_rate,
            config.weight_decay,
            betas=config.betas,
            eps=config.eps,
            muon_learning_rate=config.muon_learning_rate,
            muon_momentum=config.muon_momentum,
        )
        self._highest_rates = [group["lr"] for group in self.optimizer.param_groups]
        if batches_in_epoch is None and config.max_steps is None:
            raise ConfigurationError("The training data have no length; set TrainingConfig.max_steps.")
        window = config.gradient_accumulation_steps
        self.steps_in_epoch = None if batches_in_epoch is None else -(-batches_in_epoch // window)
        self.total_steps = config.max_steps or cast("int", self.steps_in_epoch) * config.num_epochs
        self._schedule()

    def _schedule(self) -> None:
        config = self.trainer.config
        for group, rate in zip(self.optimizer.param_groups, self._highest_rates, strict=True):
            group["lr"] = rate
        self._scheduler = create_scheduler(
            self.optimizer,
            config.lr_scheduler,
            self.total_steps,
            config.resolve_warmup_steps(self.total_steps),
            config.min_lr_ratio,
            decay_ratio=config.decay_ratio,
            updates=self.counts.updates,
        )

    def state_dict(self) -> dict[str, Any]:
        """Return all that the rest of the run depends on, but for the weights."""
        trainer = self.trainer
        wall_s = self._wall_s()
        return {
            "step": trainer.step,
            "counts": dataclasses.asdict(self.counts) | {"wall_s": wall_s},
            "should_stop": trainer.should_stop,
            "pending": None if self._pending is None else dataclasses.asdict(self._pending),
            "optimizer_type": trainer.config.optimizer,
            "optimizer": self.optimizer.state_dict(),
            "scaler": self._precision.scaler.state_dict(),
            "loader": self._loader.state_dict()
            | dict(zip(("epoch", "batch"), self.counts.place, strict=True)),
            # Random numbers that wait to be restored are those of the place that this run is at.
            "random": self._resumed_random or random_state(),
            "callbacks": [[type(callback).__name__, callback.state_dict()] for callback in trainer.callbacks],
            "history": [dataclasses.asdict(record) for record in trainer.history],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state_dict` was taken.

        Raises:
            DataError: It is the state of a run on other data.
        """
        trainer = self.trainer
        self._loader.load_state_dict(state["loader"])
        self.counts = _Counts(**state["counts"])
        self.saved_step = None
        pending = state["pending"]
        self._pending = None if pending is None else _Taken(**pending)
        settings = [
            {name: value for name, value in group.items() if name != "params"}
            for group in self.optimizer.param_groups
        ]
        self.optimizer.load_state_dict(state["optimizer"])
        # The averages are the checkpoint's, the settings those of the configuration.
        for group, setting in zip(self.optimizer.param_groups, settings, strict=True):
            group.update(setting)
        if state["scaler"]:
            self._precision.scaler.load_state_dict(state["scaler"])
        trainer.step, trainer.should_stop = state["step"], state["should_stop"]
        if trainer.config.max_steps is None and self._batches_in_epoch is not None:
            # Of the epochs that are left, for earlier ones may have had larger or smaller batches.
            epoch, batch = self.counts.place
            epochs_left = trainer.config.num_epochs - epoch
            window = trainer.config.gradient_accumulation_steps
            self.total_steps = trainer.step
            if epochs_left > 0:
                in_this = -(-(self._batches_in_epoch - batch) // window)
                self.total_steps += in_this + (epochs_left - 1) * cast("int", self.steps_in_epoch)
        self._schedule()
        self._resumed_random = state["random"]
        trainer.history = TrainingHistory()
        for record in state["history"]:
            trainer.history.append(HistoryRecord(**record))
        for callback, (_, callback_state) in zip(trainer.callbacks, state["callbacks"], strict=True):
            callback.load_state_dict(callback_state)

    def run(
        self,
        guard: SignalGuard,
        progress: ProgressReport | None,
        loggers: Sequence[RunLogger] = (),
        *,
        epochs: int | None = None,
    ) -> None:
        """Take steps until the last one, a callback's wish to stop, or a signal.

        Args:
            guard: Tells of signals.
            progress: Shown while it goes on.
            loggers: Get every record.
            epochs: Passes after which to return; None goes on to the run's last step.

        Raises:
            TrainingError: More than `max_skipped_steps` steps in a row were not finite.
        """
        trainer = self.trainer
        self._guard, self._progress, self._loggers = guard, progress, loggers
        self._began = time.perf_counter()
        last_epoch = None if epochs is None else self.counts.place[0] + epochs
        try:
            if progress is not None:
                progress.start()
            for callback in trainer.callbacks:
                callback.on_train_begin(trainer)
            trainer.model.train()
            if self._pending is not None:
                self._finish_step(self._pending)
            while not self.ends() and (last_epoch is None or self.counts.place[0] < last_epoch):
                if not self._take_step():
                    break
            if guard.received is not None:
                self._end_by_signal()
        finally:
            self.counts.wall_s = self._wall_s()
            del self._began
            if progress is not None:
                progress.close()
            for callback in trainer.callbacks:
                callback.on_train_end(trainer)

    def ends(self) -> bool:
        """Whether there is no further step to take."""
        trainer = self.trainer
        return trainer.step >= self.total_steps or trainer.should_stop or self._guard.received is not None

    def _take_step(self) -> bool:
        """Take one step; return whether there was one to take."""
        trainer = self.trainer
        try:
            with self._guard.waiting():
                batches = self._next_window()
                if trainer.compiles_first_step:
                    self._compile(batches[0])
        except EndWaiting:
            # What was loaded was not trained on: the position is still that of the last step.
            self._batches = None
            return False
        learning_rate: float = self.optimizer.param_groups[0]["lr"]
        started = time.perf_counter()
        result = take_step(
            trainer.model,
            batches,
            self.optimizer,
            self._precision,
            trainer.device,
            trainer.config.max_grad_norm,
        )
        self.counts.training_s += time.perf_counter() - started
        trainer.step += 1
        self._count(result, len(batches))
        if self._progress is not None:
            loss = result.loss if result.changed else None
            self._progress.step(trainer.step, loss, self._tokens_per_s, self._mfu())
        for callback in trainer.callbacks:
            callback.on_step_end(trainer)
        self._finish_step(_Taken(learning_rate, result.grad_norm if result.changed else None))
        if self.counts.skipped_in_row > trainer.config.max_skipped_steps:
            raise TrainingError(
                f"The loss or gradient was not finite in {self.counts.skipped_in_row} steps in a row, up to "
                f"step {trainer.step}; the weights are those before them. Try a lower learning_rate, a "
                f"longer warm-up, or bfloat16, and check the data."
            )
        return True

    def _next_window(self) -> list[Batch]:
        """Return the batches of a step; the last step of an epoch may have fewer."""
        while True:
            if self._batches is None:
                self._loader.set_position(*self.counts.place)
                self._batches = iter(self._loader)
                if self._resumed_random is not None:
                    restore_random_state(self._resumed_random)
                    self._resumed_random = None
            window = list(islice(self._batches, self.trainer.config.gradient_accumulation_steps))
            if window:
                return window
            epoch, batch = self.counts.place
            if batch == 0:
                raise TrainingError("The training data gave no batch.")
            self._batches = None
            self.counts.place = (epoch + 1, 0)

    def _compile(self, batch: Batch) -> None:
        """Let the blocks be compiled by a pass that leaves no trace, where a signal may cut it short."""
        before = random_state()
        try:
            if self._progress is not None:
                self._progress.message("compiling")
            with self._precision.autocast():
                loss = batch_loss(self.trainer.model, batch, self.trainer.device)
            loss.backward()  # pyright: ignore[reportUnknownMemberType] - torch's annotation
        finally:
            _drop_gradients(self.trainer.model)
            restore_random_state(before)
        self.trainer.compiles_first_step = False

    def _count(self, result: StepResult, batches: int) -> None:
        counts = self.counts
        counts.tokens += result.tokens
        epoch, batch = counts.place[0], counts.place[1] + batches
        if self._batches_in_epoch is not None and batch >= self._batches_in_epoch:
            self._batches = None
            epoch, batch = epoch + 1, 0
        counts.place = (epoch, batch)
        if result.skipped:
            counts.skipped += 1
            counts.skipped_in_row += 1
        if not result.changed:
            return
        counts.skipped_in_row = 0
        counts.unrecorded_loss += result.loss * result.labelled
        counts.unrecorded_labels += result.labelled
        counts.loss += result.loss * result.labelled
        counts.labels += result.labelled
        counts.updates += 1
        # The schedule follows updates: a step that changed nothing is no reason to slow down.
        self._scheduler.step()

    def _finish_step(self, taken: _Taken) -> None:
        """Record, evaluate and save after a step, as far as each is due and no signal forbids it."""
        trainer = self.trainer
        self._pending = self._last = taken
        try:
            evaluated = self._record(taken)
            if not evaluated and self.trainer.should_stop and self._evaluation_is_due():
                # A callback has decided so when it saw the record.
                self._record(taken)
        except EndWaiting:
            # A resumed run begins with this evaluation.
            return
        self._pending = None
        if self._guard.received is None and (self.ends() or trainer.step % trainer.config.save_steps == 0):
            self._save()

    def _save(self) -> None:
        if self._progress is not None and self.trainer.config.checkpoint_dir is not None:
            self._progress.saving()
        self.trainer.save_periodically(self)

    def _end_by_signal(self) -> None:
        if self._pending is not None or self.saved_step != self.trainer.step:
            self._save()
        if self._last is not None and self.counts.unrecorded_labels:
            # For whoever looks at the history now; the resumed run records at its own time.
            self.trainer.history.append(self._new_record(self._last, None))

    def _record(self, taken: _Taken) -> bool:
        """Add a record if one is due; return whether it has an evaluation."""
        evaluates = self._evaluation_is_due()
        if self._guard.received is not None and evaluates:
            raise EndWaiting
        ends = self.ends() and self._guard.received is None
        if not (evaluates or ends or self.trainer.step % self.trainer.config.logging_steps == 0):
            return False
        eval_loss = None
        if evaluates:
            with self._guard.waiting():
                eval_loss = self.trainer.evaluation_loss(self._progress)
            self.counts.evaluated_epochs = self.counts.place[0]
        self._add_record(taken, eval_loss)
        return evaluates

    def _new_record(self, taken: _Taken, eval_loss: float | None) -> HistoryRecord:
        counts = self.counts
        labels = counts.unrecorded_labels
        record = HistoryRecord(
            step=self.trainer.step,
            tokens=counts.tokens,
            wall_s=self._wall_s(),
            tokens_per_s=self._tokens_per_s,
            train_loss=counts.unrecorded_loss / labels if labels else None,
            eval_loss=eval_loss,
            lr=taken.lr,
            grad_norm=taken.grad_norm,
            skipped_steps=counts.skipped,
            epoch=self._epochs(),
            mfu=self._mfu(),
            rss_mb=av_memory.get_cpu_memory(),
        )
        counts.unrecorded_loss, counts.unrecorded_labels = 0.0, 0
        return record

    def _add_record(self, taken: _Taken, eval_loss: float | None) -> None:
        trainer = self.trainer
        record = self._new_record(taken, eval_loss)
        trainer.history.append(record)
        # A callback may save a checkpoint, which has the record.
        self._pending = None
        if eval_loss is not None:
            trainer.try_to_save_history()
        if self._progress is not None:
            self._progress.record(record)
        for logger in self._loggers:
            logger.log(record.step, values_of(record))
        for callback in trainer.callbacks:
            if eval_loss is not None:
                callback.on_evaluate(trainer, record)
            callback.on_record(trainer, record)

    def _evaluation_is_due(self) -> bool:
        config, step = self.trainer.config, self.trainer.step
        if self.trainer.eval_dataset is None or config.eval_strategy == "no":
            return False
        if step >= self.total_steps or self.trainer.should_stop:
            return True
        if config.eval_strategy == "steps":
            return step % config.eval_steps == 0
        # Data without a length end with the first step after their end.
        return self.counts.place[0] > self.counts.evaluated_epochs

    def _epochs(self) -> float:
        epoch, batch = self.counts.place
        return epoch + (batch / self._batches_in_epoch if self._batches_in_epoch else 0)

    def _wall_s(self) -> float:
        began = getattr(self, "_began", None)
        return self.counts.wall_s + (0.0 if began is None else time.perf_counter() - began)

    @property
    def _tokens_per_s(self) -> float:
        return self.counts.tokens / self.counts.training_s if self.counts.training_s else 0.0

    def _mfu(self) -> float:
        return self.trainer.model_flops_utilisation(self._tokens_per_s)


def _drop_gradients(model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.grad = None
