"""Small random models of each family, in memory and as checkpoint folders."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

_SMALL: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GPT2 = {"vocab_size": 96, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64}
_HEADS = {"head_dim": 16}
_EXPERTS = {"num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 32, **_HEADS}
# The blocks of these differ: the first looks back 8 tokens, the second at all.
_LAYER_TYPES = {**_HEADS, "sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}
_FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", "LlamaForCausalLM", _SMALL),
    "llama-tied": ("LlamaConfig", "LlamaForCausalLM", {**_SMALL, "tie_word_embeddings": True}),
    "qwen2": ("Qwen2Config", "Qwen2ForCausalLM", _SMALL),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", {**_SMALL, **_HEADS}),
    "mistral": ("MistralConfig", "MistralForCausalLM", {**_SMALL, "sliding_window": 8}),
    "gemma": ("GemmaConfig", "GemmaForCausalLM", {**_SMALL, **_HEADS}),
    "gemma2": ("Gemma2Config", "Gemma2ForCausalLM", {**_SMALL, **_LAYER_TYPES}),
    "gemma3": ("Gemma3TextConfig", "Gemma3ForCausalLM", {**_SMALL, **_LAYER_TYPES}),
    "phi": ("PhiConfig", "PhiForCausalLM", _SMALL),
    "phi3": ("Phi3Config", "Phi3ForCausalLM", _SMALL),
    "opt": ("OPTConfig", "OPTForCausalLM", {**_SMALL, "ffn_dim": 96, "word_embed_proj_dim": 32}),
    "gpt2": ("GPT2Config", "GPT2LMHeadModel", _GPT2),
    "mixtral": (
        "MixtralConfig",
        "MixtralForCausalLM",
        {**_SMALL, "num_local_experts": 3, "num_experts_per_tok": 2},
    ),
    "qwen3-moe": ("Qwen3MoeConfig", "Qwen3MoeForCausalLM", {**_SMALL, **_EXPERTS}),
    "bert": ("BertConfig", "BertForMaskedLM", {**_SMALL, "type_vocab_size": 2}),
}


@pytest.fixture(scope="session")
def random_model() -> Callable[..., Any]:
    """Return a function (family, **changed fields) that makes a model, the same one each time."""
    # Not at the top: most tests of this package need no transformers.
    import transformers

    def make(family: str, *, dtype: torch.dtype = torch.float32, **fields: Any) -> Any:
        config_name, class_name, usual = _FAMILIES[family]
        config = getattr(transformers, config_name)(**{**usual, **fields})
        generator = torch.Generator().manual_seed(7)
        with torch.random.fork_rng():
            model = getattr(transformers, class_name)(config)
        with torch.no_grad():
            # Nothing may be left at a value that a wrong model would have as well, such as a norm's ones.
            for parameter in model.parameters():
                middle = 1.0 if parameter.ndim == 1 and bool((parameter == 1).all()) else 0.0
                parameter.copy_(middle + torch.randn(parameter.shape, generator=generator) * 0.12)
        return model.to(dtype).eval()

    return make


@pytest.fixture(scope="session")
def saved_model(
    random_model: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Path]:
    """Return a function (family) that gives the folder of its checkpoint, in two shards or more."""
    folders: dict[str, Path] = {}

    def save(family: str) -> Path:
        if family not in folders:
            folders[family] = tmp_path_factory.mktemp(family)
            random_model(family).save_pretrained(folders[family], max_shard_size="120KB")
        return folders[family]

    return save


@pytest.fixture
def calibration_ids() -> torch.Tensor:
    """Token ids [6, 16]: as many as the last batch of 4 is not full."""
    return torch.randint(3, 96, (6, 16), generator=torch.Generator().manual_seed(5))
