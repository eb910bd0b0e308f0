"""Texts as words."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable
from typing import cast

from llm_trainer.exceptions import DataError


def checked_texts(name: str, texts: Iterable[str]) -> list[str]:
    """Return the texts as a list.

    Raises:
        DataError: They are one string, none at all, or one of them is no string.
    """
    if isinstance(texts, str):
        raise DataError(f"{name} is one string; give a list of strings, such as [text].")
    found = list(texts)
    if not found:
        raise DataError(f"{name} is empty; give at least one text.")
    for position, text in enumerate(found):
        if not isinstance(cast("object", text), str):
            raise DataError(f"{name}[{position}] is a {type(text).__name__}; every text must be a string.")
    return found


def words_of(text: str) -> list[str]:
    """Return what stands between blanks, in NFC."""
    return unicodedata.normalize("NFC", text).split()


def ngrams(words: list[str], n: int) -> list[tuple[str, ...]]:
    """Return every `n` words in a row; none if there are fewer words."""
    return list(zip(*(words[start:] for start in range(n)), strict=False))
