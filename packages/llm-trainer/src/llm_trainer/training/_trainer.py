"""The trainer."""

from __future__ import annotations

import logging
import os
import secrets
import signal
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Self, cast

import torch
from av_memory import MemoryTracker
from torch import Tensor
from torch.utils.data import IterableDataset

from llm_trainer._files import write_json, write_text
from llm_trainer.config import DataConfig, ModelConfig, TrainingConfig
from llm_trainer.config._base import check_type
from llm_trainer.data import PositionedLoader, create_dataloader, load_splits
from llm_trainer.data._splits import held_out
from llm_trainer.exceptions import CheckpointError, ModelConfigurationError, TrainingError
from llm_trainer.models import TransformerLM
from llm_trainer.models._compile import compile_blocks_
from llm_trainer.models._flops import flops_per_token
from llm_trainer.models._model_files import check_tokenizer
from llm_trainer.tokenizer import Tokenizer, load_tokenizer
from llm_trainer.training import _checkpoints
from llm_trainer.training._checkpoint_folder import remove_unfinished
from llm_trainer.training._checks import (
    Rows,
    check_evaluations,
    check_length,
    check_rows,
    configured_callbacks,
)
from llm_trainer.training._history import TrainingHistory
from llm_trainer.training._lock import locked
from llm_trainer.training._loop import TrainingLoop
from llm_trainer.training._peak import peak_flops_per_s
from llm_trainer.training._precision import Precision
from llm_trainer.training._progress import ProgressReport
from llm_trainer.training._run_folder import run_info, save_curves
from llm_trainer.training._signals import SignalGuard
from llm_trainer.training.callbacks import Callback
from llm_trainer.training.loggers import RunLogger, create_loggers
from llm_trainer.training.utils import get_device, set_seed
from llm_trainer.utils.metrics import mean_loss, perplexity_of

_logger = logging.getLogger(__name__)


