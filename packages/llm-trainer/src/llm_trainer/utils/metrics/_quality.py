"""All measures of written text together."""

from __future__ import annotations

from collections.abc import Iterable

from llm_trainer.utils.metrics._overlap import References, bleu, reference_streams
from llm_trainer.utils.metrics._variety import compute_diversity_metrics, compute_repetition_metrics
from llm_trainer.utils.metrics._words import checked_texts, words_of


def evaluate_generation_quality(
    generated_texts: Iterable[str], reference_texts: References | None = None
) -> dict[str, float]:
    """Return every measure of the texts, and with references also of their likeness to those.

    - `num_texts`; `mean_words`, the words of a text; `empty_share`, the share of texts without a word;
    - all of `compute_diversity_metrics` and `compute_repetition_metrics`;
    - with references `bleu`, as `compute_bleu_score`; `chrf`, the F2 of the n-grams of up to 6 characters,
      from 0 to 100 (Popović 2015), which also tells short texts apart; `length_ratio`, the words of the texts
      / those of the nearest references, as BLEU counts them.

    Args:
        generated_texts: Texts to judge.
        reference_texts: For each a string or a list of strings.

    Raises:
        DataError: A list is empty, the lengths differ, or something is no string.
    """
    texts = checked_texts("generated_texts", generated_texts)
    lengths = [len(words_of(text)) for text in texts]
    metrics = {
        "num_texts": float(len(texts)),
        "mean_words": sum(lengths) / len(texts),
        "empty_share": lengths.count(0) / len(texts),
        **compute_diversity_metrics(texts),
        **compute_repetition_metrics(texts),
    }
    if reference_texts is not None:
        from sacrebleu.metrics.chrf import CHRF

        references = list(reference_texts) if not isinstance(reference_texts, str) else reference_texts
        score = bleu(texts, references)
        metrics["bleu"] = score.score
        metrics["chrf"] = CHRF().corpus_score(texts, reference_streams(references, len(texts))).score
        metrics["length_ratio"] = score.ratio
    return metrics
