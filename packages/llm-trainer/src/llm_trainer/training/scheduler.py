"""Learning rate schedules by name."""

from __future__ import annotations

import math
from functools import partial

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from llm_trainer.exceptions import ConfigurationError

__all__ = ["create_scheduler", "learning_rate_factor"]

_POWER = 2.0


def learning_rate_factor(
    step: int, *, scheduler_type: str, num_training_steps: int, warmup_steps: int, min_lr_ratio: float
) -> float:
    """Return the share of the peak learning rate at which update `step` (from 0) is made.

    With w warm-up steps, n steps and the minimum m: (step + 1) / w in the warm-up, so that the first update
    is not lost. Then, with t = (step - w) / (n - 1 - w) running from 0 to 1 at the last update:

    - constant: 1
    - linear: 1 - (1 - m) t
    - cosine: m + (1 - m) (1 + cos(pi t)) / 2
    - polynomial: m + (1 - m) (1 - t)^2
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    if scheduler_type == "constant":
        return 1.0
    t = min(1.0, (step - warmup_steps) / max(1, num_training_steps - 1 - warmup_steps))
    match scheduler_type:
        case "linear":
            shape = 1 - t
        case "cosine":
            shape = (1 + math.cos(math.pi * t)) / 2
        case "polynomial":
            shape = (1 - t) ** _POWER
        case _:
            raise ConfigurationError(
                f"scheduler_type is {scheduler_type!r}; "
                'it must be one of "cosine", "linear", "constant", "polynomial".'
            )
    return min_lr_ratio + (1 - min_lr_ratio) * shape


def create_scheduler(
    optimizer: Optimizer,
    scheduler_type: str = "cosine",
    num_training_steps: int = 1000,
    warmup_steps: int = 0,
    min_lr_ratio: float = 0.1,
) -> LambdaLR:
    """Return a schedule of the optimizer's learning rate, by the formulas of `learning_rate_factor`.

    Raises:
        ConfigurationError: The type is unknown or a number impossible.
    """
    if num_training_steps < 1 or not 0 <= warmup_steps <= num_training_steps or not 0 <= min_lr_ratio <= 1:
        raise ConfigurationError(
            f"num_training_steps={num_training_steps}, warmup_steps={warmup_steps}, "
            f"min_lr_ratio={min_lr_ratio}: "
            "at least one step, no more warm-up than steps, and a ratio from 0 to 1 are needed."
        )
    factor = partial(
        learning_rate_factor,
        scheduler_type=scheduler_type,
        num_training_steps=num_training_steps,
        warmup_steps=warmup_steps,
        min_lr_ratio=min_lr_ratio,
    )
    factor(num_training_steps)
    return LambdaLR(optimizer, factor)
