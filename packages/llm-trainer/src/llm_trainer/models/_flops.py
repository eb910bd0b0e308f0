"""The arithmetic that training needs."""

from __future__ import annotations

from llm_trainer.config import ModelConfig


def flops_per_token(config: ModelConfig, sequence_length: int) -> float:
    """Return the floating-point operations of the forward and backward pass for one token.

    6 N + 6 L D (T + 1): two for each multiplication with a weight and its addition, once forward and twice
    backward, where N counts the weights of all matrices but a table that is only looked up in (the embedding,
    unless it is the output projection too); and the products of queries with keys and of weights with values,
    2 D for each of the (T + 1) / 2 tokens that are on average at or before a token, in each of L layers of
    width D. Recomputation (gradient checkpointing) is not counted: it is no progress.

    Kaplan et al. (2020), section 2.1, counts T tokens where this counts (T + 1) / 2, which causality allows.
    """
    d_kv = config.kv_heads * config.d_head
    attention = config.d_model * (2 * config.d_model + 2 * d_kv)
    feed_forward = config.d_model * config.d_ff * (3 if config.activation == "swiglu" else 2)
    weights = config.n_layers * (attention + feed_forward) + config.d_model * config.vocab_size
    return 6 * weights + 6 * config.n_layers * config.d_model * (sequence_length + 1)
