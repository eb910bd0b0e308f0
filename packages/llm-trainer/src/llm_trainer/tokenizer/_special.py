"""Special tokens: their names, their ids, and which of them begins, ends and pads."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from llm_trainer.exceptions import TokenizerError

BOS = "<|bos|>"
EOS = "<|eos|>"
PAD = "<|pad|>"
DEFAULT_SPECIAL_TOKENS = (BOS, EOS, PAD)


@dataclass(frozen=True, kw_only=True)
class SpecialTokens:
    """The special tokens of a vocabulary."""

    ids: Mapping[str, int]
    """Every special token and its id, in order of the ids."""
    bos: str = BOS
    """The one that begins a text."""
    eos: str = EOS
    """The one that ends a document."""
    pad: str = PAD
    """The one that fills rows."""


def all_special_tokens(extra: Iterable[str]) -> tuple[str, ...]:
    """Return the three that every tokenizer has, and `extra` ones behind them.

    Raises:
        TokenizerError: One of them is not a string, there twice, or could be the name of an ordinary token.
    """
    if isinstance(extra, str):
        raise TokenizerError(f"special_tokens is one string; give a list, such as [{extra!r}].")
    names: list[str] = list(DEFAULT_SPECIAL_TOKENS)
    for name in extra:
        if not isinstance(name, str) or not name:
            raise TokenizerError(f"A special token must be a string that is not empty, not {name!r}.")
        if name in names:
            raise TokenizerError(
                f"The special token {name!r} is there twice; {', '.join(DEFAULT_SPECIAL_TOKENS)} always are."
            )
        refuse_surrogates(name)
        if name[-1].isalnum() or name[-1].isspace() or not any(character.isalnum() for character in name):
            # So spelled it is never one piece of text, and no token that is learnt can have its name.
            raise TokenizerError(
                f"The special token {name!r} must hold a letter or digit and end in punctuation, as <|user|>."
            )
        names.append(name)
    return tuple(names)


def numbered(names: Iterable[str], first_id: int) -> SpecialTokens:
    """Give special tokens the ids from `first_id` on."""
    return SpecialTokens(ids={name: first_id + index for index, name in enumerate(names)})


def chosen_roles(named: Mapping[str, str | None], known: Iterable[str]) -> tuple[str, str, str]:
    """Return the tokens that begin, end and pad, of which other people's files may name only some.

    A missing role is taken by the token of our own spelling if there is one; else one of beginning and end
    stands for the other, as GPT-2's `<|endoftext|>` does for both. What is still missing is to be added.
    """
    names = set(known)
    bos = named.get("bos_token") or (BOS if BOS in names else None)
    eos = named.get("eos_token") or (EOS if EOS in names else None)
    return bos or eos or BOS, eos or bos or EOS, named.get("pad_token") or PAD


def refuse_surrogates(text: str) -> None:
    """Raise a TokenizerError that says where `text` holds a lone surrogate, if it does."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise TokenizerError(
            f"The text holds a lone surrogate (U+{ord(text[error.start]):04X}) at position "
            f"{error.start}; "
            'replace such with text.encode("utf-16", "surrogatepass").decode("utf-16", "replace").'
        ) from None
