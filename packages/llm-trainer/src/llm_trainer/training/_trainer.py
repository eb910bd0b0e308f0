"""The training loop."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence, Sized
from pathlib import Path
from typing import Any, Self, cast

import torch
from av_memory import MemoryTracker
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from llm_trainer.config import TrainingConfig
from llm_trainer.data import create_dataloader
from llm_trainer.exceptions import TrainingError
from llm_trainer.models import TransformerLM
from llm_trainer.models._model_files import check_tokenizer
from llm_trainer.tokenizer import BPETokenizer
from llm_trainer.training._history import TrainingHistory
from llm_trainer.training._interrupt import InterruptGuard
from llm_trainer.training._loop import TrainingLoop
from llm_trainer.training._precision import Precision
from llm_trainer.training._progress import ProgressReport
from llm_trainer.training.callbacks import Callback
from llm_trainer.training.utils import get_device, set_seed
from llm_trainer.utils.metrics import mean_loss, perplexity_of

_logger = logging.getLogger(__name__)

Rows = Dataset[dict[str, Tensor]]


class Trainer:
    """Trains a model on rows of tokens, such as `LanguageModelingDataset`.

    Two runs with the same seed, data, initial weights and number of threads give the same weights to the
    bit on a CPU.
    """

    def __init__(
        self,
        model: TransformerLM,
        tokenizer: BPETokenizer,
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
            ConfigurationError: `config` was changed into an impossible one.
            TokenizerNotTrainedException: The tokenizer has no vocabulary.
        """
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
        self.callbacks = list(callbacks)
        self.history = TrainingHistory()
        self.should_stop = False
        self.step = 0
        self._show_progress = show_progress
        self._precision = Precision(config, self.device)

    def train(self) -> TrainingHistory:
        """Train from the first step to the last and return the history, which begins anew.

        With `output_dir`, `history.jsonl` there is written before the first step, at each evaluation, and
        however training ends.

        Raises:
            TrainingError: There is no training data, or too many steps in a row were not finite.
            OSError: `output_dir` cannot be written to. Where that happens in the middle, it is logged, and
                raised when training is over.
            KeyboardInterrupt: Ctrl-C was pressed: the step in hand was finished and the history written, so
                the model can be used or saved. Pressing it twice stops at once.
        """
        if self.train_dataset is None:
            raise TrainingError("There is nothing to train on: give train_dataset to Trainer(...).")
        if not len(cast("Sized", self.train_dataset)):
            raise TrainingError("The training dataset has no rows.")
        loader = self._loader(self.train_dataset, train=True)
        steps_in_epoch = math.ceil(len(loader) / self.config.gradient_accumulation_steps)
        total_steps = self.config.max_steps or steps_in_epoch * self.config.num_epochs
        self.history = TrainingHistory()
        self.step = 0
        self.should_stop = False
        set_seed(self.config.seed)
        # A folder that cannot be written to is found before the work, not after it.
        self.save_history()
        interrupt = InterruptGuard()
        dataset = self.eval_dataset
        loop = TrainingLoop(
            self,
            total_steps=total_steps,
            steps_in_epoch=steps_in_epoch,
            precision=self._precision,
            interrupt=interrupt,
            evaluate=None
            if dataset is None
            else lambda: self._mean_loss(dataset, stop=lambda: interrupt.requested)[0],
            save_history=self._try_to_save_history,
            progress=ProgressReport(total_steps) if self._show_progress else None,
        )
        try:
            with MemoryTracker("train"), interrupt:
                loop.run(loader)
        finally:
            failure = self._try_to_save_history()
        if interrupt.requested:
            raise KeyboardInterrupt(f"Training was interrupted after step {self.step} of {total_steps}.")
        if failure is not None:
            raise failure
        return self.history

    def evaluate(self) -> dict[str, float]:
        """Return the evaluation data's loss (nats a token, weighted by tokens), perplexity and number of
        tokens.

        Raises:
            TrainingError: There is no evaluation data.
        """
        if self.eval_dataset is None:
            raise TrainingError("There is nothing to evaluate on: give eval_dataset to Trainer(...).")
        loss, tokens = self._mean_loss(self.eval_dataset)
        if loss is None:
            raise TrainingError("The evaluation dataset has no token to predict.")
        return {"loss": loss, "perplexity": perplexity_of(loss), "tokens": float(tokens)}

    def _mean_loss(self, dataset: Rows, stop: Callable[[], bool] = lambda: False) -> tuple[float | None, int]:
        """Return the loss and the number of predicted tokens; None if there are none, or it was stopped."""
        loader = self._loader(dataset, train=False)
        with MemoryTracker("evaluate"), self._precision.autocast():
            loss, tokens = mean_loss(self.model, loader, self.device, stop=stop)
        return (None if stop() or not tokens else loss), tokens

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
            model_path: Folder of the model.
            tokenizer_path: Folder of the tokenizer; `model_path` by default.
            config: Settings for further training; the defaults if None.
            **kwargs: Further parameters of `Trainer`, such as `eval_dataset`.

        Raises:
            FormatError: A file is missing, damaged, or newer than this release, or the model was saved with
                another tokenizer.
        """
        tokenizer = BPETokenizer.from_pretrained(tokenizer_path if tokenizer_path is not None else model_path)
        check_tokenizer(Path(model_path), tokenizer.fingerprint())
        return cls(TransformerLM.from_pretrained(model_path), tokenizer, config or TrainingConfig(), **kwargs)

    def _loader(self, dataset: Rows, *, train: bool) -> DataLoader[dict[str, Tensor]]:
        return create_dataloader(
            dataset,
            batch_size=self.config.batch_size,
            shuffle=train,
            num_workers=self.config.dataloader_num_workers,
            pin_memory=self.device.type == "cuda",
            # An evaluation with torch's own random numbers would change the dropout of the steps after it.
            seed=self.config.seed,
        )

    def save_history(self) -> None:
        """Write `history.jsonl` into `output_dir`, if there is one."""
        if self.config.output_dir is not None:
            self.history.save(Path(self.config.output_dir) / "history.jsonl")

    def _try_to_save_history(self) -> OSError | None:
        """Write the history; a failure must end neither a long training nor hide what did end it."""
        try:
            self.save_history()
        except OSError as error:
            _logger.warning("The history cannot be written (%s); the model is not concerned.", error)
            return error
        return None
