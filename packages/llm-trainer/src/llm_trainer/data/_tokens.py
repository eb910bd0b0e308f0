"""Documents as one array of token ids."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from llm_trainer.exceptions import DataError


class Tokenizer(Protocol):
    """What the data needs of a tokenizer; `BPETokenizer` has it."""

    @property
    def vocab_size(self) -> int:
        """Number of ids."""
        ...

    @property
    def bos_token_id(self) -> int:
        """Id that begins a document."""
        ...

    @property
    def eos_token_id(self) -> int:
        """Id that ends a document."""
        ...

    @property
    def pad_token_id(self) -> int:
        """Id that fills rows."""
        ...

    def encode_ordinary(self, text: str) -> npt.NDArray[np.uint32]:
        """Return the ids of a text, without special ones."""
        ...


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

    @property
    def num_documents(self) -> int:
        """Documents kept."""
        return len(self.offsets) - 1


def tokenize(texts: Iterable[str], tokenizer: Tokenizer, min_length: int, num_threads: int = 2) -> TokenArray:
    """Encode documents on threads, a bounded number of texts in memory at a time.

    Raises:
        DataError: No document has `min_length` tokens.
    """
    dtype = np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32
    begin = np.array([tokenizer.bos_token_id], dtype=dtype)
    end = np.array([tokenizer.eos_token_id], dtype=dtype)
    parts: list[npt.NDArray[Any]] = []
    lengths: list[int] = []
    dropped = text_bytes = 0
    for text, ids in _encoded(texts, tokenizer, num_threads):
        if len(ids) < max(min_length, 1):
            dropped += 1
            continue
        parts += [begin, ids.astype(dtype), end]
        lengths.append(len(ids) + 2)
        text_bytes += len(text.encode("utf-8"))
    if not parts:
        raise DataError(
            f"There is nothing to train or evaluate on: no text of at least {max(min_length, 1)} tokens "
            f"(min_length) among {dropped}."
        )
    offsets = np.concatenate(([0], np.cumsum(lengths, dtype=np.int64)))
    return TokenArray(np.concatenate(parts), offsets, dropped, text_bytes)


def _encoded(
    texts: Iterable[str], tokenizer: Tokenizer, num_threads: int
) -> Iterator[tuple[str, npt.NDArray[np.uint32]]]:
    if isinstance(texts, str):
        raise DataError("texts is one string; give an iterable of strings, such as [text].")
    source = iter(texts)
    with ThreadPoolExecutor(num_threads) as pool:
        while batch := list(islice(source, 64)):
            waiting: list[Future[npt.NDArray[np.uint32]]] = [
                pool.submit(tokenizer.encode_ordinary, text) for text in batch
            ]
            for text, future in zip(batch, waiting, strict=True):
                yield text, future.result()
