"""Vocabularies whose every token stands for some bytes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from llm_trainer.exceptions import TokenizerError
from llm_trainer.tokenizer._base import Tokenizer


def _byte_characters() -> list[str]:
    """Return the character that spells each byte in a vocabulary, as GPT-2 published it.

    Bytes that are printable in Latin-1 are themselves; the others are numbered from U+0100.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]


_TO_CHARACTERS = dict(enumerate(_byte_characters()))
_BYTE_OF_CHARACTER = {character: byte for byte, character in _TO_CHARACTERS.items()}


def spell(token: bytes) -> str:
    """Spell bytes in printable characters, as Hugging Face vocabularies do."""
    return token.decode("latin-1").translate(_TO_CHARACTERS)


def unspell(token: str) -> bytes:
    """Return the bytes that a token spells.

    Raises:
        KeyError: A character stands for no byte.
    """
    return bytes([_BYTE_OF_CHARACTER[character] for character in token])


class ByteTokenizer(Tokenizer):
    """Decodes by joining the bytes of the tokens."""

    _token_bytes: Sequence[bytes] = ()
    """The bytes of each id; those of a special token spell its name."""
    _vocab: dict[str, int] | None = None

    def decode(self, token_ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        special = self._trained()
        ids = self._checked_ids(token_ids)
        if skip_special_tokens:
            skipped = set(special.ids.values())
            ids = [token_id for token_id in ids if token_id not in skipped]
        return b"".join([self._token_bytes[token_id] for token_id in ids]).decode("utf-8", errors="replace")

    @property
    def vocab_size(self) -> int:
        self._trained()
        return len(self._token_bytes)

    @property
    def vocab(self) -> dict[str, int]:
        """Token to id. Bytes are spelled as Hugging Face does: printable ones as themselves, a space as
        `Ġ`.
        """
        return dict(self._spelled())

    def token_to_id(self, token: str) -> int:
        found = self._spelled().get(token)
        if found is None:
            raise TokenizerError(f"There is no token {token!r}; bytes are spelled as in `vocab`.")
        return found

    def id_to_token(self, token_id: int) -> str:
        (checked,) = self._checked_ids([token_id])
        names = {number: name for name, number in self._trained().ids.items()}
        return names.get(checked) or spell(self._token_bytes[checked])

    def token_byte_lengths(self) -> npt.NDArray[np.int64]:
        special = self._trained()
        lengths = np.array([len(token) for token in self._token_bytes], dtype=np.int64)
        lengths[list(special.ids.values())] = 0
        return lengths

    def __getstate__(self) -> dict[str, Any]:
        # Without what only saves work, so that equal tokenizers pickle alike.
        return self.__dict__ | {"_vocab": None}

    def _spelled(self) -> dict[str, int]:
        special = self._trained()
        if self._vocab is None:
            names = {token_id: name for name, token_id in special.ids.items()}
            self._vocab = {
                names.get(token_id) or spell(token): token_id
                for token_id, token in enumerate(self._token_bytes)
            }
        return self._vocab
