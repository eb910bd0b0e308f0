"""The base of ternary models: configuration, deployment and checkpoints."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Self, cast

import torch
from bitcore.config import BitQuantConfig
from bitlayers.utils import deploy_layers, estimate_memory_usage, ternary_layers
from torch import nn

from bitmodels.config import ModelConfig
from bitmodels.formats import native

__all__ = ["BitModelBase"]


class BitModelBase(nn.Module, ABC):
    """A model of ternary layers.

    A subclass builds its layers with `self.quant_config` and implements `forward`. With a `config_class` and
    under `register_model`, `AutoBitModel` builds it from its configuration and checkpoints can be read.

    Args:
        config: The model's configuration, of any kind.
        quant_config: How layers quantise, also as a dictionary; BitNet's own way if None.

    Raises:
        QuantizationError: `quant_config` is no configuration, or holds an unknown key or value.
    """

    config_class: ClassVar[type[ModelConfig] | None] = None
    """The class of the model's configuration."""
    registered_name: ClassVar[str | None] = None
    """What `register_model` was given."""

    def __init__(self, config: Any, quant_config: BitQuantConfig | Mapping[str, Any] | None = None) -> None:
        super().__init__()
        self.config = config
        given = None if quant_config is None else BitQuantConfig.of(quant_config)
        self._given_quant_config = given
        self.quant_config = given or BitQuantConfig()
        """How layers quantise."""

    @abstractmethod
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return the model's output."""

    def get_config(self) -> Any:
        """Return the configuration that the model was built with."""
        return self.config

    def get_quant_config(self) -> dict[str, str] | None:
        """Return how layers quantise as a dictionary, or None if nothing was asked for."""
        return None if self._given_quant_config is None else self._given_quant_config.to_dict()

    @property
    def is_deployed(self) -> bool:
        """Whether all ternary layers, one at least, hold packed codes alone."""
        layers = ternary_layers(self).values()
        return bool(layers) and all(layer.is_deployed for layer in layers)

    def deploy(self) -> Self:
        """Drop the float weights of all ternary layers for good, and return the model.

        Raises:
            QuantizationError: A weight holds NaN or infinity; the message names its layer.
        """
        return cast("Self", deploy_layers(self))

    def train(self, mode: bool = True) -> Self:
        """Go to training, or to evaluation with `mode=False`.

        Raises:
            QuantizationError: A layer is deployed and has no weight to train. The model stays as it was.
        """
        for layer in ternary_layers(self).values() if mode else ():
            if layer.is_deployed:
                layer.train()
        return super().train(mode)

    def memory_usage(self) -> dict[str, float]:
        """Return what the model takes in bytes, as `bitlayers.utils.estimate_memory_usage` does."""
        return estimate_memory_usage(self)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write `config.json` and `model.safetensors`: packed codes if the model is deployed, else floats.

        Args:
            folder: Made where it is missing. Files of an earlier checkpoint are replaced, each at once.

        Raises:
            CheckpointError: The model is not registered, its configuration is no `ModelConfig`, or some of
                its layers are deployed and others are not.
            OSError: The files cannot be written.
        """
        native.save(self, Path(folder))

    @classmethod
    def from_pretrained(cls, folder: str | Path, *, device: torch.device | str = "cpu") -> Self:
        """Read what `save_pretrained` wrote, and return the model in evaluation.

        Nothing in the files is executed.

        Args:
            folder: With `config.json` and `model.safetensors`.
            device: Where the model goes.

        Raises:
            CheckpointError: A file is missing or damaged, or holds another model.
            ModelNotFoundError: The checkpoint's model is not registered in this process.
        """
        return native.load(Path(folder), cls, device)