class Trainer:
    """Trains a model on rows of tokens, such as `LanguageModelingDataset`.

    Two runs with the same seed, data, initial weights and number of threads give the same weights to the
    bit on a CPU, also where one of them was ended in the middle, however, and resumed.
    """

    def __init__(
        self,
        model: TransformerLM,
        tokenizer: Tokenizer,
        config: TrainingConfig,
        train_dataset: Rows | None = None,
        eval_dataset: Rows | None = None,
        callbacks: Sequence[Callback] = (),
        *,
        device: torch.device | str | None = None,
        show_progress: bool = True,
    ) -> None:
        """Prepare to train; nothing is computed yet.

        Args:
            model: Trained in place, on `device`.
            tokenizer: Saved with the model, and used by `generate_text`.
            config: Settings of the run.
            train_dataset: Rows with `input_ids`, `labels` and, if wanted, `attention_mask`.
            eval_dataset: The same, to evaluate on.
            callbacks: Called in this order.
            device: Where to train; `get_device()` by default.
            show_progress: Whether to show progress on standard error: a bar on a terminal, lines elsewhere.

        Raises:
            TrainingError: The model has fewer embeddings than the tokenizer has tokens.
            ConfigurationError: The model, the tokenizer or `config` is something else, or `config` was
                changed into an impossible one. Or `report_to` asks for a log in the run's folder, and there
                is none; with the default `report_to` there is no log then.
            MissingLoggerError: What `report_to` asks for is not installed.
            TokenizerNotTrainedException: The tokenizer has no vocabulary.
        """
        check_type(model, TransformerLM, "model")
        check_type(tokenizer, Tokenizer, "tokenizer")
        check_type(config, TrainingConfig, "config")
        config.validate()
        if tokenizer.vocab_size > model.config.vocab_size:
            raise TrainingError(
                f"The tokenizer has {tokenizer.vocab_size} tokens, the model only "
                f"{model.config.vocab_size} embeddings; "
                "build the model with ModelConfig(vocab_size=tokenizer.vocab_size)."
            )
        self.device = torch.device(device) if device is not None else get_device()
        self.model = model.to(self.device)
        self.tokenizer = tokenizer
        self.config = config
        self.train_dataset = train_dataset
        self.eval_dataset = eval_dataset
        self.callbacks = [*callbacks, *configured_callbacks(config)]
        self.history = TrainingHistory()
        self.should_stop = False
        self.step = 0
        self.run_id = ""
        self.resumed_after: list[int] = []
        """Steps after which this run was resumed."""
        self.compiles_first_step = False
        self._compiled = False
        self._show_progress = show_progress
        self._precision = Precision(config, self.device)
        self._flops_share: float | None = None
        """Of the device's peak, what a token a second takes."""
        self._data_config: DataConfig | None = None
        self._loop: TrainingLoop | None = None
        self._is_over = False
        self._save_failure: OSError | CheckpointError | None = None
        # Absolute, for a program may change its folder under way.
        checkpoints, output = config.checkpoint_dir, config.output_dir
        self.checkpoint_folder = None if checkpoints is None else Path(checkpoints).absolute()
        """Where the checkpoints are."""
        self.run_folder = self.checkpoint_folder if output is None else Path(output).absolute()
        """Where all else of the run is."""
        # The default, without a folder for it, is nobody's wish.
        logs_nothing = self.run_folder is None and config.report_to == TrainingConfig.report_to
        self._loggers = create_loggers(
            () if logs_nothing else config.report_to, self.run_folder, config.run_name
        )

    def train(self, resume_from_checkpoint: str | Path | None = None) -> TrainingHistory:
        """Train to the last step and return the history.

        A run begins anew, unless `resume_from_checkpoint` (here or in the configuration) says otherwise or
        `_load_checkpoint` was called.

        Args:
            resume_from_checkpoint: A checkpoint's folder, or `latest` for the newest one in `checkpoint_dir`
                that is whole; if there is none, the run begins anew.

        Raises:
            TrainingError: There is no row to train or to evaluate on, nothing can be compiled though
                `compile_model` asks for it, or too many steps in a row were not finite.
            ModelConfigurationError: The rows are too long for the model.
            ConfigurationError: Early stopping or `eval_strategy="epoch"` has nothing to evaluate on.
            CheckpointError: The checkpoint is damaged, or of another model, tokenizer or optimizer. Or one
                that was written was not what was read back: that is logged, and raised when training is over
                if no later one was well.
            DataError: It is of other data.
            OSError: The run's folder cannot be written to. Where that happens in the middle, it is logged,
                and raised when training is over.
            KeyboardInterrupt: Ctrl-C was pressed. The step in hand was finished (or what was not a step, such
                as an evaluation, cut short) and a checkpoint written. Pressing it twice stops at once.
            SystemExit: With code 143 (128 + 15) after SIGTERM, in the same way.
        """
        resume = resume_from_checkpoint or self.config.resume_from_checkpoint
        if self._loop is None or self._is_over or resume_from_checkpoint is not None:
            self._loop = self._begin(resume)
        loop = self._loop
        if loop.total_steps <= self.step:
            _logger.warning("Nothing is left to train: step %s of %s.", self.step, loop.total_steps)
        try:
            self._run(loop)
        finally:
            self._is_over = True
        return self.history

    def train_from_config(self, model_config: ModelConfig, data_config: DataConfig) -> TrainingHistory:
        """Read the text that `data_config` names, as rows of this trainer's tokenizer, and train on it.

        The run begins anew, or goes on as `resume_from_checkpoint` of the configuration says. What can be
        refused without the text, such as a checkpoint of another model, is refused before it is read.

        Args:
            model_config: That of the model, which was built before; given again so that they are compared.
            data_config: Text to train and evaluate on.

        Raises:
            ModelConfigurationError: `model_config` is not that of the model, or the rows are too long for it.
            ConfigurationError: One of the two is something else.
            DataError: A text is missing, empty or not text.

        `train` says what else is raised.
        """
        check_type(model_config, ModelConfig, "model_config")
        check_type(data_config, DataConfig, "data_config")
        different = _checkpoints.differences(model_config, self.model.config)
        if different:
            raise ModelConfigurationError(
                f"model_config is not that of the trainer's model: {different}; build the model with it."
            )
        data_config.validate()
        check_length(data_config.max_length, self.model.config)
        check_evaluations(self.config, self.callbacks, has_rows=held_out(data_config) is not None)
        with locked(self.checkpoint_folder):
            checkpoint = self._prepare(self.config.resume_from_checkpoint)
        cache = None if self.run_folder is None else self.run_folder / "data"
        splits = load_splits(data_config, self.tokenizer, cache_dir=cache)
        self.train_dataset, self.eval_dataset = splits.train, splits.validation
        self._data_config = data_config
        self._loop = self._begin(checkpoint)
        return self.train()

    def _train_epoch(self) -> float:
        """Train to the end of the current pass over the data, and return its mean loss in nats a token.

        A run that does not exist yet begins, or is resumed as the configuration says; so does one after
        `train`. `train` goes on with it, and `_save_checkpoint` saves it.
        """
        if self._loop is None or self._is_over:
            self._loop = self._begin(self.config.resume_from_checkpoint)
        counts = self._loop.counts
        loss, labels = counts.loss, counts.labels
        self._run(self._loop, epochs=1)
        return (counts.loss - loss) / max(1, counts.labels - labels)

    def _evaluate(self) -> dict[str, float]:
        """Do what `evaluate` does."""
        return self.evaluate()

    def _save_checkpoint(self) -> Path:
        """Write a checkpoint of the present state into `checkpoint_dir` and return its folder.

        Raises:
            TrainingError: There is no `checkpoint_dir`, no training data, or a weight is not finite.
            OSError: It cannot be written.
        """
        if self.checkpoint_folder is None:
            raise TrainingError("TrainingConfig.checkpoint_dir is None; set it to save checkpoints.")
        if self._loop is None:
            self._loop = self._begin(self.config.resume_from_checkpoint)
        return _checkpoints.save(self, self._loop)

    def _load_checkpoint(self, path: str | Path = "latest") -> Path | None:
        """Go to the state of a checkpoint, from which `train` goes on; return its folder.

        Args:
            path: Its folder, or `latest`; then None is returned if there is none.

        `train` says what is raised.
        """
        self._loop = self._begin(path)
        return self._resumed_from

    def _begin(self, resume: str | Path | None) -> TrainingLoop:
        """Return a run at its beginning, or at the checkpoint that it is to go on from."""
        if self.train_dataset is None:
            raise TrainingError("There is nothing to train on: give train_dataset to Trainer(...).")
        check_evaluations(self.config, self.callbacks, has_rows=self.eval_dataset is not None)
        check_rows("training", self.train_dataset, self.model.config)
        if self.eval_dataset is not None:
            check_rows("evaluation", self.eval_dataset, self.model.config)
        with locked(self.checkpoint_folder):
            return self._begin_alone(resume)

    def _prepare(self, resume: str | Path | None) -> Path | None:
        """Return the checkpoint to go on from, and do what else may fail before there are any rows."""
        folder = self.checkpoint_folder
        found = None if resume is None else _checkpoints.find(resume, folder)
        if found is not None:
            _checkpoints.check(found, self.model.config, self.config, self.callbacks)
            check_tokenizer(found, self.tokenizer.fingerprint())
        if folder is not None:
            remove_unfinished(folder)
            # A folder that cannot be written to is found before the work, not after it.
            write_text(folder / ".writable", "")
            (folder / ".writable").unlink()
        if self.config.compile_model and not self._compiled:
            compile_blocks_(self.model)
            self._compiled = self.compiles_first_step = True
        return found

    def _begin_alone(self, resume: str | Path | None) -> TrainingLoop:
        self._resumed_from = self._prepare(resume)
        self.history = TrainingHistory()
        self.step = 0
        self.should_stop = self._is_over = False
        self._save_failure = None
        train_dataset = cast("Rows", self.train_dataset)
        loader = self._loader(train_dataset, train=True)
        loop = TrainingLoop(
            self,
            loader=loader,
            batches_in_epoch=None if isinstance(train_dataset, IterableDataset) else len(loader),
            precision=self._precision,
        )
        self.run_id = secrets.token_hex(8)
        self.resumed_after = []
        if self._resumed_from is None:
            set_seed(self.config.seed)
        else:
            _checkpoints.load(self._resumed_from, self, loop)
            self.resumed_after = [*self.resumed_after, self.step]
        if self.run_folder is not None:
            self.save_history()
            write_json(self.run_folder / "run.json", run_info(self, self._data_config))
        return loop

    def _run(self, loop: TrainingLoop, *, epochs: int | None = None) -> None:
        guard = SignalGuard()
        progress = ProgressReport(loop.total_steps, first_step=self.step) if self._show_progress else None
        started: list[RunLogger] = []
        info = run_info(self, self._data_config)
        try:
            for logger in self._loggers:
                logger.start(info, resumed_from_step=self.step or None)
                started.append(logger)
            with locked(self.checkpoint_folder), MemoryTracker("train"), guard:
                loop.run(guard, progress, started, epochs=epochs)
        finally:
            failure = self.try_to_save_history() or self._save_failure
            for logger in started:
                logger.close()
        if guard.received is not None:
            message = f"Training was ended by {guard.received.name} after step {self.step} of "
            message += f"{loop.total_steps}."
            if failure is None and loop.saved_step == self.step:
                message += ' Go on with resume_from_checkpoint="latest".'
            _logger.warning(message)
            if guard.received is signal.SIGTERM:
                raise SystemExit(128 + signal.SIGTERM)
            raise KeyboardInterrupt(message)
        if failure is None and self.run_folder is not None and loop.ends():
            save_curves(self, self.run_folder, info)
        if failure is not None:
            raise failure

    def evaluate(self) -> dict[str, float]:
        """Return the evaluation data's loss (nats a token, weighted by tokens), perplexity and number of
        tokens.

        Raises:
            TrainingError: There is no evaluation data.
        """
        if self.eval_dataset is None:
            raise TrainingError("There is nothing to evaluate on: give eval_dataset to Trainer(...).")
        loss, tokens = self._mean_loss(self.eval_dataset)
        if not tokens:
            raise TrainingError("The evaluation dataset has no token to predict.")
        return {"loss": loss, "perplexity": perplexity_of(loss), "tokens": float(tokens)}

    def evaluation_loss(self, progress: ProgressReport | None = None) -> float | None:
        """Return the loss of the evaluation data; None if there is nothing to predict."""
        loss, tokens = self._mean_loss(cast("Rows", self.eval_dataset), progress)
        return loss if tokens else None

    def _mean_loss(self, dataset: Rows, progress: ProgressReport | None = None) -> tuple[float, int]:
        loader = self._loader(dataset, train=False)
        total = None if isinstance(dataset, IterableDataset) else len(loader)

        def batches() -> Iterator[dict[str, Tensor]]:
            for number, batch in enumerate(loader, start=1):
                yield batch
                if progress is not None:
                    progress.evaluating(number, total)

        with MemoryTracker("evaluate"), self._precision.autocast():
            return mean_loss(self.model, batches(), self.device)

    def generate_text(self, prompt: str, max_length: int = 100, **kwargs: Any) -> str:
        """Return the prompt and its continuation, `max_length` tokens in all, or up to the end of the text.

        Args:
            prompt: Text to continue.
            max_length: Most tokens, the prompt's included.
            **kwargs: Further parameters of `TransformerLM.generate`, such as `temperature` and `top_k`.

        Raises:
            GenerationError: A parameter is impossible, or the prompt leaves no room.
        """
        ids = torch.tensor([self.tokenizer.encode(prompt)], device=self.device)
        kwargs.setdefault("eos_token_id", self.tokenizer.eos_token_id)
        return self.tokenizer.decode(
            int(token) for token in self.model.generate(ids, max_length, **kwargs)[0]
        )

    def save_model(self, save_path: str | Path) -> None:
        """Write the tokenizer and the model into one folder, from which `from_pretrained` reads both.

        The files carry one another's hashes, so a folder in which a crash left files of two saves does not
        load.
        """
        self.tokenizer.save_pretrained(save_path)
        self.model.save_pretrained(save_path, tokenizer_fingerprint=self.tokenizer.fingerprint())

    @classmethod
    def from_pretrained(
        cls,
        model_path: str | Path,
        tokenizer_path: str | Path | None = None,
        config: TrainingConfig | None = None,
        **kwargs: Any,
    ) -> Self:
        """Return a trainer with a saved model and tokenizer.

        Args:
            model_path: Folder of the model; a checkpoint's will do.
            tokenizer_path: Folder of the tokenizer; `model_path` by default.
            config: Settings for further training; the defaults if None.
            **kwargs: Further parameters of `Trainer`, such as `eval_dataset`.

        Raises:
            FormatError: A file is missing, damaged, or newer than this release, or the model was saved with
                another tokenizer.
        """
        tokenizer = load_tokenizer(tokenizer_path if tokenizer_path is not None else model_path)
        check_tokenizer(Path(model_path), tokenizer.fingerprint())
        config = TrainingConfig() if config is None else config
        return cls(TransformerLM.from_pretrained(model_path), tokenizer, config, **kwargs)

    def _loader(self, dataset: Rows, *, train: bool) -> PositionedLoader:
        workers = self.config.dataloader_num_workers
        if workers is None:
            wanted = 0 if self._data_config is None else self._data_config.dataloader_num_workers
            workers = min(wanted, os.cpu_count() or 1)
        return create_dataloader(
            dataset,
            batch_size=self.config.batch_size,
            shuffle=train and not isinstance(dataset, IterableDataset),
            num_workers=workers if train else 0,
            pin_memory=self.device.type == "cuda",
            # An evaluation with torch's own random numbers would change the dropout of the steps after it.
            seed=self.config.seed,
        )

    def model_flops_utilisation(self, tokens_per_s: float) -> float:
        """Return the model's floating-point operations at this speed, as a share of the device's peak: the
        published one of a known GPU in half precision, else what a large matrix product reaches.
        """
        if self._flops_share is None:
            length = getattr(self.train_dataset, "max_length", self.model.config.max_seq_len)
            peak = peak_flops_per_s(self.device, self._precision.dtype or torch.float32)
            self._flops_share = flops_per_token(self.model.config, length) / peak
        return tokens_per_s * self._flops_share

    def save_history(self) -> None:
        """Write `history.jsonl` into the run's folder, if there is one."""
        if self.run_folder is not None:
            self.history.save(self.run_folder / "history.jsonl")

    def try_to_save_history(self) -> OSError | None:
        """Write the history; a failure must neither end a long training nor hide what did end it."""
        try:
            self.save_history()
        except OSError as error:
            _logger.warning("The history cannot be written (%s); the model is not concerned.", error)
            return error
        return None

    def save_periodically(self, loop: TrainingLoop) -> None:
        """Write a checkpoint, if there is a folder for them; a failure is logged and kept for the end, for
        the earlier checkpoints are still there and the next save may succeed.
        """
        if self.checkpoint_folder is None:
            return
        self._save_failure = None
        try:
            path = _checkpoints.save(self, loop)
        except (OSError, CheckpointError) as error:
            self._save_failure = error
            _logger.error(
                "The checkpoint of step %s cannot be written (%s); training goes on.", self.step, error
            )
            return
        for callback in self.callbacks:
            callback.on_save(self, path)
