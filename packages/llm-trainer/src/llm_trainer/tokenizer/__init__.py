"""Text to ids and back: byte-pair, character and other people's tokenizers."""

from llm_trainer.tokenizer._base import Tokenizer
from llm_trainer.tokenizer._bpe import BPETokenizer
from llm_trainer.tokenizer._char import CharTokenizer
from llm_trainer.tokenizer._create import create_tokenizer, load_tokenizer
from llm_trainer.tokenizer._hf import HFTokenizer
from llm_trainer.tokenizer._special import BOS, EOS, PAD

__all__ = [
    "BOS",
    "EOS",
    "PAD",
    "BPETokenizer",
    "CharTokenizer",
    "HFTokenizer",
    "Tokenizer",
    "create_tokenizer",
    "load_tokenizer",
]
