"""Optimizers by name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Muon, Optimizer

from llm_trainer.exceptions import ConfigurationError

__all__ = ["MuonWithAdamW", "create_optimizer"]


def create_optimizer(
    model: nn.Module,
    optimizer_type: str = "adamw",
    learning_rate: float = 1e-4,
    weight_decay: float = 0.01,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    momentum: float = 0.9,
    *,
    muon_learning_rate: float = 0.02,
    muon_momentum: float = 0.95,
) -> Optimizer:
    """Return an optimizer of the parameters that are trained, in torch's fused form.

    Weights of two or more dimensions are decayed; vectors (biases and norms) are not.

    Args:
        model: Its parameters with `requires_grad` are optimised.
        optimizer_type: `adamw`, `adam`, `sgd`, or `muon`: torch's Muon for the matrices, and `adamw`
            for the embeddings, the output projection (`head`) and the vectors.
        learning_rate: Step size; with `muon`, that of the parameters which AdamW has.
        weight_decay: Share of the learning rate by which decayed weights shrink at each step (`adamw`,
            `muon`), or L2 penalty: the share of the weights that is added to their gradient (`adam`, `sgd`).
        betas: Decay rates of Adam's averages.
        eps: Added to the denominator of Adam's update.
        momentum: Of `sgd`.
        muon_learning_rate: Step size of Muon's matrices, whose updates have singular values of about one
            times sqrt(max(1, rows / columns)) (Jordan et al., 2024).
        muon_momentum: Nesterov momentum of Muon.

    Raises:
        ConfigurationError: The type is unknown, nothing is trained, or `muon` has no matrix to train.
    """
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    trained = [parameter for _, parameter in named]
    if not trained:
        raise ConfigurationError(
            "The model has no parameter with requires_grad; there is nothing to optimise."
        )
    match optimizer_type:
        case "adamw":
            return AdamW(
                _decay_groups(trained, weight_decay), lr=learning_rate, betas=betas, eps=eps, fused=True
            )
        case "adam":
            return Adam(
                _decay_groups(trained, weight_decay), lr=learning_rate, betas=betas, eps=eps, fused=True
            )
        case "sgd":
            return SGD(_decay_groups(trained, weight_decay), lr=learning_rate, momentum=momentum, fused=True)
        case "muon":
            tables = {
                id(parameter)
                for module in model.modules()
                if isinstance(module, nn.Embedding)
                for parameter in module.parameters()
            }
            matrices = [
                parameter
                for name, parameter in named
                if parameter.dim() == 2 and id(parameter) not in tables and not name.startswith("head.")
            ]
            if not matrices:
                raise ConfigurationError(
                    'optimizer "muon" trains matrices between embedding and output, and none of them has '
                    'requires_grad; use "adamw".'
                )
            chosen = set(map(id, matrices))
            rest = [parameter for parameter in trained if id(parameter) not in chosen]
            muon = Muon(matrices, lr=muon_learning_rate, weight_decay=weight_decay, momentum=muon_momentum)
            if not rest:
                return muon
            adamw = AdamW(
                _decay_groups(rest, weight_decay), lr=learning_rate, betas=betas, eps=eps, fused=True
            )
            return MuonWithAdamW(muon, adamw)
        case _:
            raise ConfigurationError(
                f'optimizer_type is {optimizer_type!r}; it must be one of "adamw", "adam", "sgd", "muon".'
            )


def _decay_groups(parameters: Sequence[Tensor], weight_decay: float) -> list[dict[str, Any]]:
    groups: list[dict[str, Any]] = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


class MuonWithAdamW(Optimizer):
    """Two optimizers as one, each of its own parameters.

    `param_groups` are those of both, the very same dictionaries, so that a schedule reaches all of them.
    """

    def __init__(self, muon: Muon, adamw: AdamW) -> None:
        self.parts: dict[str, Optimizer] = {"muon": muon, "adamw": adamw}
        super().__init__([parameter for group in self._groups() for parameter in group["params"]], {})
        self.param_groups = self._groups()

    def _groups(self) -> list[dict[str, Any]]:
        return [group for part in self.parts.values() for group in part.param_groups]

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Update all parameters."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for part in self.parts.values():
            part.step()
        return loss

    def state_dict(self) -> dict[str, Any]:
        """Return the state of both, by name."""
        return {name: part.state_dict() for name, part in self.parts.items()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the state of both.

        Raises:
            ValueError: It is the state of another kind of optimizer, or of other parameters.
        """
        if state_dict.keys() != self.parts.keys():
            raise ValueError(f"the state has {sorted(state_dict)}, not {sorted(self.parts)}")
        for name, part in self.parts.items():
            part.load_state_dict(cast("dict[str, Any]", state_dict[name]))
        # Loading made new dictionaries.
        self.param_groups = self._groups()
