"""The tokenizer: trained with rustbpe, encoding with tiktoken."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Self, cast

import numpy as np
import numpy.typing as npt
import rustbpe  # pyright: ignore[reportMissingTypeStubs] - it ships none
import tiktoken

from llm_trainer._files import json_sha256
from llm_trainer.exceptions import TokenizerError, TokenizerNotTrainedException
from llm_trainer.tokenizer._hf_files import read_files, token_strings, write_files
from llm_trainer.tokenizer._long_blanks import cut_around_long_blanks

BOS = "<|bos|>"
EOS = "<|eos|>"
PAD = "<|pad|>"
SPECIAL_TOKENS = (BOS, EOS, PAD)
SMALLEST_VOCAB = 256 + len(SPECIAL_TOKENS)

# Splits text before merging, so that no token spans words: contractions; a word with at most one leading
# space or sign;
# up to two digits; punctuation; line breaks; other white space. As in GPT-4 but for the digits (two waste
# less of a small
# vocabulary). It avoids (?i:) and possessive quantifiers, which the regex engines of tiktoken, rustbpe and
# Hugging Face tokenizers do not all read alike.
SPLIT_PATTERN = (
    r"'(?:[sdmtSDMT]|[lL][lL]|[vV][eE]|[rR][eE])"
    r"|[^\r\n\p{L}\p{N}]?\p{L}+"
    r"|\p{N}{1,2}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+"
    r"|\s+(?!\S)"
    r"|\s+"
)

_PIECE_CHARS = 1 << 18
_PIECES_IN_MEMORY = 64


class BPETokenizer:
    """Byte-level BPE: every text has an encoding, and decoding it gives the text back exactly.

    The special tokens take the last three ids: `<|bos|>` begins a text, `<|eos|>` ends a document,
    `<|pad|>` fills rows. Text that merely spells one of them is encoded as ordinary text.
    """

    def __init__(self) -> None:
        self._encoding: tiktoken.Encoding | None = None
        self._ranks: dict[bytes, int] = {}

    def train(self, texts: Iterable[str], vocab_size: int = 50000) -> None:
        """Learn merges from any iterable of texts; about 16 MB of it is held in memory at a time.

        Args:
            texts: Documents. They are read once.
            vocab_size: Tokens wanted, special ones included. Text with too few different pairs gives fewer.

        Raises:
            TokenizerError: `vocab_size` is below 259 (256 bytes and 3 special tokens), there is no text,
                or an item is not a string or holds a lone surrogate.
        """
        if vocab_size < SMALLEST_VOCAB:
            raise TokenizerError(
                f"vocab_size is {vocab_size}; it must be at least {SMALLEST_VOCAB}: "
                f"256 bytes and {len(SPECIAL_TOKENS)} special tokens."
            )
        if isinstance(texts, str):
            raise TokenizerError("texts is one string; give an iterable of strings, such as [text].")
        pieces = _Pieces(texts)
        # An extension module without stubs: its types are unknown.
        trainer: Any = cast("Any", rustbpe).Tokenizer()
        trainer.train_from_iterator(
            iter(pieces),
            vocab_size - len(SPECIAL_TOKENS),
            buffer_size=_PIECES_IN_MEMORY,
            pattern=SPLIT_PATTERN,
        )
        if not pieces.count:
            raise TokenizerError("There is no text to train on: the texts are empty.")
        self._set_ranks(_without_duplicates(trainer.get_mergeable_ranks()))

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Return the ids of `text`, after the one of `<|bos|>` if `add_special_tokens`.

        Raises:
            TokenizerNotTrainedException: There are no merges yet.
            TokenizerError: `text` holds a lone surrogate, which is not a character and has no encoding.
        """
        ids = cast("list[int]", self.encode_ordinary(text).tolist())
        return [self.bos_token_id, *ids] if add_special_tokens else ids

    def encode_ordinary(self, text: str) -> npt.NDArray[np.uint32]:
        """Return the ids of `text` alone as an array, which is faster than a list for long texts."""
        encoding = self._trained()
        if not isinstance(cast("object", text), str):
            raise TokenizerError(f"Only a string can be encoded, not a {type(text).__name__}.")
        _refuse_surrogates(text)
        try:
            return _ids(encoding, text)
        except ValueError:
            # The regex engine's stack is full: there is a run of hundreds of thousands of blanks.
            parts = list(cut_around_long_blanks(text))
            if len(parts) == 1:
                raise
        # The same merges on a piece that is not to be split.
        whole = tiktoken.Encoding(
            "llm-trainer-bpe-whole", pat_str="(?s:.+)", mergeable_ranks=self._ranks, special_tokens={}
        )
        return np.concatenate([_ids(whole if is_piece else encoding, part) for part, is_piece in parts])

    def encode_batch(
        self, texts: Iterable[str], add_special_tokens: bool = True, num_threads: int | None = None
    ) -> list[list[int]]:
        """Encode many texts on `num_threads` threads (all cores by default), in order.

        Raises:
            TokenizerError: `texts` is one string, or one of them cannot be encoded.
        """
        self._trained()
        if isinstance(texts, str):
            raise TokenizerError("texts is one string; give an iterable of strings, such as [text].")
        with ThreadPoolExecutor(num_threads or os.cpu_count()) as pool:
            return list(
                pool.map(functools.partial(self.encode, add_special_tokens=add_special_tokens), texts)
            )

    def decode(self, token_ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """Return the text of `token_ids`; bytes that are not UTF-8 (a cut character) become U+FFFD.

        Raises:
            TokenizerError: An id is not in the vocabulary.
        """
        encoding = self._trained()
        ids = [int(token_id) for token_id in token_ids]
        for token_id in ids:
            if not 0 <= token_id < self.vocab_size:
                raise TokenizerError(f"Token id {token_id} is not in the vocabulary of {self.vocab_size}.")
        if skip_special_tokens:
            ids = [token_id for token_id in ids if token_id < len(self._ranks)]
        return encoding.decode_bytes(ids).decode("utf-8", errors="replace")

    @property
    def vocab_size(self) -> int:
        """Number of tokens, special ones included."""
        self._trained()
        return len(self._ranks) + len(SPECIAL_TOKENS)

    @property
    def vocab(self) -> dict[str, int]:
        """Token to id. Bytes are spelled as Hugging Face does: printable ones as themselves, a space as
        `Ġ`.
        """
        self._trained()
        return token_strings(self._ranks) | self._special_ids()

    @property
    def special_tokens(self) -> list[str]:
        """The special tokens, in the order of their ids."""
        return list(SPECIAL_TOKENS)

    @property
    def bos_token_id(self) -> int:
        """Id of `<|bos|>`, which begins a text."""
        return self._special_ids()[BOS]

    @property
    def eos_token_id(self) -> int:
        """Id of `<|eos|>`, which ends a document."""
        return self._special_ids()[EOS]

    @property
    def pad_token_id(self) -> int:
        """Id of `<|pad|>`, which fills rows."""
        return self._special_ids()[PAD]

    def token_byte_lengths(self) -> npt.NDArray[np.int64]:
        """Return the number of UTF-8 bytes that each id stands for; 0 for the special ones."""
        self._trained()
        lengths = [len(token) for token in self._ranks]
        return np.array([*lengths, *(0 for _ in SPECIAL_TOKENS)], dtype=np.int64)

    def get_vocab_stats(self) -> dict[str, Any]:
        """Return the vocabulary's sizes and the lengths of its merged tokens in bytes."""
        self._trained()
        lengths = self.token_byte_lengths()[256 : len(self._ranks)]
        return {
            "vocab_size": self.vocab_size,
            "num_bytes": 256,
            "num_merges": len(self._ranks) - 256,
            "num_special_tokens": len(SPECIAL_TOKENS),
            "mean_merged_token_bytes": float(lengths.mean()) if lengths.size else 0.0,
            "longest_token_bytes": int(lengths.max()) if lengths.size else 1,
        }

    def fingerprint(self) -> str:
        """Return the SHA-256 of the vocabulary: tokenizers that encode alike have the same."""
        return json_sha256(self.vocab)

    def save_pretrained(self, save_directory: str | Path) -> None:
        """Write `tokenizer.json` and `tokenizer_config.json`, which `transformers.PreTrainedTokenizerFast`
        loads too.

        There, text that spells a special token becomes that token unless `split_special_tokens=True`.
        """
        self._trained()
        write_files(
            Path(save_directory), self._ranks, self._special_ids(), SPLIT_PATTERN, bos=BOS, eos=EOS, pad=PAD
        )

    @classmethod
    def from_pretrained(cls, load_directory: str | Path) -> Self:
        """Read what `save_pretrained` wrote.

        Raises:
            FormatError: A file is missing, damaged, newer than this release, or of another kind of tokenizer.
        """
        tokenizer = cls()
        tokenizer._set_ranks(read_files(Path(load_directory), SPECIAL_TOKENS, SPLIT_PATTERN))
        return tokenizer

    def _set_ranks(self, ranks: dict[bytes, int]) -> None:
        self._ranks = ranks
        self._encoding = tiktoken.Encoding(
            "llm-trainer-bpe",
            pat_str=SPLIT_PATTERN,
            mergeable_ranks=ranks,
            special_tokens=_special_ids(len(ranks)),
        )

    def _special_ids(self) -> dict[str, int]:
        self._trained()
        return _special_ids(len(self._ranks))

    def _trained(self) -> tiktoken.Encoding:
        if self._encoding is None:
            raise TokenizerNotTrainedException(
                "This tokenizer has no vocabulary yet; "
                "call train(texts) or BPETokenizer.from_pretrained(directory)."
            )
        return self._encoding


def _ids(encoding: tiktoken.Encoding, text: str) -> npt.NDArray[np.uint32]:
    return encoding.encode_to_numpy(text, disallowed_special=())


def _special_ids(first: int) -> dict[str, int]:
    return {token: first + index for index, token in enumerate(SPECIAL_TOKENS)}


def _refuse_surrogates(text: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise TokenizerError(
            f"The text holds a lone surrogate (U+{ord(text[error.start]):04X}) at position "
            f"{error.start}; "
            'replace such with text.encode("utf-16", "surrogatepass").decode("utf-16", "replace").'
        ) from None


class _Pieces:
    """Texts cut at line breaks into pieces of bounded size, counted."""

    def __init__(self, texts: Iterable[str]) -> None:
        self._texts = texts
        self.count = 0

    def __iter__(self) -> Iterator[str]:
        for text in self._texts:
            if not isinstance(cast("object", text), str):
                raise TokenizerError(f"Training texts must be strings, not {type(text).__name__}.")
            _refuse_surrogates(text)
            start = 0
            while start < len(text):
                end = start + _PIECE_CHARS
                if end < len(text):
                    end = text.rfind("\n", start, end) + 1 or end
                self.count += 1
                yield text[start:end]
                start = end


def _without_duplicates(ranks: Sequence[tuple[Sequence[int], int]]) -> dict[bytes, int]:
    """Number the tokens anew in order of rank, each once.

    Two merges may spell the same bytes ("a" + "bc", "ab" + "c"); encoding can only use the first.
    """
    ordered = sorted(ranks, key=lambda item: item[1])
    return {token: rank for rank, token in enumerate(dict.fromkeys(bytes(token) for token, _ in ordered))}
