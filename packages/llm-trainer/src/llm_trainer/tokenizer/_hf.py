"""Other people's tokenizers of any kind, through Hugging Face's library."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, Self, cast

import numpy as np
import numpy.typing as npt

from llm_trainer._files import json_sha256, shown, write_text
from llm_trainer.exceptions import FormatError, MissingPackageError, TokenizerError
from llm_trainer.tokenizer._base import Tokenizer, require_text
from llm_trainer.tokenizer._byte_tokens import unspell
from llm_trainer.tokenizer._hf_files import find_files, write_config
from llm_trainer.tokenizer._special import SpecialTokens, chosen_roles, refuse_surrogates


class HFTokenizer(Tokenizer):
    """Wraps any `tokenizer.json`. What it encodes and decodes, and how exactly, is the file's affair.

    The tokens that begin, end and pad are those of `tokenizer_config.json`. Where it names none to begin or
    end a text, `<|bos|>` and `<|eos|>` are taken if the vocabulary has them, else one stands for the other,
    else both are added; `<|pad|>` is added if none pads. What is added gets the ids behind the vocabulary,
    so a model needs rows for `vocab_size` tokens.

    Text that spells a special token stays text; the file's other added tokens are found in text as there.
    """

    kind = "hf"

    def __init__(self) -> None:
        # The library's own stubs leave its types out.
        self._tokenizer: Any = None

    def train(
        self, texts: Iterable[str], vocab_size: int = 50000, *, show_progress: bool | None = None
    ) -> None:
        """Refuse: what is wrapped has been trained.

        Raises:
            TokenizerError: Always.
        """
        del texts, vocab_size, show_progress
        raise TokenizerError(
            "An HFTokenizer wraps a tokenizer that has been trained; train a BPETokenizer or a CharTokenizer."
        )

    def train_from_dataset(self, *args: Any, **kwargs: Any) -> None:
        """Refuse, as `train` does, before a dataset is looked for."""
        del args, kwargs
        self.train(())

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return self._encode(text, add_special_tokens)

    def encode_ordinary(self, text: str) -> npt.NDArray[np.uint32]:
        return np.array(self._encode(text, False), dtype=np.uint32)

    def encode_batch(
        self, texts: Iterable[str], add_special_tokens: bool = True, num_threads: int | None = None
    ) -> list[list[int]]:
        """Encode many texts, in order: with `num_threads=1` on one thread, else on the library's own."""
        tokenizer = self._wrapped()
        if isinstance(texts, str):
            raise TokenizerError("texts is one string; give an iterable of strings, such as [text].")
        if num_threads == 1:
            return [self._encode(text, add_special_tokens) for text in texts]
        documents = list(texts)
        for text in documents:
            require_text(text)
            refuse_surrogates(text)
        try:
            found = tokenizer.encode_batch_fast(documents, add_special_tokens=add_special_tokens)
        except Exception as error:  # The library raises no other type.
            raise TokenizerError(f"The wrapped tokenizer cannot encode this text: {error}.") from error
        return [encoding.ids for encoding in found]

    def encode_batch_ordinary(
        self, texts: Iterable[str], num_threads: int | None = None
    ) -> list[npt.NDArray[np.uint32]]:
        """Return `encode_ordinary` of many texts, on threads as `encode_batch`."""
        return [np.array(ids, dtype=np.uint32) for ids in self.encode_batch(texts, False, num_threads)]

    def decode(self, token_ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        tokenizer = self._wrapped()
        ids = self._checked_ids(token_ids)
        return tokenizer.decode(ids, skip_special_tokens=skip_special_tokens)

    @property
    def vocab_size(self) -> int:
        """One more than the largest id."""
        self._wrapped()
        return self._size

    @property
    def vocab(self) -> dict[str, int]:
        """Token to id, spelled as the file does."""
        return self._wrapped().get_vocab(with_added_tokens=True)

    def token_to_id(self, token: str) -> int:
        found = self._wrapped().token_to_id(token)
        if found is None:
            raise TokenizerError(f"There is no token {token!r}; they are spelled as in `vocab`.")
        return found

    def id_to_token(self, token_id: int) -> str:
        (checked,) = self._checked_ids([token_id])
        return self._wrapped().id_to_token(checked)

    def token_byte_lengths(self) -> npt.NDArray[np.int64]:
        """Return the number of UTF-8 bytes that each id stands for; 0 for the special ones.

        Raises:
            TokenizerError: The tokens do not spell bytes, so that there is no such number.
        """
        special = self._trained()
        if not self._spells_bytes():
            raise TokenizerError("The wrapped tokenizer is not a byte-level one: its tokens have no bytes.")
        lengths = np.zeros(self._size, dtype=np.int64)
        for token, token_id in self.vocab.items():
            if token not in special.ids:
                try:
                    lengths[token_id] = len(unspell(token))
                except KeyError:
                    # An added token that is not special: it is its own text.
                    lengths[token_id] = len(token.encode("utf-8"))
        return lengths

    def get_vocab_stats(self) -> dict[str, Any]:
        """Return the vocabulary's sizes; those of its tokens in bytes only if they spell bytes."""
        special = self._trained()
        if self._spells_bytes():
            return super().get_vocab_stats()
        return {"vocab_size": self.vocab_size, "num_special_tokens": len(special.ids)}

    def fingerprint(self) -> str:
        special = self._trained()
        return json_sha256(["hf", self._wrapped().to_str(), special.bos, special.eos, special.pad])

    def save_pretrained(self, save_directory: str | Path) -> None:
        tokenizer, special = self._wrapped(), self._trained()
        write_text(Path(save_directory) / "tokenizer.json", tokenizer.to_str())
        write_config(Path(save_directory), self.kind, special)

    @classmethod
    def from_pretrained(cls, load_directory: str | Path) -> Self:
        """Read a `tokenizer.json`, or the folder with one.

        Raises:
            FormatError: A file is missing or damaged.
            MissingPackageError: `tokenizers` is not installed.
        """
        library = _tokenizers()
        files = find_files(load_directory)
        _refuse_impossible_ids(files.path, files.content())
        try:
            wrapped = library.Tokenizer.from_file(str(files.path))
        except Exception as error:  # The library raises no other type.
            raise FormatError(f"{files.path} is not a tokenizer, or is damaged: {error}.") from error
        # A long text is neither cut nor filled up.
        wrapped.no_truncation()
        wrapped.no_padding()
        known = [token.content for token in wrapped.get_added_tokens_decoder().values() if token.special]
        bos, eos, pad = chosen_roles(files.roles(), known)
        wrapped.add_special_tokens([name for name in (bos, eos, pad) if name not in known])
        vocab = wrapped.get_vocab(with_added_tokens=True)
        if len(set(vocab.values())) < len(vocab):
            raise FormatError(
                f"{files.path} has two tokens with one id, or unused ids where one is to be added."
            )
        ids = {
            token.content: token_id
            for token_id, token in sorted(wrapped.get_added_tokens_decoder().items())
            if token.special
        }
        tokenizer = cls()
        tokenizer._set(wrapped, SpecialTokens(ids=ids, bos=bos, eos=eos, pad=pad))
        return tokenizer

    def _set(self, wrapped: Any, special: SpecialTokens) -> None:
        wrapped.encode_special_tokens = True
        ids = wrapped.get_vocab(with_added_tokens=True).values()
        self._size = max(ids) + 1
        self._unused = set(range(self._size)).difference(ids)
        self._tokenizer, self._special = wrapped, special

    def __getstate__(self) -> dict[str, Any]:
        return {"json": self._tokenizer and self._tokenizer.to_str(), "special": self._special}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._tokenizer = None
        if state["json"] is not None:
            self._set(_tokenizers().Tokenizer.from_str(state["json"]), state["special"])

    def _checked_ids(self, token_ids: Iterable[int]) -> list[int]:
        ids = super()._checked_ids(token_ids)
        for token_id in self._unused.intersection(ids):
            raise TokenizerError(f"Token id {token_id} is not in the vocabulary: no token has it.")
        return ids

    def _encode(self, text: str, add_special_tokens: bool) -> list[int]:
        tokenizer = self._wrapped()
        require_text(text)
        refuse_surrogates(text)
        try:
            return tokenizer.encode(text, add_special_tokens=add_special_tokens).ids
        except Exception as error:  # The library raises no other type.
            raise TokenizerError(f"The wrapped tokenizer cannot encode this text: {error}.") from error

    def _spells_bytes(self) -> bool:
        return type(self._wrapped().decoder).__name__ == "ByteLevel"

    def _wrapped(self) -> Any:
        self._trained()
        return self._tokenizer


def _refuse_impossible_ids(path: Path, content: dict[str, Any]) -> None:
    """Look before the library does, which takes memory for every id up to the largest."""
    try:
        vocab: Any = content["model"]["vocab"]
        # That of a Unigram model is a list.
        listed = isinstance(vocab, list)
        ids: list[Any] = list(range(len(cast("list[Any]", vocab)))) if listed else list(vocab.values())
        added_tokens = cast("list[dict[str, Any]]", content.get("added_tokens") or [])
        ids += [token["id"] for token in added_tokens]
    except (KeyError, TypeError, AttributeError) as error:
        raise FormatError(f"{path} is not a tokenizer, or is damaged ({error!r}).") from error
    for token_id in ids:
        if not isinstance(token_id, int) or not 0 <= token_id < 2 * len(ids) + 1024:
            raise FormatError(
                f"{path} is damaged: it has {len(ids)} tokens, and one has the id {shown(token_id)}."
            )


def _tokenizers() -> Any:
    try:
        import tokenizers
    except ImportError as error:
        raise MissingPackageError("HFTokenizer needs another package: pip install tokenizers") from error
    return tokenizers
