"""Models by their configuration or their checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from bitcore.config import BitQuantConfig

from bitmodels.base import BitModelBase
from bitmodels.exceptions import ModelNotFoundError
from bitmodels.formats import native
from bitmodels.registry import MODEL_REGISTRY

__all__ = ["AutoBitModel"]


class AutoBitModel:
    """Builds registered models; it has no instances of its own."""

    def __init__(self) -> None:
        raise TypeError("AutoBitModel is not built; use AutoBitModel.from_config or from_pretrained.")

    @staticmethod
    def from_config(
        config: Any, quant_config: BitQuantConfig | Mapping[str, Any] | None = None
    ) -> BitModelBase:
        """Return the model that a configuration is for.

        Args:
            config: Of a class that a registered model names as its `config_class`.
            quant_config: How layers quantise; BitNet's own way if None.

        Raises:
            ModelNotFoundError: No registered model takes such a configuration.
        """
        for model in MODEL_REGISTRY.values():
            if model.config_class is type(config):
                return model(config, quant_config)
        takes = {
            kind.__name__: name
            for name, model in MODEL_REGISTRY.items()
            if (kind := model.config_class) is not None
        }
        known = ", ".join(f"{kind} ({name})" for kind, name in takes.items())
        raise ModelNotFoundError(f"no registered model takes a {type(config).__name__}; there are {known}.")

    @staticmethod
    def from_pretrained(folder: str | Path, *, device: torch.device | str = "cpu") -> BitModelBase:
        """Read what `save_pretrained` of any registered model wrote; see `BitModelBase.from_pretrained`."""
        return native.load(Path(folder), BitModelBase, device)
