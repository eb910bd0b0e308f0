"""Ternary models, conversion of others into them, and what that costs and saves."""

from bitmodels.auto import AutoBitModel
from bitmodels.base import BitModelBase
from bitmodels.cnn import BitCNN, BitCNNConfig
from bitmodels.config import ModelConfig
from bitmodels.mlp import BitMLP, BitMLPConfig, BitMLPModel
from bitmodels.registry import MODEL_REGISTRY, register_model
from bitmodels.transformer import BitTransformerConfig, BitTransformerLM

__version__ = "0.1.0"

__all__ = [
    "MODEL_REGISTRY",
    "AutoBitModel",
    "BitCNN",
    "BitCNNConfig",
    "BitMLP",
    "BitMLPConfig",
    "BitMLPModel",
    "BitModelBase",
    "BitTransformerConfig",
    "BitTransformerLM",
    "ModelConfig",
    "register_model",
]
