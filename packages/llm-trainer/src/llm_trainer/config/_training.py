"""How a model is trained."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

from llm_trainer.config._base import Config
from llm_trainer.exceptions import ConfigurationError

OPTIMIZERS = ("adamw", "adam", "sgd")
SCHEDULERS = ("cosine", "linear", "constant", "polynomial")
AMP_DTYPES = ("float16", "bfloat16")
EVAL_STRATEGIES = ("steps", "epoch", "no")


@dataclass
class TrainingConfig(Config):
    """Settings of one training run."""

    batch_size: int = 32
    """Rows in one forward pass on one device."""
    learning_rate: float = 1e-4
    """Highest learning rate, reached at the end of the warm-up."""
    weight_decay: float = 0.01
    """Decay of the weight matrices; vectors (norms, biases) are never decayed. With `adam` and `sgd` it is an
    L2 penalty: it is added to the gradient."""
    num_epochs: int = 10
    """Passes over the training data; not read when `max_steps` is given."""
    max_steps: int | None = None
    """Optimizer steps to take, over as many passes as that needs."""
    lr_scheduler: str = "cosine"
    """`cosine`, `linear`, `constant` or `polynomial`, after the warm-up."""
    warmup_steps: int | None = 1000
    """Longest warm-up in steps; None sets no bound."""
    warmup_ratio: float | None = 0.1
    """Longest warm-up as a share of the run; None sets no bound. Of the two bounds the smaller one holds,
    so that a short run is not spent warming up."""
    min_lr_ratio: float = 0.1
    """Last learning rate of the decaying schedules, as a share of `learning_rate`."""
    optimizer: str = "adamw"
    """`adamw` (decay beside the gradient), `adam` or `sgd` (with momentum 0.9)."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay rates of Adam's two averages."""
    eps: float = 1e-8
    """Added to the denominator of Adam's update."""
    max_grad_norm: float | None = 1.0
    """Gradients of a larger total norm are scaled down to it; None leaves them."""
    gradient_accumulation_steps: int = 1
    """Forward passes in one optimizer step. The step's loss is the mean over all of its tokens."""
    use_amp: bool = True
    """Run the matrix products in half precision."""
    amp_dtype: str = "float16"
    """`float16` (with loss scaling; becomes bfloat16 on a CPU, which has no fast float16) or `bfloat16`."""
    eval_steps: int = 500
    """Steps from one evaluation to the next with `eval_strategy="steps"`."""
    eval_strategy: str = "steps"
    """`steps`, `epoch` or `no`. A run with evaluation data ends with an evaluation, also when a callback
    stops it, unless this is `no` or Ctrl-C ends it."""
    logging_steps: int = 100
    """Steps from one line of progress and record of the history to the next."""
    world_size: int = 1
    """Number of training processes; only 1 is supported."""
    local_rank: int = -1
    """Rank of this process on its machine; -1 or 0 with one process."""
    dataloader_num_workers: int = 0
    """Processes that prepare batches. Rows of a `LanguageModelingDataset` are in memory: none is fastest."""
    seed: int = 42
    """Seed of the shuffling and of dropout."""
    max_skipped_steps: int = 10
    """Steps in a row that a non-finite loss or gradient may skip before training stops with an error."""
    output_dir: str | None = None
    """Folder for the run's history; None writes no files."""

    def validate(self) -> None:
        """Check every field.

        Raises:
            ConfigurationError: A value is impossible; the message says what is allowed.
        """
        for name in (
            "batch_size",
            "num_epochs",
            "gradient_accumulation_steps",
            "eval_steps",
            "logging_steps",
            "max_skipped_steps",
        ):
            self._check_int(name, least=1)
        self._check_int("max_steps", least=1, optional=True)
        self._check_int("warmup_steps", least=0, optional=True)
        self._check_int("dataloader_num_workers", least=0)
        self._check_int("seed", least=0, most=2**64 - 1)
        self._check_int("world_size", least=1)
        self._check_int("local_rank", least=-1)
        for name in ("learning_rate", "eps"):
            self._check_float(name, open_low=True)
        self._check_float("weight_decay")
        self._check_float("warmup_ratio", most=1.0, optional=True)
        self._check_float("min_lr_ratio", most=1.0)
        self._check_float("max_grad_norm", open_low=True, optional=True)
        # YAML reads a bare `no` as False.
        if cast("object", self.eval_strategy) is False:
            self.eval_strategy = "no"
        self._check_choice("lr_scheduler", SCHEDULERS)
        self._check_choice("optimizer", OPTIMIZERS)
        self._check_choice("amp_dtype", AMP_DTYPES)
        self._check_choice("eval_strategy", EVAL_STRATEGIES)
        self._check_flags("use_amp")
        self._check_paths("output_dir")
        self._check_betas()
        if self.world_size != 1 or self.local_rank not in {-1, 0}:
            raise ConfigurationError(
                f"world_size={self.world_size} with local_rank={self.local_rank} asks for training in "
                f"several processes; "
                "only world_size=1 with local_rank -1 or 0 is supported."
            )

    def _check_betas(self) -> None:
        try:
            first, second = (float(beta) for beta in self.betas)
        except (TypeError, ValueError, OverflowError):
            first = second = -1.0
        if not (0 <= first < 1 and 0 <= second < 1):
            self._refuse("betas", "two numbers of at least 0 and below 1")
        self.betas = (first, second)

    @property
    def effective_batch_size(self) -> int:
        """Rows in one optimizer step, over all accumulation steps and processes."""
        return self.batch_size * self.gradient_accumulation_steps * self.world_size

    def resolve_warmup_steps(self, total_steps: int) -> int:
        """Return the warm-up of a run of `total_steps` steps: the smaller of the given bounds."""
        bounds = [] if self.warmup_steps is None else [self.warmup_steps]
        if self.warmup_ratio is not None:
            bounds.append(round(self.warmup_ratio * total_steps))
        return min([*bounds, total_steps]) if bounds else 0
