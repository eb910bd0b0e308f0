"""Rows of tokens for training."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Sequence
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from llm_trainer.config import DataConfig
from llm_trainer.data._packing import Layout, best_fit, concatenate, one_document_a_row
from llm_trainer.data._store import Tokens
from llm_trainer.data._tokens import tokenize
from llm_trainer.tokenizer import Tokenizer

IGNORE_INDEX = -100
_PACKINGS = {"best_fit": best_fit, "concatenate": concatenate}


class LanguageModelingDataset(Dataset[dict[str, Tensor]]):
    """Texts as rows of `max_length` tokens.

    A document is `<|bos|>`, its text and `<|eos|>`; every token of it is in exactly one row. Not packed, each
    document has rows of its own. Packed, a row holds several:

    - `best_fit` cuts only documents that are longer than a row, into full rows and a rest, and fills rows
      with the rests and the other documents, by best-fit decreasing;
    - `concatenate` puts the documents behind one another and cuts every `max_length` tokens, so a row may
      begin and end in the middle of one.

    What is left of a row is padding. A row is a dictionary of int64 tensors of shape (max_length,):

    - `input_ids`;
    - `attention_mask`: 0 at padding, else 1, 2, ... for the first, second, ... document of the row, which
      `TransformerLM` takes as documents that must not see one another, each with positions from 0;
    - `labels`: `input_ids`, but -100 at padding and at the first token of each document, which nothing
      predicts. That includes a document's rest that stands behind another document: the token before it is in
      another row. (Where a rest begins a row, its first label is there, but no token precedes it.)
    """

    def __init__(
        self,
        texts: Iterable[str],
        tokenizer: Tokenizer,
        max_length: int = 1024,
        pack_sequences: bool = True,
        min_length: int = 1,
        packing: str = "best_fit",
    ) -> None:
        """Encode the texts.

        Args:
            texts: Documents, read once; their tokens are held in memory at 2 bytes each (4 where the
                vocabulary has more than 65536).
            tokenizer: A trained tokenizer.
            max_length: Tokens in a row.
            pack_sequences: Whether rows hold several documents.
            min_length: Documents of fewer tokens, special ones not counted, are dropped; empty ones always.
            packing: `best_fit` or `concatenate`.

        Raises:
            DataError: No document is long enough.
            ConfigurationError: `max_length` is below 2, with which nothing is predicted, `min_length` below
                0, or `packing` unknown; or something is of another type.
        """
        _check(max_length, pack_sequences, packing, min_length)
        data = tokenize(texts, tokenizer, min_length, os.cpu_count() or 1)
        self._set(data, max_length, pack_sequences, packing)

    @classmethod
    def from_store(
        cls,
        store: Tokens,
        max_length: int = 1024,
        pack_sequences: bool = True,
        packing: str = "best_fit",
    ) -> Self:
        """Return the rows of a token store; their tokens stay in its files.

        Raises:
            ConfigurationError: As in the constructor.
        """
        _check(max_length, pack_sequences, packing)
        dataset = cls.__new__(cls)
        dataset._set(store, max_length, pack_sequences, packing)
        return dataset

    def _set(self, data: Tokens, max_length: int, packed: bool, packing: str) -> None:
        self.max_length = max_length
        self.packed = packed
        self.packing = packing
        self._data = data
        self._layout = self.pack_sequences() if packed else one_document_a_row(data.offsets, max_length)

    def pack_sequences(self) -> Layout:
        """Return which pieces of the tokens stand in which row when packed."""
        return _PACKINGS[self.packing](self._data.offsets, self.max_length)

    def fingerprint(self) -> str:
        """Return a hash of the tokens and of how they are put into rows: data sets of equal rows have the
        same.
        """
        form = self.packing if self.packed else "unpacked"
        parts = (self._data.fingerprint(), self._data.pad_token_id, self.max_length, form)
        return hashlib.sha256(repr(parts).encode()).hexdigest()

    def __len__(self) -> int:
        return len(self._layout.firsts) - 1

    def __getitem__(self, idx: int) -> dict[str, Tensor]:
        return self.__getitems__([idx])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Tensor]]:
        """Return several rows, which costs little more than one."""
        size = len(self)
        for index in indices:
            if not -size <= index < size:
                raise IndexError(f"row {index} of {size}")
        rows = np.asarray(indices, dtype=np.int64) % size
        if not len(rows):
            return []
        firsts, ends = self._layout.firsts[rows], self._layout.firsts[rows + 1]
        # One entry for each piece of all these rows: its number, its row here, and its place in that row.
        counts = ends - firsts
        before = np.cumsum(counts) - counts
        number_in_row = np.arange(int(counts.sum())) - np.repeat(before, counts)
        pieces = np.repeat(firsts, counts) + number_in_row
        lengths = self._layout.lengths[pieces]
        flat_ends = np.cumsum(lengths)
        flat_starts = flat_ends - lengths
        row_starts = flat_starts[before]
        row_of = np.repeat(np.arange(len(rows)), counts)
        column = flat_starts - row_starts[row_of]
        # One entry for each token.
        total = int(flat_ends[-1])
        within = np.arange(total)
        source = within + np.repeat(self._layout.starts[pieces] - flat_starts, lengths)
        target = within + np.repeat(row_of * self.max_length + column - flat_starts, lengths)

        values = np.empty((3, len(rows) * self.max_length), dtype=np.int64)
        values[0], values[1], values[2] = self._data.pad_token_id, 0, IGNORE_INDEX
        values[0, target] = values[2, target] = self._data.tokens[source]
        values[1, target] = np.repeat(number_in_row + 1, lengths)
        begins = (column > 0) | self._begins_document(self._layout.starts[pieces])
        values[2, (row_of * self.max_length + column)[begins]] = IGNORE_INDEX
        input_ids, documents, labels = torch.as_tensor(values).view(3, len(rows), self.max_length)
        return [
            {"input_ids": input_ids[row], "attention_mask": documents[row], "labels": labels[row]}
            for row in range(len(rows))
        ]

    def _begins_document(self, places: np.ndarray[Any, np.dtype[np.int64]]) -> Any:
        offsets = self._data.offsets
        return offsets[np.searchsorted(offsets, places)] == places

    def get_stats(self) -> dict[str, Any]:
        """Return the counts of documents, rows and tokens, and the share of the rows that is not padding."""
        tokens = len(self._data.tokens)
        return {
            "num_documents": self._data.num_documents,
            "num_dropped_documents": self._data.dropped,
            "num_cut_documents": self._num_cut_documents(),
            "num_rows": len(self),
            "num_tokens": tokens,
            "num_text_bytes": self._data.text_bytes,
            "max_length": self.max_length,
            "mean_document_tokens": tokens / self._data.num_documents,
            "fill": tokens / (len(self) * self.max_length),
        }

    def _num_cut_documents(self) -> int:
        inside = self._layout.starts[~self._begins_document(self._layout.starts)]
        return len(np.unique(np.searchsorted(self._data.offsets, inside)))


def _check(max_length: int, pack_sequences: bool, packing: str, min_length: int = 0) -> None:
    """Let the configuration, which says what is possible, look at them."""
    DataConfig(max_length=max_length, pack_sequences=pack_sequences, packing=packing, min_length=min_length)
