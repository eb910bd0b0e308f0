"""What every tokenizer can do."""

from __future__ import annotations

import operator
import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, ClassVar, Self, cast

import numpy as np
import numpy.typing as npt

from llm_trainer._files import shown
from llm_trainer.config._base import hint
from llm_trainer.exceptions import TokenizerError, TokenizerNotTrainedException
from llm_trainer.tokenizer._special import SpecialTokens


class Tokenizer(ABC):
    """Turns text into ids and back. Text that merely spells a special token stays text."""

    kind: ClassVar[str]
    """The name that `create_tokenizer` knows it by."""

    _special: SpecialTokens | None = None
    _prefix: Sequence[int] = ()
    _suffix: Sequence[int] = ()

    @abstractmethod
    def train(
        self, texts: Iterable[str], vocab_size: int = 50000, *, show_progress: bool | None = None
    ) -> None:
        """Learn a vocabulary of at most `vocab_size` tokens from texts, which are read once.

        `show_progress` is for long training; by default there is progress where standard error is a
        terminal.
        """

    @abstractmethod
    def encode_ordinary(self, text: str) -> npt.NDArray[np.uint32]:
        """Return the ids of `text`, no special ones among them, as an array: faster than a list."""

    @abstractmethod
    def decode(self, token_ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """Return the text of ids; bytes that are not UTF-8 (a cut character) become U+FFFD.

        Raises:
            TokenizerError: An id is not in the vocabulary.
        """

    @property
    @abstractmethod
    def vocab_size(self) -> int:
        """Number of ids, special ones included."""

    @property
    @abstractmethod
    def vocab(self) -> dict[str, int]:
        """Token to id, special ones included."""

    @abstractmethod
    def token_to_id(self, token: str) -> int:
        """Return the id of a token, spelled as in `vocab`.

        Raises:
            TokenizerError: There is no such token.
        """

    @abstractmethod
    def id_to_token(self, token_id: int) -> str:
        """Return the token of an id, spelled as in `vocab`.

        Raises:
            TokenizerError: The id is not in the vocabulary.
        """

    @abstractmethod
    def token_byte_lengths(self) -> npt.NDArray[np.int64]:
        """Return the number of UTF-8 bytes that each id stands for; 0 for the special ones."""

    @abstractmethod
    def fingerprint(self) -> str:
        """Return a SHA-256; only tokenizers that encode and decode alike have the same."""

    @abstractmethod
    def save_pretrained(self, save_directory: str | Path) -> None:
        """Write `tokenizer.json` and `tokenizer_config.json`, which `transformers` loads too."""

    @classmethod
    @abstractmethod
    def from_pretrained(cls, load_directory: str | Path) -> Self:
        """Read a folder with a tokenizer of this kind.

        Raises:
            FormatError: A file is missing, damaged, newer than this release, or of another kind.
        """

    def train_from_dataset(
        self,
        dataset_name: str,
        dataset_config: str | None = None,
        vocab_size: int = 50000,
        split: str = "train",
        text_column: str = "text",
        **kwargs: Any,
    ) -> None:
        """Train on a dataset, read as a stream.

        Args:
            dataset_name: What `llm_trainer.data.read_dataset` reads: a text, JSONL or Parquet file, a folder,
                a dataset saved on disk, "python-stdlib", or the name of a Hugging Face dataset.
            dataset_config: Configuration of a Hugging Face dataset.
            vocab_size: Tokens wanted, special ones included.
            split: Part of the dataset.
            text_column: Column or key that holds the text.
            kwargs: `patterns`, names of the files wanted from a folder, and `show_progress`.

        Raises:
            TokenizerError: An option is unknown.
            DataError: The dataset cannot be read.
            MissingPackageError: The dataset needs a package that is not installed.
        """
        # The data room imports this one.
        from llm_trainer.data import read_dataset

        for name in kwargs:
            if name not in ("patterns", "show_progress"):
                known = ["dataset_config", "vocab_size", "split", "text_column", "patterns", "show_progress"]
                raise TokenizerError(f"train_from_dataset has no option {name!r}; {hint(name, known)}")
        texts = read_dataset(
            dataset_name,
            dataset_config,
            split=split,
            text_column=text_column,
            patterns=kwargs.get("patterns"),
        )
        self.train(texts, vocab_size, show_progress=kwargs.get("show_progress"))

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Return the ids of `text`, with those that begin (and, in some, end) a text if
        `add_special_tokens`.

        Raises:
            TokenizerNotTrainedException: There is no vocabulary yet.
            TokenizerError: `text` is not a string or holds a lone surrogate, which is not a character and has
                no encoding.
        """
        ids = cast("list[int]", self.encode_ordinary(text).tolist())
        return [*self._prefix, *ids, *self._suffix] if add_special_tokens else ids

    def encode_batch(
        self, texts: Iterable[str], add_special_tokens: bool = True, num_threads: int | None = None
    ) -> list[list[int]]:
        """Encode many texts on `num_threads` threads (all cores by default), in order.

        Raises:
            TokenizerError: `texts` is one string, or one of them cannot be encoded.
        """
        arrays = self.encode_batch_ordinary(texts, num_threads)
        begin, end = (self._prefix, self._suffix) if add_special_tokens else ((), ())
        return [[*begin, *cast("list[int]", ids.tolist()), *end] for ids in arrays]

    def encode_batch_ordinary(
        self, texts: Iterable[str], num_threads: int | None = None
    ) -> list[npt.NDArray[np.uint32]]:
        """Return `encode_ordinary` of many texts, on `num_threads` threads (all cores by default)."""
        self._trained()
        if isinstance(texts, str):
            raise TokenizerError("texts is one string; give an iterable of strings, such as [text].")
        if num_threads is not None and num_threads < 1:
            raise TokenizerError(f"num_threads is {num_threads}; it must be at least 1.")
        documents = list(texts)
        threads = num_threads or os.cpu_count() or 1
        if threads == 1 or len(documents) < 2:
            return self._encode_all(documents)
        # Short texts go to a thread together, as handing one over costs more than encoding it.
        share = min(max(len(documents) // (4 * threads), 1), 256)
        parts = [documents[start : start + share] for start in range(0, len(documents), share)]
        with ThreadPoolExecutor(threads) as pool:
            return [ids for part in pool.map(self._encode_all, parts) for ids in part]

    @property
    def special_tokens(self) -> list[str]:
        """The special tokens, in the order of their ids."""
        return list(self._trained().ids)

    @property
    def bos_token_id(self) -> int:
        """Id of the token that begins a text."""
        special = self._trained()
        return special.ids[special.bos]

    @property
    def eos_token_id(self) -> int:
        """Id of the token that ends a document."""
        special = self._trained()
        return special.ids[special.eos]

    @property
    def pad_token_id(self) -> int:
        """Id of the token that fills rows."""
        special = self._trained()
        return special.ids[special.pad]

    def get_vocab_stats(self) -> dict[str, Any]:
        """Return the vocabulary's sizes and the lengths in bytes of the tokens that are not single bytes."""
        lengths = self.token_byte_lengths()
        longer = lengths[lengths > 1]
        num_special = len(self._trained().ids)
        return {
            "vocab_size": self.vocab_size,
            "num_bytes": int((lengths == 1).sum()),
            "num_merges": int(longer.size),
            "num_special_tokens": num_special,
            "mean_merged_token_bytes": float(longer.mean()) if longer.size else 0.0,
            "longest_token_bytes": int(lengths.max()),
        }

    def _encode_all(self, texts: Sequence[str]) -> list[npt.NDArray[np.uint32]]:
        return [self.encode_ordinary(text) for text in texts]

    def _checked_ids(self, token_ids: Iterable[int]) -> list[int]:
        # Arrays and tensors are much faster to take as a list.
        to_list: Any = getattr(token_ids, "tolist", None)
        try:
            ids = [operator.index(token_id) for token_id in (to_list() if to_list else token_ids)]
        except TypeError as error:
            raise TokenizerError(f"Token ids must be an iterable of integers: {error}.") from None
        size = self.vocab_size
        for token_id in ids:
            if not 0 <= token_id < size:
                raise TokenizerError(f"Token id {token_id} is not in the vocabulary of {size}.")
        return ids

    def _trained(self) -> SpecialTokens:
        if self._special is None:
            raise TokenizerNotTrainedException(
                "This tokenizer has no vocabulary yet; "
                f"call train(texts) or {type(self).__name__}.from_pretrained(directory)."
            )
        return self._special


def require_text(text: object) -> None:
    """Refuse to encode what is not a string."""
    if not isinstance(text, str):
        raise TokenizerError(f"Only a string can be encoded, not a {type(text).__name__}.")


def check_vocab_size(vocab_size: int, special_tokens: Sequence[str]) -> None:
    """Refuse a vocabulary that cannot hold the bytes and the special tokens."""
    smallest = 256 + len(special_tokens)
    if not isinstance(cast("object", vocab_size), int) or vocab_size < smallest:
        raise TokenizerError(
            f"vocab_size is {shown(vocab_size)}; it must be an integer of at least {smallest}: "
            f"256 bytes and {len(special_tokens)} special tokens."
        )
