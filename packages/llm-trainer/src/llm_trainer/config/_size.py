"""What a configuration costs, without building the model."""

from __future__ import annotations

from llm_trainer.config._base import check_type
from llm_trainer.config._model import ModelConfig

# Weight and gradient, and AdamW's two moments, all in float32 (as they also are under autocast).
_BYTES_PER_PARAMETER = 4 + 4 + 8


def calculate_parameters(config: ModelConfig) -> int:
    """Return the number of parameters of the model that `config` describes, tied ones counted once.

    It equals `TransformerLM(config).get_num_params()`.

    Raises:
        ModelConfigurationError: `config` is no `ModelConfig`.
    """
    check_type(config, ModelConfig, "config")
    width, inner = config.d_model, config.d_ff
    bias = int(config.bias)
    qkv = width + 2 * config.kv_heads * config.d_head
    up = 2 * inner if config.activation == "swiglu" else inner
    norm = width * (2 if config.norm == "layernorm" and config.bias else 1)
    attention = (width + bias) * (qkv + width)
    feed_forward = (width + bias) * up + (inner + bias) * width
    embeddings = config.vocab_size * (1 if config.tie_embeddings else 2)
    if config.positions == "learned":
        embeddings += config.max_seq_len
    final_norm = norm if config.pre_norm else 0
    return embeddings * width + config.n_layers * (attention + feed_forward + 2 * norm) + final_norm


def estimate_memory_usage(config: ModelConfig) -> float:
    """Return the memory in GB (2**30 bytes) that training with AdamW holds all the time.

    16 bytes a parameter: weights (4), gradients (4) and the optimiser's state (8), in float32. This is exact
    for what it counts; the activations, which grow with the batch and the sequence, come on top.

    Raises:
        ModelConfigurationError: `config` is no `ModelConfig`.
    """
    return calculate_parameters(config) * _BYTES_PER_PARAMETER / 2**30
