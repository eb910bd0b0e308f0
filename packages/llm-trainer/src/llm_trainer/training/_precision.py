"""Half precision, as the device allows it."""

from __future__ import annotations

import logging
from contextlib import AbstractContextManager, nullcontext

import torch

from llm_trainer.config import TrainingConfig

_logger = logging.getLogger(__name__)
_said: set[str] = set()


class Precision:
    """The dtype of the matrix products, and loss scaling where float16 needs it."""

    def __init__(self, config: TrainingConfig, device: torch.device) -> None:
        self._device = device
        self.dtype: torch.dtype | None = None
        if config.use_amp:
            self.dtype = torch.float16 if config.amp_dtype == "float16" else torch.bfloat16
            if device.type == "cpu" and self.dtype is torch.float16:
                self.dtype = torch.bfloat16
                _say_once("amp_dtype float16 is slow on a CPU; bfloat16 is used instead.")
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.dtype is torch.float16)

    def autocast(self) -> AbstractContextManager[object]:
        """Return the context to run the model in."""
        if self.dtype is None:
            return nullcontext()
        return torch.autocast(self._device.type, dtype=self.dtype)


def _say_once(message: str) -> None:
    if message not in _said:
        _said.add(message)
        _logger.warning(message)
