"""Byte-level byte-pair encoding."""

from llm_trainer.tokenizer._bpe import BOS, EOS, PAD, BPETokenizer

__all__ = ["BOS", "EOS", "PAD", "BPETokenizer"]
