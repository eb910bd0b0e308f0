"""The regular expressions that split text before merging, so that no token spans words."""

from __future__ import annotations

from llm_trainer.tokenizer._byte_level import GPT2_PATTERN

# Blanks and line breaks, as GPT-4 splits them.
_BLANKS = r"|\s*[\r\n]+|\s+(?!\S)|\s+"
_WORDS = r"|[^\r\n\p{L}\p{N}]?\p{L}+"
_PUNCTUATION = r"| ?[^\s\p{L}\p{N}]+[\r\n]*"

# Contractions; a word with at most one leading space or sign; up to two digits; punctuation; line breaks;
# other white space. As in GPT-4 but for the digits (two waste less of a small vocabulary).
# It avoids (?i:) and possessive quantifiers, which the regex engines of tiktoken, rustbpe and Hugging Face
# tokenizers do not all read alike.
SPLIT_PATTERN = (
    r"'(?:[sdmtSDMT]|[lL][lL]|[vV][eE]|[rR][eE])" + _WORDS + r"|\p{N}{1,2}" + _PUNCTUATION + _BLANKS
)
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
LLAMA3_PATTERN = _CONTRACTIONS + _WORDS + r"|\p{N}{1,3}" + _PUNCTUATION + _BLANKS
QWEN2_PATTERN = _CONTRACTIONS + _WORDS + r"|\p{N}" + _PUNCTUATION + _BLANKS

# Those that leave no character out, and whether line breaks are special to them.
KNOWN_PATTERNS = {SPLIT_PATTERN: True, LLAMA3_PATTERN: True, QWEN2_PATTERN: True, GPT2_PATTERN: False}


def without_gaps(pattern: str) -> str:
    """Let what lies between two matches be a piece too, as it is to Hugging Face; tiktoken would drop it."""
    return pattern if pattern in KNOWN_PATTERNS else rf"{pattern}|(?:(?!{pattern})[\s\S])+"
