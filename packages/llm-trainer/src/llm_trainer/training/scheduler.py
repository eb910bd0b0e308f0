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
    step: int,
    *,
    scheduler_type: str,
    num_training_steps: int,
    warmup_steps: int,
    min_lr_ratio: float,
    decay_ratio: float = 0.4,
) -> float:
    """Return the share of the peak learning rate at which update `step` (from 0) is made.

    With w warm-up steps, n steps and the minimum m: (step + 1) / w in the warm-up, so that the first update
    is not lost. Then, with t = (step - w) / (n - 1 - w) running from 0 to 1 at the last update:

    - constant: 1
    - linear: 1 - (1 - m) t
    - cosine: m + (1 - m) (1 + cos(pi t)) / 2
    - polynomial: m + (1 - m) (1 - t)^2
    - warmup_stable_decay: 1 - (1 - m) u, where u is 0 before the last d = round(decay_ratio * n) updates and
      then rises by 1 / d each, to 1 at the last one (Hu et al., 2024)
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    if scheduler_type == "constant":
        return 1.0
    if scheduler_type == "warmup_stable_decay":
        decay_steps = min(round(decay_ratio * num_training_steps), num_training_steps - warmup_steps)
        fallen = step + 1 - (num_training_steps - decay_steps)
        shape = 1 - min(1.0, max(0, fallen) / max(1, decay_steps))
        return min_lr_ratio + (1 - min_lr_ratio) * shape
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
                'it must be one of "cosine", "linear", "constant", "polynomial", "warmup_stable_decay".'
            )
    return min_lr_ratio + (1 - min_lr_ratio) * shape


def create_scheduler(
    optimizer: Optimizer,
    scheduler_type: str = "cosine",
    num_training_steps: int = 1000,
    warmup_steps: int = 0,
    min_lr_ratio: float = 0.1,
    *,
    decay_ratio: float = 0.4,
    updates: int = 0,
) -> LambdaLR:
    """Return a schedule of the optimizer's learning rates, by the formulas of `learning_rate_factor`.

    Args:
        optimizer: The learning rates of its groups are the highest ones.
        scheduler_type: `cosine`, `linear`, `constant`, `polynomial` or `warmup_stable_decay`.
        num_training_steps: Updates of the whole run.
        warmup_steps: Updates in which the learning rate rises.
        min_lr_ratio: Last learning rate of the decaying ones, as a share of the highest.
        decay_ratio: Share of the run in which `warmup_stable_decay` falls.
        updates: Updates that were made before, where a run goes on.

    Raises:
        ConfigurationError: The type is unknown or a number impossible.
    """
    if (
        num_training_steps < 1
        or not 0 <= warmup_steps <= num_training_steps
        or not 0 <= min_lr_ratio <= 1
        or not 0 <= decay_ratio <= 1
    ):
        raise ConfigurationError(
            f"num_training_steps={num_training_steps}, warmup_steps={warmup_steps}, "
            f"min_lr_ratio={min_lr_ratio}, decay_ratio={decay_ratio}: "
            "at least one step, no more warm-up than steps, and ratios from 0 to 1 are needed."
        )
    factor = partial(
        learning_rate_factor,
        scheduler_type=scheduler_type,
        num_training_steps=num_training_steps,
        warmup_steps=warmup_steps,
        min_lr_ratio=min_lr_ratio,
        decay_ratio=decay_ratio,
    )
    factor(num_training_steps)
    for group in optimizer.param_groups:
        group["initial_lr"] = group["lr"]
    return LambdaLR(optimizer, factor, last_epoch=updates - 1)
