"""Our parameters under the names, and in the pieces, that transformers has for them."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from llm_trainer.config import ModelConfig

_NAMES = {
    "llama": {
        "embedding": ("model.embed_tokens",),
        "final_norm": ("model.norm",),
        "head": ("lm_head",),
        "attention.qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        "attention.out": ("self_attn.o_proj",),
        "feed_forward.up": ("mlp.gate_proj", "mlp.up_proj"),
        "feed_forward.down": ("mlp.down_proj",),
        "attention_norm": ("input_layernorm",),
        "feed_forward_norm": ("post_attention_layernorm",),
    },
    "gpt2": {
        "embedding": ("transformer.wte",),
        "position_embedding": ("transformer.wpe",),
        "final_norm": ("transformer.ln_f",),
        "head": ("lm_head",),
        "attention.qkv": ("attn.c_attn",),
        "attention.out": ("attn.c_proj",),
        "feed_forward.up": ("mlp.c_fc",),
        "feed_forward.down": ("mlp.c_proj",),
        "attention_norm": ("ln_1",),
        "feed_forward_norm": ("ln_2",),
    },
}
_BLOCKS = {"llama": "model.layers.", "gpt2": "transformer.h."}
_CONSTANTS = re.compile(r".*\.(rotary_emb\.inv_freq|attn\.(masked_)?bias)")
"""Buffers that older versions of transformers saved; they follow from the configuration."""


def is_constant(name: str) -> bool:
    """Return whether a tensor of a file holds no weights."""
    return _CONSTANTS.fullmatch(name) is not None


def base_prefix(architecture: str) -> str:
    """Return what the names of a model's tensors begin with, and those of one saved without a head lack."""
    return _BLOCKS[architecture].split(".")[0] + "."


class Parameter:
    """One of our parameters and its pieces there.

    Attributes:
        name: Ours.
        pieces: The names there, in the order in which their rows make up ours, and their shapes.
    """

    def __init__(self, architecture: str, config: ModelConfig, name: str, shape: torch.Size) -> None:
        self.name = name
        module, kind = name.rsplit(".", 1)
        prefix = ""
        if module.startswith("blocks."):
            _, number, module = module.split(".", 2)
            prefix = f"{_BLOCKS[architecture]}{number}."
        # GPT-2's layers keep their matrices the other way round.
        self._transposed = architecture == "gpt2" and bool(prefix) and len(shape) == 2
        modules = _NAMES[architecture][module]
        self._rows = [shape[0]] if len(modules) == 1 else _rows(module, config)
        self.pieces = {
            f"{prefix}{there}.{kind}": (*shape[1:], rows) if self._transposed else (rows, *shape[1:])
            for there, rows in zip(modules, self._rows, strict=True)
        }

    def split(self, tensor: Tensor) -> dict[str, Tensor]:
        """Return the pieces of ours as views."""
        parts = torch.split_with_sizes(tensor, self._rows)
        return {
            piece: part.T if self._transposed else part
            for piece, part in zip(self.pieces, parts, strict=True)
        }

    def join(self, pieces: Mapping[str, Tensor]) -> Tensor:
        """Return ours, contiguous."""
        parts = [pieces[piece] for piece in self.pieces]
        whole = parts[0] if len(parts) == 1 else torch.cat(parts)
        return (whole.T if self._transposed else whole).contiguous()


def _rows(module: str, config: ModelConfig) -> list[int]:
    if module == "attention.qkv":
        keys = config.kv_heads * config.d_head
        return [config.d_model, keys, keys]
    return [config.d_ff, config.d_ff]
