"""The language model."""

from llm_trainer.models._generation import apply_repetition_penalty, keep_top_k, keep_top_p
from llm_trainer.models._transformer import ModelOutput, TransformerLM

__all__ = ["ModelOutput", "TransformerLM", "apply_repetition_penalty", "keep_top_k", "keep_top_p"]
