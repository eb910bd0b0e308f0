"""How much texts have in common with references."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, cast

from llm_trainer.exceptions import ConfigurationError, DataError
from llm_trainer.utils.metrics._words import checked_texts

if TYPE_CHECKING:
    from sacrebleu.metrics.bleu import BLEUScore

References = Iterable[str | Sequence[str]]
"""For each text one reference, or a list of them."""


def compute_bleu_score(predictions: Iterable[str], references: References, **options: Any) -> float:
    """Return the BLEU of the texts as one corpus, from 0 to 100, as sacrebleu computes it.

    BLEU = 100 * BP * (p1 * p2 * p3 * p4)^(1/4): pn is the share of the predictions' n-grams that are in
    a reference, counted over all texts and no n-gram oftener than the reference has it; BP is 1, or
    exp(1 - r / c) if the predictions' c words are fewer than the references' r (Papineni et al. 2002). With
    sacrebleu's defaults text is cut as in WMT (13a), and a pn of 0 is smoothed where there are n-grams at
    all; so texts of fewer than four words in all score 0, unless `effective_order=True`.

    Args:
        predictions: Texts to judge.
        references: For each a string, or a list of strings of which it may resemble any.
        **options: Of `sacrebleu.BLEU`, such as `lowercase`, `tokenize`, `smooth_method`.

    Raises:
        DataError: A list is empty, the lengths differ, or something is no string.
        ConfigurationError: An option is unknown or impossible.
    """
    return bleu(checked_texts("predictions", predictions), references, **options).score


def bleu(predictions: list[str], references: References, **options: Any) -> BLEUScore:
    """Return sacrebleu's score of checked predictions."""
    from sacrebleu.metrics.bleu import BLEU

    known = [
        name for name in inspect.signature(BLEU.__init__).parameters if name not in ("self", "references")
    ]
    for name in options:
        if name not in known:
            raise ConfigurationError(f"BLEU has no option {name!r}; there are {', '.join(known)}.")
    try:
        metric = BLEU(**options)
    except (AssertionError, ValueError, KeyError) as error:
        raise ConfigurationError(f"BLEU cannot be computed with {options}: {error}") from error
    return metric.corpus_score(predictions, reference_streams(references, len(predictions)))


def reference_streams(references: References, count: int) -> Sequence[Sequence[str]]:
    """Return the references as sacrebleu wants them: the first of every text, the second of every text, ...

    Raises:
        DataError: There are not `count`, or one is neither a string nor a list of strings.
    """
    if isinstance(references, str):
        raise DataError("references is one string; give a list with one entry a prediction.")
    groups: list[list[str]] = []
    for position, entry in enumerate(references):
        group = (
            [entry]
            if isinstance(entry, str)
            else checked_texts(f"references[{position}]", _listed(entry, position))
        )
        groups.append(group)
    if len(groups) != count:
        raise DataError(
            f"There are {count} predictions and {len(groups)} references; give one reference, or one list of "
            "them, a prediction."
        )
    most = max(map(len, groups))
    # sacrebleu takes None for a text that has fewer references than others.
    streams = [[group[number] if number < len(group) else None for group in groups] for number in range(most)]
    return cast("Sequence[Sequence[str]]", streams)


def _listed(entry: object, position: int) -> Sequence[str]:
    if not isinstance(entry, Sequence):
        raise DataError(
            f"references[{position}] is a {type(entry).__name__}; it must be a string or a list of strings."
        )
    return cast("Sequence[str]", entry)
