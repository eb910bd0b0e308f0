"""The multilayer perceptron."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar

from bitcore.config import BitQuantConfig
from bitlayers import BitLinear
from torch import Tensor, nn

from bitmodels.base import BitModelBase
from bitmodels.config import ModelConfig, check_positive, check_share
from bitmodels.registry import register_model

__all__ = ["BitMLP", "BitMLPConfig", "BitMLPModel"]


@dataclass(frozen=True)
class BitMLPConfig(ModelConfig):
    """Configuration of a `BitMLPModel`.

    Raises:
        QuantizationError: A value is impossible.
    """

    n_layers: int = 3
    """Linear layers, the last one included."""
    in_channels: int = 256
    """Size of inputs."""
    hidden_dim: int = 128
    """Size between layers."""
    out_channels: int = 10
    """Size of outputs."""
    dropout: float = 0.0
    """The share of what is between layers that is left out in training."""
    norm: bool = True
    """A `SubLN` before each layer; without it ternary networks train worse."""

    def __post_init__(self) -> None:
        check_positive(self, "n_layers", "in_channels", "hidden_dim", "out_channels")
        check_share(self, "dropout")


@register_model("BitMLPModel")
class BitMLPModel(BitModelBase):
    """Ternary linear layers with rectifiers between them."""

    config_class: ClassVar[type[ModelConfig] | None] = BitMLPConfig

    def __init__(
        self, config: BitMLPConfig, quant_config: BitQuantConfig | Mapping[str, Any] | None = None
    ) -> None:
        super().__init__(config, quant_config)
        hidden = [config.hidden_dim] * (config.n_layers - 1)
        sizes = [config.in_channels, *hidden, config.out_channels]
        self.layers = nn.ModuleList(
            BitLinear(before, after, norm=config.norm, quant_config=self.quant_config)
            for before, after in pairwise(sizes)
        )
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Return outputs [..., out_channels] of inputs [..., in_channels]."""
        *inner, last = self.layers
        for layer in inner:
            x = self.dropout(layer(x).relu())
        return last(x)


BitMLP = BitMLPModel
