"""Shapes of models that are known to train well, by name.

A name is a family and a size, such as `llama-mini`. Models of one size have about the same number of
parameters in every family (each block has 12 times the square of the width), so that they can be compared.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from llm_trainer._files import shown
from llm_trainer.exceptions import ModelConfigurationError


@dataclass(frozen=True, kw_only=True)
class _Size:
    vocab_size: int
    d_model: int
    n_heads: int
    n_layers: int
    max_seq_len: int


_SIZES = {
    "mini": _Size(vocab_size=8192, d_model=384, n_heads=6, n_layers=10, max_seq_len=512),
    "small": _Size(vocab_size=50257, d_model=768, n_heads=12, n_layers=12, max_seq_len=1024),
    "medium": _Size(vocab_size=50257, d_model=1024, n_heads=16, n_layers=24, max_seq_len=1024),
}


def _aligned(size: int) -> int:
    # Matrix products are faster where no row is left over, and nothing forbids rows that no token uses.
    return -(-size // 64) * 64


def _gpt2(size: _Size) -> dict[str, Any]:
    """Radford et al., 2019: `small` and `medium` are the published shapes."""
    return {
        "d_ff": 4 * size.d_model,
        "positions": "learned",
        "norm": "layernorm",
        "activation": "gelu",
        "bias": True,
        "tie_embeddings": True,
        "dropout": 0.1,
        "attention_dropout": 0.1,
    }


def _llama(size: _Size) -> dict[str, Any]:
    """Llama 3: what grouped keys save pays for the gate's projection."""
    return {
        "vocab_size": _aligned(size.vocab_size),
        "n_kv_heads": size.n_heads // 2,
        "d_ff": 3 * size.d_model,
        "positions": "rope",
        "norm": "rmsnorm",
        "activation": "swiglu",
        "bias": False,
        "tie_embeddings": True,
        "dropout": 0.0,
        "attention_dropout": 0.0,
    }


def _speedrun(size: _Size) -> dict[str, Any]:
    """Choices that the speed records of small models agree on (modded-nanogpt, nanochat)."""
    return {
        "vocab_size": _aligned(size.vocab_size),
        "d_ff": 4 * size.d_model,
        "positions": "rope",
        "norm": "rmsnorm",
        "activation": "relu2",
        "qk_norm": True,
        "bias": False,
        "tie_embeddings": True,
        "logit_softcap": 15.0,
        "zero_init_projections": True,
        "dropout": 0.0,
        "attention_dropout": 0.0,
    }


_FAMILIES: dict[str, Callable[[_Size], dict[str, Any]]] = {
    "gpt2": _gpt2,
    "llama": _llama,
    "speedrun": _speedrun,
}
NAMES = tuple(f"{family}-{size}" for family in _FAMILIES for size in _SIZES)


def preset_fields(name: str) -> dict[str, Any]:
    """Return the fields of a `ModelConfig` that a preset sets.

    Raises:
        ModelConfigurationError: There is none of that name; the nearest and all known ones are named.
    """
    if name not in NAMES:
        near = difflib.get_close_matches(str(name)[:100], NAMES, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ModelConfigurationError(
            f"There is no preset {shown(name)}; {hint}known presets: {', '.join(NAMES)}."
        )
    family, size_name = name.split("-")
    size = _SIZES[size_name]
    return vars(size) | _FAMILIES[family](size)
