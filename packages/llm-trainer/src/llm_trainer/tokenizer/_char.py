"""The character tokenizer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Self

import numpy as np
import numpy.typing as npt

from llm_trainer._files import json_sha256, shown
from llm_trainer.exceptions import FormatError, TokenizerError
from llm_trainer.tokenizer._base import check_vocab_size, require_text
from llm_trainer.tokenizer._byte_level import read_byte_level
from llm_trainer.tokenizer._byte_tokens import ByteTokenizer
from llm_trainer.tokenizer._hf_files import find_files, write_byte_level
from llm_trainer.tokenizer._pieces import Pieces, reading_progress
from llm_trainer.tokenizer._special import SpecialTokens, all_special_tokens, numbered, refuse_surrogates

# Every character is a piece of its own.
_PATTERN = r"[\s\S]"


class CharTokenizer(ByteTokenizer):
    """A token for each character that training saw; others are spelled in their UTF-8 bytes.

    The 256 bytes come first, the ASCII characters among them, then the other characters in order of their
    code points, then the special tokens: those of `BPETokenizer` and `special_tokens`. Every text has an
    encoding, and decoding it gives the text back exactly.
    """

    kind = "char"

    def __init__(self, special_tokens: Iterable[str] = ()) -> None:
        self._names = all_special_tokens(special_tokens)

    def train(
        self, texts: Iterable[str], vocab_size: int = 50000, *, show_progress: bool | None = None
    ) -> None:
        """Learn the characters; if `vocab_size` is too small for all, the most frequent of them.

        Raises:
            TokenizerError: `vocab_size` is no integer or too small for the bytes and the special tokens,
                there is no text, or an item is not a string or holds a lone surrogate.
        """
        check_vocab_size(vocab_size, self._names)
        counts: Counter[str] = Counter()
        with reading_progress(show_progress) as report:
            pieces = Pieces(texts, report)
            for piece in pieces:
                if not piece.isascii():
                    counts.update(piece)
        if not pieces.count:
            raise TokenizerError("There is no text to train on: the texts are empty.")
        seen = sorted((-count, character) for character, count in counts.items() if not character.isascii())
        room = vocab_size - 256 - len(self._names)
        characters = sorted(character for _, character in seen[:room])
        self._set(characters, numbered(self._names, 256 + len(characters)))

    def encode_ordinary(self, text: str) -> npt.NDArray[np.uint32]:
        self._trained()
        require_text(text)
        refuse_surrogates(text)
        code_points = np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)
        ids = self._id_of_code_point[code_points]
        unknown = np.flatnonzero(ids < 0)
        if not unknown.size:
            return ids.astype(np.uint32)
        parts: list[npt.NDArray[np.uint32]] = []
        start = 0
        for position in unknown.tolist():
            spelled = np.frombuffer(text[position].encode("utf-8"), dtype=np.uint8)
            parts += [ids[start:position].astype(np.uint32), spelled.astype(np.uint32)]
            start = position + 1
        return np.concatenate([*parts, ids[start:].astype(np.uint32)])

    def fingerprint(self) -> str:
        return json_sha256(["char", self.vocab])

    def save_pretrained(self, save_directory: str | Path) -> None:
        """Write `tokenizer.json` and `tokenizer_config.json`, which `transformers.PreTrainedTokenizerFast`
        loads too, and with the same ids: as a BPE of single characters, whose bytes have no merges.

        There, text that spells a special token becomes that token unless `split_special_tokens=True`.
        """
        write_byte_level(
            Path(save_directory),
            self.kind,
            special=self._trained(),
            token_bytes=self._token_bytes,
            merges=(),
            whole_pieces=True,
            pattern=_PATTERN,
            prefix=self._prefix,
            suffix=(),
        )

    @classmethod
    def from_pretrained(cls, load_directory: str | Path) -> Self:
        """Read what `save_pretrained` wrote.

        Raises:
            FormatError: A file is missing, damaged, newer than this release, or of another tokenizer.
        """
        files = find_files(load_directory)
        if files.kind != cls.kind:
            raise FormatError(f"{files.path} holds no character tokenizer; load_tokenizer() reads any.")
        model = read_byte_level(files, merged=False)
        tokens = model.token_bytes
        num_characters = len(tokens) - 256 - len(model.special.ids)
        bytes_first = all(tokens[byte] == bytes([byte]) for byte in range(256))
        specials_last = list(model.special.ids.values()) == list(range(256 + num_characters, len(tokens)))
        try:
            characters = [token.decode("utf-8") for token in tokens[256 : 256 + num_characters]]
        except UnicodeDecodeError as error:
            raise FormatError(f"{files.path} is damaged: {shown(error.object)} is no character.") from None
        sound = all(len(character) == 1 for character in characters) and model.pattern == _PATTERN
        if not (bytes_first and specials_last and sound):
            raise FormatError(f"{files.path} is damaged: it is not bytes, characters and special tokens.")
        tokenizer = cls()
        tokenizer._names = tuple(model.special.ids)
        tokenizer._set(characters, model.special)
        return tokenizer

    def _set(self, characters: list[str], special: SpecialTokens) -> None:
        table = np.full(0x110000, -1, dtype=np.int32)
        table[:128] = np.arange(128)
        table[[ord(character) for character in characters]] = np.arange(256, 256 + len(characters))
        self._id_of_code_point = table
        self._token_bytes = [
            *(bytes([byte]) for byte in range(256)),
            *(character.encode("utf-8") for character in characters),
            *(name.encode("utf-8") for name in special.ids),
        ]
        self._special, self._vocab, self._prefix = special, None, [special.ids[special.bos]]
