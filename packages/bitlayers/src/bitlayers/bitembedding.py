"""The embedding with ternary weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from bitcore.config import BitQuantConfig, check_sizes
from bitcore.exceptions import QuantizationError
from bitcore.ops import bitlinear, quantize_weight
from bitcore.packing import rows
from torch import Tensor, nn

from bitlayers._ternary import TernaryLayer

__all__ = ["BitEmbedding"]


class BitEmbedding(TernaryLayer):
    """An embedding whose vectors are -1, 0 and 1 times a scale: one for all, or each its own (`per_channel`).

    BitNet itself keeps its embedding in full precision; this one is for where the vocabulary is what takes
    the memory. In evaluation only the vectors that are asked for are unpacked.

    Args:
        num_embeddings: How many vectors.
        embedding_dim: Size of each.
        padding_idx: The vector that begins as zeros and stays so.
        quant_config: How the weight is quantised, also as a dictionary; the default of `BitQuantConfig` if
            None.
        device: Of the weight.
        dtype: Of the weight.

    Raises:
        QuantizationError: A size is none of those that are allowed.
    """

    scale_follows_dtype: ClassVar[bool] = True

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        quant_config: BitQuantConfig | Mapping[str, Any] | None = None,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_sizes(num_embeddings=num_embeddings, embedding_dim=embedding_dim)
        if padding_idx is not None and not -num_embeddings <= padding_idx < num_embeddings:
            raise QuantizationError(f"padding_idx is {padding_idx}, but there are {num_embeddings} vectors.")
        super().__init__((num_embeddings, embedding_dim), quant_config, device, dtype)
        self.num_embeddings, self.embedding_dim = num_embeddings, embedding_dim
        self.padding_idx = None if padding_idx is None else padding_idx % num_embeddings
        self.reset_parameters()

    def forward(self, ids: Tensor) -> Tensor:
        """Return the vectors of ids.

        Args:
            ids: int32 or int64, [...].

        Returns:
            [..., embedding_dim], in the weight's dtype.

        Raises:
            QuantizationError: ids are not whole numbers, or the weight holds NaN or infinity.
            IndexError: There is no vector of an id.
        """
        if ids.dtype not in (torch.int32, torch.int64):
            raise QuantizationError(f"ids are int32 or int64, but these are {ids.dtype}.")
        weight = self.weight
        if weight is not None and self._computes_on_floats(weight):
            fake = bitlinear.fake_quantize_weight(weight, self.quant_config, self._strength)
            return F.embedding(ids, fake, self.padding_idx)
        scale, packed = self.packed()
        flat = ids.flatten()
        codes = rows.unpack(packed.index_select(0, flat), len(flat), self.embedding_dim)
        by_vector = scale if len(scale) == 1 else scale.index_select(0, flat)
        return (codes * by_vector).view(*ids.shape, self.embedding_dim)

    def extra_repr(self) -> str:
        """Return what `repr` says of the layer."""
        padding = "" if self.padding_idx is None else f", padding_idx={self.padding_idx}"
        return f"{self.num_embeddings}, {self.embedding_dim}{padding}{self._form}"

    def _begin(self, weight: nn.Parameter) -> None:
        nn.init.normal_(weight)
        if self.padding_idx is not None:
            with torch.no_grad():
                weight[self.padding_idx].zero_()

    def _pack(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        scale, codes = quantize_weight(weight, self.quant_config.weight_granularity)
        return scale.to(weight.dtype), rows.pack(codes)

    def _unpack(self, qweight: Tensor) -> Tensor:
        return rows.unpack(qweight, self.num_embeddings, self.embedding_dim)

    def _packed_shapes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        each = self.quant_config.weight_granularity == "per_channel"
        scale = (self.num_embeddings, 1) if each else (1,)
        return scale, (self.num_embeddings, (self.embedding_dim + 3) // 4)
