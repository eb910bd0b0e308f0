"""Keys and values of the tokens that were read, for generation."""

from __future__ import annotations

import torch
from torch import Tensor

from llm_trainer.exceptions import ModelInputError


class LayerCache:
    """Room for one layer's keys and values, filled in place from the left.

    Letters: B batch, K key-value heads, T new tokens, S tokens so far, C head width.
    """

    def __init__(self, keys_BKSC: Tensor, values_BKSC: Tensor) -> None:
        self._keys = keys_BKSC
        self._values = values_BKSC
        self.length = 0

    def append(self, keys_BKTC: Tensor, values_BKTC: Tensor) -> tuple[Tensor, Tensor]:
        """Store new keys and values and return views of all so far.

        Raises:
            ModelInputError: There is no room for them.
        """
        start, end = self.length, self.length + keys_BKTC.size(2)
        if end > self._keys.size(2):
            raise ModelInputError(
                f"The cache has room for {self._keys.size(2)} tokens, but {end} are to be in it; "
                f"make a larger one with new_cache."
            )
        self._keys[:, :, start:end] = keys_BKTC
        self._values[:, :, start:end] = values_BKTC
        self.length = end
        return self._keys[:, :, :end], self._values[:, :, :end]


class KVCache:
    """One `LayerCache` a layer, of room for `capacity` tokens."""

    def __init__(
        self,
        *,
        n_layers: int,
        batch_size: int,
        kv_heads: int,
        capacity: int,
        d_head: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        shape = (2, n_layers, batch_size, kv_heads, capacity, d_head)
        keys, values = torch.empty(shape, dtype=dtype, device=device)
        self.layers = [LayerCache(keys[index], values[index]) for index in range(n_layers)]
        self.capacity = capacity

    @property
    def length(self) -> int:
        """Tokens stored so far."""
        return self.layers[0].length
