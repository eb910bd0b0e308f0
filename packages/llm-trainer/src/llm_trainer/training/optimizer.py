"""Optimizers by name."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.optim import SGD, Adam, AdamW, Optimizer

from llm_trainer.exceptions import ConfigurationError

__all__ = ["create_optimizer"]


def create_optimizer(
    model: nn.Module,
    optimizer_type: str = "adamw",
    learning_rate: float = 1e-4,
    weight_decay: float = 0.01,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    momentum: float = 0.9,
) -> Optimizer:
    """Return an optimizer of the parameters that are trained, in torch's fused form.

    Weights of two or more dimensions are decayed; vectors (biases and norms) are not.

    Args:
        model: Its parameters with `requires_grad` are optimised.
        optimizer_type: `adamw`, `adam` or `sgd`.
        learning_rate: Step size.
        weight_decay: Share of the learning rate by which decayed weights shrink at each step (`adamw`), or L2
            penalty: the share of the weights that is added to their gradient (`adam`, `sgd`).
        betas: Decay rates of Adam's averages.
        eps: Added to the denominator of Adam's update.
        momentum: Of `sgd`.

    Raises:
        ConfigurationError: The type is unknown, or nothing is trained.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not trained:
        raise ConfigurationError(
            "The model has no parameter with requires_grad; there is nothing to optimise."
        )
    groups: list[dict[str, Any]] = [
        {"params": [p for p in trained if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.dim() < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    match optimizer_type:
        case "adamw":
            return AdamW(groups, lr=learning_rate, betas=betas, eps=eps, fused=True)
        case "adam":
            return Adam(groups, lr=learning_rate, betas=betas, eps=eps, fused=True)
        case "sgd":
            return SGD(groups, lr=learning_rate, momentum=momentum, fused=True)
        case _:
            raise ConfigurationError(
                f'optimizer_type is {optimizer_type!r}; it must be one of "adamw", "adam", "sgd".'
            )
