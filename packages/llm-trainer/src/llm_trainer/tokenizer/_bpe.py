"""The byte-pair tokenizer: trained with rustbpe, encoding with tiktoken."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Self, cast

import numpy as np
import numpy.typing as npt
import rustbpe  # pyright: ignore[reportMissingTypeStubs] - it ships none
import tiktoken

from llm_trainer._files import json_sha256
from llm_trainer.exceptions import FormatError, TokenizerError
from llm_trainer.tokenizer._base import check_vocab_size, require_text
from llm_trainer.tokenizer._byte_level import ByteLevel, read_byte_level
from llm_trainer.tokenizer._byte_tokens import ByteTokenizer
from llm_trainer.tokenizer._hf_files import find_files, write_byte_level
from llm_trainer.tokenizer._long_blanks import cut_around_long_blanks
from llm_trainer.tokenizer._merges import all_merges
from llm_trainer.tokenizer._patterns import KNOWN_PATTERNS, SPLIT_PATTERN, without_gaps
from llm_trainer.tokenizer._pieces import Pieces, reading_progress
from llm_trainer.tokenizer._special import all_special_tokens, numbered, refuse_surrogates

_PIECES_IN_MEMORY = 64


class BPETokenizer(ByteTokenizer):
    """Byte-level BPE: every text has an encoding, and decoding it gives the text back exactly.

    The special tokens take the last ids: `<|bos|>` begins a text, `<|eos|>` ends a document, `<|pad|>` fills
    rows, and behind them come those of `special_tokens`, for uses of your own, such as the roles of a
    conversation. Text that merely spells one of them is encoded as ordinary text: special tokens are put in
    by id (`token_to_id`).
    """

    kind = "bpe"

    def __init__(self, special_tokens: Iterable[str] = ()) -> None:
        self._names = all_special_tokens(special_tokens)
        self._model: ByteLevel | None = None

    def train(
        self, texts: Iterable[str], vocab_size: int = 50000, *, show_progress: bool | None = None
    ) -> None:
        """Learn merges from any iterable of texts; about 16 MB of it is held in memory at a time, and every
        different word with its count.

        Args:
            texts: Documents. They are read once.
            vocab_size: Tokens wanted, special ones included. Text with too few different pairs gives fewer.
            show_progress: Show what has been read; by default where standard error is a terminal.

        Raises:
            TokenizerError: `vocab_size` is no integer or too small for the bytes and the special tokens,
                there is no text, or an item is not a string or holds a lone surrogate.
        """
        check_vocab_size(vocab_size, self._names)
        with reading_progress(show_progress) as report:
            pieces = Pieces(texts, report)
            # An extension module without stubs: its types are unknown.
            trainer: Any = cast("Any", rustbpe).Tokenizer()
            trainer.train_from_iterator(
                iter(pieces),
                vocab_size - len(self._names),
                buffer_size=_PIECES_IN_MEMORY,
                pattern=SPLIT_PATTERN,
            )
        if not pieces.count:
            raise TokenizerError("There is no text to train on: the texts are empty.")
        tokens = _without_duplicates(trainer.get_mergeable_ranks())
        special = numbered(self._names, len(tokens))
        self._set(
            ByteLevel(
                pattern=SPLIT_PATTERN,
                token_bytes=[*tokens, *(name.encode("utf-8") for name in self._names)],
                ranks={token: rank for rank, token in enumerate(tokens)},
                special=special,
                prefix=[special.ids[special.bos]],
                suffix=[],
            )
        )

    def encode_ordinary(self, text: str) -> npt.NDArray[np.uint32]:
        model = self._ready()
        require_text(text)
        try:
            ranks = _ranks(self._encoding, text)
        except UnicodeEncodeError:
            refuse_surrogates(text)
            raise
        except ValueError as error:
            # The regex engine's stack is full: there is a run of hundreds of thousands of blanks.
            ranks = self._encode_long_blanks(text, model, error)
        return ranks if self._ids is None else self._ids[ranks]

    def fingerprint(self) -> str:
        model = self._ready()
        order = [token.hex() for token in model.ranks]
        roles = [model.special.bos, model.special.eos, model.special.pad]
        return json_sha256(
            ["bpe", model.pattern, self.vocab, order, roles, list(model.prefix), list(model.suffix)]
        )

    def save_pretrained(self, save_directory: str | Path) -> None:
        """Write `tokenizer.json` and `tokenizer_config.json`, which `transformers.PreTrainedTokenizerFast`
        loads too, and with the same ids.

        There, text that spells a special token becomes that token unless `split_special_tokens=True`.
        """
        model = self._ready()
        write_byte_level(
            Path(save_directory),
            self.kind,
            token_bytes=model.token_bytes,
            merges=all_merges(model.ranks),
            # tiktoken looks a whole piece up before it merges. It knows no token that no text is encoded to.
            whole_pieces=len(model.ranks) + len(model.special.ids) == len(model.token_bytes),
            pattern=model.pattern,
            special=model.special,
            prefix=model.prefix,
            suffix=model.suffix,
        )

    @classmethod
    def from_pretrained(cls, load_directory: str | Path) -> Self:
        """Read what `save_pretrained` wrote, or other people's `tokenizer.json` (or the folder with one) of a
        byte-level BPE without a normalizer, such as those of GPT-2 and Llama 3.

        Other people's added tokens are all special here: text never becomes one. Where they name no token
        to begin or end a text, one stands for the other; one to pad is added behind the vocabulary if there
        is none. What their template puts around a text, `encode` puts there too.

        Raises:
            FormatError: A file is missing, damaged, newer than this release, or a tokenizer that tiktoken
                cannot stand in for exactly; `create_tokenizer("hf", path)` reads the last.
        """
        files = find_files(load_directory)
        if files.kind not in (None, cls.kind):
            raise FormatError(f"{files.path} holds a {files.kind!r} tokenizer; load_tokenizer() reads any.")
        model = read_byte_level(files)
        tokenizer = cls()
        if files.kind is not None:
            # Trained anew it keeps its special tokens.
            tokenizer._names = tuple(model.special.ids)
        try:
            tokenizer._set(model)
        except ValueError as error:
            raise FormatError(f"{files.path} has a split pattern that tiktoken refuses: {error}.") from error
        return tokenizer

    def __getstate__(self) -> dict[str, Any]:
        return {"names": self._names, "model": self._model}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._names, self._model = state["names"], None
        if state["model"] is not None:
            self._set(state["model"])

    def _set(self, model: ByteLevel) -> None:
        self._encoding = _encoding(model, without_gaps(model.pattern))
        self._model, self._special, self._token_bytes = model, model.special, model.token_bytes
        self._prefix, self._suffix, self._vocab = model.prefix, model.suffix, None
        special_ids = set(model.special.ids.values())
        id_of = {token: i for i, token in enumerate(model.token_bytes) if i not in special_ids}
        ids = np.array([id_of[token] for token in model.ranks], dtype=np.uint32)
        self._ids = None if np.array_equal(ids, np.arange(len(ids))) else ids

    def _ready(self) -> ByteLevel:
        self._trained()
        return cast("ByteLevel", self._model)

    def _encode_long_blanks(self, text: str, model: ByteLevel, error: ValueError) -> npt.NDArray[np.uint32]:
        parts = [(text, False)]
        if model.pattern in KNOWN_PATTERNS:
            parts = list(cut_around_long_blanks(text, line_breaks=KNOWN_PATTERNS[model.pattern]))
        if len(parts) == 1:
            raise TokenizerError(f"The text cannot be split: {error}.") from error
        # The same merges on a piece that is not to be split.
        whole = _encoding(model, r"[\s\S]+")
        return np.concatenate(
            [_ranks(whole if is_piece else self._encoding, part) for part, is_piece in parts]
        )


def _encoding(model: ByteLevel, pattern: str) -> tiktoken.Encoding:
    return tiktoken.Encoding(
        "llm-trainer-bpe",
        pat_str=pattern,
        mergeable_ranks=dict(model.ranks),
        # Without any, tiktoken looks for the empty one at every character. No text is encoded to it.
        special_tokens={model.special.bos: len(model.token_bytes)},
    )


def _ranks(encoding: tiktoken.Encoding, text: str) -> npt.NDArray[np.uint32]:
    return encoding.encode_to_numpy(text, disallowed_special=())


def _without_duplicates(ranks: Sequence[tuple[Sequence[int], int]]) -> list[bytes]:
    """Return the tokens in order of rank, each once.

    Two merges may spell the same bytes ("a" + "bc", "ab" + "c"); encoding can only use the first.
    """
    ordered = sorted(ranks, key=lambda item: item[1])
    return list(dict.fromkeys(bytes(token) for token, _ in ordered))
