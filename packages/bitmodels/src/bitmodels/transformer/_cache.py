"""Keys and values of the tokens that were read."""

from __future__ import annotations

import torch
from torch import Tensor

from bitmodels.exceptions import QuantizationError
from bitmodels.transformer._config import BitTransformerConfig

__all__ = ["KVCache"]


class KVCache:
    """Room for the keys and values of all layers, made once and filled as tokens come.

    Args:
        config: Of the model.
        batch_size: Sequences, all of one length.
        max_tokens: Most tokens of each.
        device: Where the cache is.
        dtype: Of keys and values.
    """

    def __init__(
        self,
        config: BitTransformerConfig,
        batch_size: int,
        max_tokens: int,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        shape = (
            config.num_hidden_layers,
            2,
            batch_size,
            config.key_value_heads,
            max_tokens,
            config.head_size,
        )
        self._room = torch.empty(shape, device=device, dtype=dtype)
        self.max_tokens = max_tokens
        self.length = 0
        """Tokens whose keys and values all layers have."""

    def extend(self, layer: int, keys_BHTD: Tensor, values_BHTD: Tensor) -> tuple[Tensor, Tensor]:
        """Add what a layer computed of new tokens and return what it has of all.

        The length grows once all layers have the new tokens, when the model says so.

        Raises:
            QuantizationError: There is no room.
        """
        end = self.length + keys_BHTD.shape[2]
        if end > self.max_tokens:
            raise QuantizationError(f"the cache has room for {self.max_tokens} tokens, not for {end}.")
        keys, values = self._room[layer]
        keys[:, :, self.length : end] = keys_BHTD
        values[:, :, self.length : end] = values_BHTD
        return keys[:, :, :end], values[:, :, :end]
