"""Documents as one array of token ids in memory."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from llm_trainer.data._encode import encode_documents, token_dtype
from llm_trainer.exceptions import DataError
from llm_trainer.tokenizer import Tokenizer


@dataclass(frozen=True)
class TokenArray:
    """Documents behind one another, each from its beginning-of-text to its end-of-text token."""

    tokens: npt.NDArray[Any]
    """All ids, in uint16 where the vocabulary allows and uint32 where not."""
    offsets: npt.NDArray[np.int64]
    """Where each document begins, and the end."""
    dropped: int
    """Documents that were too short."""
    text_bytes: int
    """UTF-8 bytes of the documents that were kept."""
    pad_token_id: int
    """The tokenizer's id that fills rows."""

    @property
    def num_documents(self) -> int:
        """Documents kept."""
        return len(self.offsets) - 1

    def fingerprint(self) -> str:
        """Return a hash of the tokens and the documents' places; a `TokenStore` of the same has the same."""
        return self._fingerprint

    @cached_property
    def _fingerprint(self) -> str:
        offsets = self.offsets.astype("<i8")
        return tokens_fingerprint(*(hashlib.sha256(part.data).hexdigest() for part in (self.tokens, offsets)))


def tokenize(
    texts: Iterable[str],
    tokenizer: Tokenizer,
    min_length: int,
    num_threads: int = 1,
    show_progress: bool | None = None,
) -> TokenArray:
    """Encode documents into memory.

    Raises:
        DataError: No document has `min_length` tokens.
    """
    parts: list[npt.NDArray[Any]] = []
    offsets = [np.zeros(1, np.int64)]
    total = dropped = text_bytes = 0
    for part in encode_documents(texts, tokenizer, min_length, num_threads, show_progress):
        parts.append(part.ids)
        offsets.append(part.ends + total)
        total += len(part.ids)
        dropped += part.dropped
        text_bytes += part.text_bytes
    if not total:
        raise nothing_long_enough(min_length, dropped)
    tokens = np.concatenate(parts, dtype=token_dtype(tokenizer.vocab_size))
    return TokenArray(tokens, np.concatenate(offsets), dropped, text_bytes, tokenizer.pad_token_id)


def nothing_long_enough(min_length: int, dropped: int) -> DataError:
    """Return what to raise where no document was kept."""
    return DataError(
        f"There is nothing to train or evaluate on: no text of at least {max(min_length, 1)} tokens "
        f"(min_length) among {dropped}."
    )


def tokens_fingerprint(tokens_sha256: str, offsets_sha256: str) -> str:
    """Return one hash of the two."""
    return hashlib.sha256(f"{tokens_sha256} {offsets_sha256}".encode()).hexdigest()
