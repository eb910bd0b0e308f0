"""How well a model predicts text, and how good the text is that it writes.

The functions on texts take words to be what stands between blanks (Unicode's: `str.split`), after
normalisation to NFC, so that two spellings of one letter are one. Punctuation is part of the word before it,
and a text without blanks, as in Chinese or Japanese, is one word: cut such text beforehand. Only BLEU and
chrF cut by rules of their own, those of sacrebleu.
"""

from llm_trainer.utils.metrics._likelihood import (
    batch_loss,
    bits_per_byte,
    compute_perplexity,
    count_labels,
    mean_loss,
    perplexity_of,
)
from llm_trainer.utils.metrics._overlap import compute_bleu_score
from llm_trainer.utils.metrics._quality import evaluate_generation_quality
from llm_trainer.utils.metrics._variety import compute_diversity_metrics, compute_repetition_metrics

__all__ = [
    "batch_loss",
    "bits_per_byte",
    "compute_bleu_score",
    "compute_diversity_metrics",
    "compute_perplexity",
    "compute_repetition_metrics",
    "count_labels",
    "evaluate_generation_quality",
    "mean_loss",
    "perplexity_of",
]
