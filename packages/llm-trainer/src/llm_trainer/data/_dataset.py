"""Rows of tokens for training."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import Dataset

from llm_trainer.data._tokens import Tokenizer, tokenize
from llm_trainer.exceptions import ConfigurationError

IGNORE_INDEX = -100


class LanguageModelingDataset(Dataset[dict[str, Tensor]]):
    """Texts as rows of `max_length` tokens.

    A document is `<|bos|>`, its text and `<|eos|>`. Packed, the documents stand behind one another and are
    cut every `max_length` tokens, so a row may hold the end of one, others whole, and the start of another;
    not packed, each document has rows of its own. The last row (of the data, or of each document) is
    padded.

    A row is a dictionary of int64 tensors of shape (max_length,):

    - `input_ids`;
    - `attention_mask`: 0 at padding, else 1, 2, ... for the first, second, ... document of the row, which
      `TransformerLM` takes as documents that must not see one another;
    - `labels`: `input_ids`, but -100 at padding and at the first token of a document, which nothing predicts.
    """

    def __init__(
        self,
        texts: Iterable[str],
        tokenizer: Tokenizer,
        max_length: int = 1024,
        pack_sequences: bool = True,
        min_length: int = 1,
    ) -> None:
        """Encode the texts.

        Args:
            texts: Documents, read once; their tokens are held in memory at 2 bytes each (4 where the
                vocabulary has more than 65536).
            tokenizer: A trained `BPETokenizer`.
            max_length: Tokens in a row.
            pack_sequences: Whether rows hold several documents.
            min_length: Documents of fewer tokens, special ones not counted, are dropped; empty ones always.

        Raises:
            DataError: No document is long enough.
            ConfigurationError: `max_length` is below 2, with which nothing is predicted.
        """
        if max_length < 2:
            raise ConfigurationError(f"max_length is {max_length}; it must be at least 2.")
        self.max_length = max_length
        self.packed = pack_sequences
        self._pad = tokenizer.pad_token_id
        self._data = tokenize(texts, tokenizer, min_length, os.cpu_count() or 1)
        self._starts, self._ends = self.pack_sequences() if pack_sequences else self._rows_of_each_document()

    def pack_sequences(self) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Return where each packed row starts and ends in the tokens."""
        total = len(self._data.tokens)
        starts = np.arange(0, total, self.max_length, dtype=np.int64)
        return starts, np.minimum(starts + self.max_length, total)

    def _rows_of_each_document(self) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        firsts, lasts = self._data.offsets[:-1], self._data.offsets[1:]
        rows: npt.NDArray[np.int64] = -(-(lasts - firsts) // self.max_length)
        before: npt.NDArray[np.int64] = np.cumsum(rows) - rows
        within: npt.NDArray[np.int64] = np.arange(int(np.sum(rows)), dtype=np.int64) - np.repeat(before, rows)
        starts: npt.NDArray[np.int64] = np.repeat(firsts, rows) + within * self.max_length
        return starts, np.minimum(starts + self.max_length, np.repeat(lasts, rows))

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, idx: int) -> dict[str, Tensor]:
        if not -len(self) <= idx < len(self):
            raise IndexError(f"row {idx} of {len(self)}")
        start, end = int(self._starts[idx]), int(self._ends[idx])
        input_ids = np.full(self.max_length, self._pad, dtype=np.int64)
        labels = np.full(self.max_length, IGNORE_INDEX, dtype=np.int64)
        documents = np.zeros(self.max_length, dtype=np.int64)
        length = end - start
        input_ids[:length] = labels[:length] = self._data.tokens[start:end]
        low, high = np.searchsorted(self._data.offsets, (start, end))
        begins = self._data.offsets[low:high] - start
        labels[begins] = IGNORE_INDEX
        documents[begins] = 1
        documents[0] = 1
        documents[:length] = documents[:length].cumsum()
        return {
            "input_ids": torch.as_tensor(input_ids),
            "attention_mask": torch.as_tensor(documents),
            "labels": torch.as_tensor(labels),
        }

    def get_stats(self) -> dict[str, Any]:
        """Return the counts of documents, rows and tokens, and the share of the rows that is not padding."""
        tokens = len(self._data.tokens)
        return {
            "num_documents": self._data.num_documents,
            "num_dropped_documents": self._data.dropped,
            "num_rows": len(self),
            "num_tokens": tokens,
            "num_text_bytes": self._data.text_bytes,
            "max_length": self.max_length,
            "mean_document_tokens": tokens / self._data.num_documents,
            "fill": tokens / (len(self) * self.max_length),
        }
