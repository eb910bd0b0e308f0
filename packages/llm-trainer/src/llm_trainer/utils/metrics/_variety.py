"""How varied texts are, and how much they repeat themselves."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

from llm_trainer.exceptions import DataError
from llm_trainer.utils.metrics._overlap import bleu
from llm_trainer.utils.metrics._words import checked_texts, ngrams, words_of

_LONGEST_UNIT = 256


def compute_diversity_metrics(texts: Iterable[str], *, self_bleu: bool = False) -> dict[str, float]:
    """Return how many different n-grams of words the texts use.

    - `distinct_1`, `distinct_2`, `distinct_3`: different n-grams / n-grams, over all texts together; no
      n-gram goes from one text into the next (Li et al. 2016). 1 says that nothing occurs twice; 0 that
      there is no n-gram. It falls as texts grow, so compare equal amounts of text.
    - `self_bleu`, if asked for: the mean BLEU of each text with all others as its references, from 0 to 100
      (Zhu et al. 2018); lower is more varied. The time grows with the square of the number of texts.

    Raises:
        DataError: There is no text, or one for `self_bleu`, or something is no string.
    """
    listed = checked_texts("texts", texts)
    cut = [words_of(text) for text in listed]
    metrics: dict[str, float] = {}
    for n in (1, 2, 3):
        counts = Counter(gram for words in cut for gram in ngrams(words, n))
        metrics[f"distinct_{n}"] = len(counts) / counts.total() if counts else 0.0
    if self_bleu:
        if len(listed) < 2:
            raise DataError("self_bleu compares texts with one another; give at least two.")
        scores = [
            bleu([text], [listed[:position] + listed[position + 1 :]], effective_order=True).score
            for position, text in enumerate(listed)
        ]
        metrics["self_bleu"] = sum(scores) / len(scores)
    return metrics


def compute_repetition_metrics(texts: Iterable[str]) -> dict[str, float]:
    """Return how much each text repeats itself, in words.

    - `seq_rep_2`, `seq_rep_3`, `seq_rep_4`: 1 - different n-grams / n-grams of a text, the mean over the
      texts that have an n-gram (Welleck et al. 2019). Human text is near 0 for n = 4, a loop near 1.
    - `repeated_2`, `repeated_3`, `repeated_4`: the n-grams that occur more than once in their text / all
      n-grams, over all texts together.
    - `longest_loop_words`: words in the longest stretch of one text that is a unit of up to 256 words two
      or more times in a row: 6 for "so it goes so it goes on".
    - `most_repeats`: how often in a row such a unit stands at most; 1 where nothing is repeated at once, 0
      without a word.

    Without an n-gram a share is 0.

    Raises:
        DataError: There is no text, or something is no string.
    """
    cut = [words_of(text) for text in checked_texts("texts", texts)]
    metrics: dict[str, float] = {}
    for n in (2, 3, 4):
        counts = [Counter(grams) for words in cut if (grams := ngrams(words, n))]
        shares = [1 - len(count) / count.total() for count in counts]
        metrics[f"seq_rep_{n}"] = sum(shares) / len(shares) if shares else 0.0
        repeated = sum(times for count in counts for times in count.values() if times > 1)
        total = sum(count.total() for count in counts)
        metrics[f"repeated_{n}"] = repeated / total if total else 0.0
    loops = [_longest_loop(words) for words in cut]
    metrics["longest_loop_words"] = float(max(words for words, _ in loops))
    metrics["most_repeats"] = float(max(repeats for _, repeats in loops))
    return metrics


def _longest_loop(words: list[str]) -> tuple[int, int]:
    """Return the words of the longest loop, and the most repeats of any; (0, 1) if there is none."""
    longest, most = 0, min(len(words), 1)
    known: dict[str, int] = {}
    ids = np.array([known.setdefault(word, len(known)) for word in words], dtype=np.int64)
    for unit in range(1, min(len(words) // 2, _LONGEST_UNIT) + 1):
        # So many words in a row equal those one unit before them; with the first unit they make the loop.
        equal = _longest_run(ids[unit:] == ids[:-unit])
        repeats = equal // unit + 1
        if repeats > 1:
            longest, most = max(longest, repeats * unit), max(most, repeats)
    return longest, most


def _longest_run(flags: npt.NDArray[np.bool_]) -> int:
    edges = np.flatnonzero(np.diff(np.concatenate(([False], flags, [False]))))
    return int((edges[1::2] - edges[::2]).max(initial=0))
