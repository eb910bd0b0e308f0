"""Ternary language models: the decoder of BitNet b1.58."""

from bitmodels.transformer._cache import KVCache
from bitmodels.transformer._config import BitTransformerConfig
from bitmodels.transformer._model import BitTransformerLM

__all__ = ["BitTransformerConfig", "BitTransformerLM", "KVCache"]
