"""How a model is trained."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, cast

from llm_trainer.config._base import Config
from llm_trainer.exceptions import ConfigurationError

OPTIMIZERS = ("adamw", "adam", "sgd", "muon")
SCHEDULERS = ("cosine", "linear", "constant", "polynomial", "warmup_stable_decay")
AMP_DTYPES = ("float16", "bfloat16")
EVAL_STRATEGIES = ("steps", "epoch", "no")
REPORTS = ("tensorboard", "wandb", "csv", "jsonl")


@dataclass
class TrainingConfig(Config):
    """Settings of one training run."""

    section: ClassVar[str] = "training"

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
    """What follows the warm-up: `cosine`, `linear`, `constant`, `polynomial`, or `warmup_stable_decay`, which
    is constant and falls linearly in the last `decay_ratio` of the run."""
    warmup_steps: int | None = 1000
    """Longest warm-up in steps; None sets no bound."""
    warmup_ratio: float | None = 0.1
    """Longest warm-up as a share of the run; None sets no bound. Of the two bounds the smaller one holds,
    so that a short run is not spent warming up."""
    min_lr_ratio: float = 0.1
    """Last learning rate of the decaying schedules, as a share of `learning_rate`."""
    decay_ratio: float = 0.4
    """Share of the run in which `warmup_stable_decay` falls."""
    optimizer: str = "adamw"
    """`adamw` (decay beside the gradient), `adam`, `sgd` (with momentum 0.9), or `muon` for the blocks'
    matrices and `adamw` for the rest."""
    muon_learning_rate: float = 0.02
    """Highest learning rate of the matrices that `muon` trains; the rest have `learning_rate`."""
    muon_momentum: float = 0.95
    """Momentum of `muon`."""
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
    compile_model: bool = False
    """Compile each block with `torch.compile`: the first step takes some seconds more, the others less."""
    save_steps: int = 1000
    """Steps from one checkpoint to the next; the last step, and one that a signal ends, have one too."""
    checkpoint_dir: str | None = "./checkpoints"
    """Folder of the checkpoints; None makes none."""
    save_total_limit: int | None = 3
    """Checkpoints that are kept, the newest ones; None keeps all."""
    resume_from_checkpoint: str | None = None
    """A checkpoint's folder to go on from, or `latest` for the newest whole one in `checkpoint_dir` (and a
    new run if there is none)."""
    eval_steps: int = 500
    """Steps from one evaluation to the next with `eval_strategy="steps"`."""
    eval_strategy: str = "steps"
    """`steps`, `epoch` or `no`. A run with evaluation data ends with an evaluation, also when a callback
    stops it, unless this is `no` or Ctrl-C ends it."""
    logging_steps: int = 100
    """Steps from one line of progress and record of the history to the next."""
    report_to: tuple[str, ...] = ("tensorboard",)
    """Where the records go too, within the run's folder: any of `tensorboard`, `wandb`, `csv`, `jsonl`."""
    run_name: str | None = None
    """Name of the run in the logs; None takes that of the run's folder."""
    early_stopping_patience: int | None = None
    """Evaluations in a row without a lower held-out loss after which training stops; None never stops it."""
    early_stopping_threshold: float = 0.0
    """Least fall of the held-out loss, in nats a token, that counts as lower."""
    world_size: int = 1
    """Number of training processes; only 1 is supported."""
    local_rank: int = -1
    """Rank of this process on its machine; -1 or 0 with one process."""
    dataloader_num_workers: int | None = None
    """Processes that prepare batches. None means none, and in `train_from_config` what `DataConfig` says.
    Rows of a `LanguageModelingDataset` cost next to nothing: none is fastest."""
    seed: int = 42
    """Seed of the shuffling and of dropout."""
    max_skipped_steps: int = 10
    """Steps in a row that a non-finite loss or gradient may skip before training stops with an error."""
    output_dir: str | None = None
    """The run's folder: settings, versions, history, curves and logs. None means `checkpoint_dir`; where both
    are None, nothing is written."""

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
            "save_steps",
        ):
            self._check_int(name, least=1)
        for name in ("max_steps", "save_total_limit", "early_stopping_patience"):
            self._check_int(name, least=1, optional=True)
        self._check_int("warmup_steps", least=0, optional=True)
        self._check_int("dataloader_num_workers", least=0, most=1024, optional=True)
        self._check_int("seed", least=0, most=2**64 - 1)
        self._check_int("world_size", least=1)
        self._check_int("local_rank", least=-1)
        for name in ("learning_rate", "muon_learning_rate", "eps"):
            self._check_float(name, open_low=True)
        for name in ("weight_decay", "early_stopping_threshold"):
            self._check_float(name)
        self._check_float("muon_momentum", most=1.0, open_high=True)
        self._check_float("decay_ratio", most=1.0)
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
        self._check_flags("use_amp", "compile_model")
        self._check_paths("output_dir", "checkpoint_dir", "resume_from_checkpoint")
        self._check_report_to()
        self._check_text("run_name", "resume_from_checkpoint", optional=True)
        self._check_betas()
        if self.resume_from_checkpoint == "latest" and self.checkpoint_dir is None:
            raise ConfigurationError(
                'resume_from_checkpoint="latest" looks in checkpoint_dir, which is None; set it.'
            )
        if self.world_size != 1 or self.local_rank not in {-1, 0}:
            raise ConfigurationError(
                f"world_size={self.world_size} with local_rank={self.local_rank} asks for training in "
                f"several processes; "
                "only world_size=1 with local_rank -1 or 0 is supported."
            )

    def _check_report_to(self) -> None:
        reports = cast("object", self.report_to)
        if reports is None or reports == "none":
            reports = ()
        elif isinstance(reports, str):
            reports = (reports,)
        if not isinstance(reports, list | tuple) or any(
            name not in REPORTS for name in cast("Sequence[object]", reports)
        ):
            self._refuse("report_to", f"a list of any of {', '.join(REPORTS)}, or empty")
        self.report_to = tuple(cast("Sequence[str]", reports))

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
