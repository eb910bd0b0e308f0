"""The convolutional network."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar

import torch.nn.functional as F
from bitcore.config import BitQuantConfig
from bitlayers import BitConv2d, BitLinear
from torch import Tensor, nn

from bitmodels.base import BitModelBase
from bitmodels.config import ModelConfig, check_positive, check_share
from bitmodels.exceptions import QuantizationError
from bitmodels.registry import register_model

__all__ = ["BitCNN", "BitCNNConfig"]


@dataclass(frozen=True)
class BitCNNConfig(ModelConfig):
    """Configuration of a `BitCNN`.

    Raises:
        QuantizationError: A value is impossible.
    """

    in_channels: int = 1
    """Channels of images."""
    out_channels: int = 10
    """Classes."""
    channels: tuple[int, ...] = (32, 64)
    """Channels after each stage; a stage halves height and width."""
    kernel_size: int = 3
    """Height and width of the filters; odd."""
    dropout: float = 0.0
    """The share of the features before the last layer that is left out in training."""

    def __post_init__(self) -> None:
        check_positive(self, "in_channels", "out_channels", "kernel_size")
        check_share(self, "dropout")
        object.__setattr__(self, "channels", tuple(self.channels))
        if not self.channels or any(type(size) is not int or size < 1 for size in self.channels):
            raise QuantizationError(
                f"channels is {self.channels!r}; it must be whole numbers above zero, one for each stage."
            )
        if self.kernel_size % 2 == 0:
            raise QuantizationError(f"kernel_size is {self.kernel_size}; it must be odd.")


class _Stage(nn.Module):
    """A convolution, a norm over the batch, a rectifier, and the largest of each 2 x 2."""

    def __init__(self, before: int, after: int, kernel_size: int, quant_config: BitQuantConfig) -> None:
        super().__init__()
        self.conv = BitConv2d(
            before, after, kernel_size, padding=kernel_size // 2, bias=False, quant_config=quant_config
        )
        self.norm = nn.BatchNorm2d(after)

    def forward(self, x: Tensor) -> Tensor:
        return F.max_pool2d(self.norm(self.conv(x)).relu(), 2, ceil_mode=True)


@register_model("BitCNN")
class BitCNN(BitModelBase):
    """Stages of ternary convolutions, the mean over each image, and a ternary linear layer."""

    config_class: ClassVar[type[ModelConfig] | None] = BitCNNConfig

    def __init__(
        self, config: BitCNNConfig, quant_config: BitQuantConfig | Mapping[str, Any] | None = None
    ) -> None:
        super().__init__(config, quant_config)
        sizes = [config.in_channels, *config.channels]
        self.stages = nn.Sequential(
            *(
                _Stage(before, after, config.kernel_size, self.quant_config)
                for before, after in pairwise(sizes)
            )
        )
        self.dropout = nn.Dropout(config.dropout)
        self.head = BitLinear(sizes[-1], config.out_channels, norm=True, quant_config=self.quant_config)

    def forward(self, x: Tensor) -> Tensor:
        """Return scores [images, out_channels] of images [images, in_channels, height, width]."""
        return self.head(self.dropout(self.stages(x).mean((-2, -1))))
