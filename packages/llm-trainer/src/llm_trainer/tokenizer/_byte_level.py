"""Reading the byte-level BPE of any `tokenizer.json` where tiktoken can do the same."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from llm_trainer._files import shown
from llm_trainer.exceptions import FormatError
from llm_trainer.tokenizer._byte_tokens import unspell
from llm_trainer.tokenizer._hf_files import TokenizerFiles
from llm_trainer.tokenizer._merges import Pair, order_of_merges
from llm_trainer.tokenizer._special import SpecialTokens, chosen_roles

# What the ByteLevel pre-tokenizer splits at, if it is to split.
GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"

# Regular expressions that mean the same to Oniguruma, which Hugging Face uses, and to tiktoken's engine. Not
# among them, as they differ or may: anchors, dots, \w, \d, \b, back references, look-behind, set
# intersections, and a possessive or lazy {n}.
_CLASS = r"\\[pP]\{\w+\}|\\[sSrnt]|\\[^\w\s]"
_PORTABLE_PATTERN = re.compile(
    rf"(?:{_CLASS}|\[\^?(?:{_CLASS}|[^\\\[\]&])+\]|\(\?(?:i?:|=|!)|\((?!\?)|[)|]|[*+?][+?]?(?![+?])"
    r"|\{\d+(?:,\d*)?\}(?![*+?])|[^\\()\[\]{}|*+?.^$&])+"
)


class UnsupportedTokenizerError(FormatError):
    """A tokenizer that is sound, but not one that tiktoken can stand in for."""

    def __init__(self, path: Path, problem: str) -> None:
        super().__init__(
            f"BPETokenizer cannot encode as {path} does: {problem}. "
            f"create_tokenizer('hf', {str(path.parent)!r}) can."
        )


@dataclass(frozen=True)
class ByteLevel:
    """A byte-level BPE."""

    pattern: str
    """Splits text into the pieces that are merged."""
    token_bytes: Sequence[bytes]
    """The bytes of each id; those of a special token spell its name."""
    ranks: Mapping[bytes, int]
    """Tokens in the order in which they are merged, bytes among them."""
    special: SpecialTokens
    prefix: Sequence[int]
    """Ids before a text."""
    suffix: Sequence[int]
    """Ids behind a text."""


def read_byte_level(files: TokenizerFiles, *, merged: bool = True) -> ByteLevel:
    """Understand a `tokenizer.json`; if not `merged`, one without merges, whose tokens are whole pieces.

    Raises:
        UnsupportedTokenizerError: It is another kind of tokenizer.
        FormatError: It is damaged.
    """
    content = files.content()
    try:
        return _read(files, content, merged=merged)
    except (KeyError, IndexError, TypeError, AttributeError, UnicodeEncodeError) as error:
        raise FormatError(f"{files.path} is not a byte-level BPE, or is damaged ({error!r}).") from error


def _read(files: TokenizerFiles, content: dict[str, Any], *, merged: bool) -> ByteLevel:
    path, model = files.path, cast("dict[str, Any]", content["model"])
    if model.get("type", "BPE") != "BPE":
        raise UnsupportedTokenizerError(path, f"its model is {shown(model['type'])}")
    for name in ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback"):
        if model.get(name):
            raise UnsupportedTokenizerError(path, f"its {name} is {shown(model[name])}")
    if content.get("normalizer") is not None:
        raise UnsupportedTokenizerError(
            path, f"it changes the text first (normalizer {shown(content['normalizer'].get('type'))})"
        )
    decoder = content.get("decoder")
    if decoder is not None and decoder["type"] != "ByteLevel":
        raise UnsupportedTokenizerError(path, f"its decoder is {shown(decoder['type'])}")
    pattern = _pattern(path, content.get("pre_tokenizer"))

    added_tokens = cast("list[dict[str, Any]]", content.get("added_tokens") or [])
    ids = _checked_vocab(path, model["vocab"], added_tokens)
    added = {token["content"] for token in added_tokens}
    bos, eos, pad = chosen_roles(files.roles(), ids)
    special_ids = {name: i for name, i in ids.items() if name in added or name in (bos, eos, pad)}
    try:
        ordinary = {unspell(name): i for name, i in ids.items() if name not in special_ids}
    except KeyError as error:
        raise UnsupportedTokenizerError(path, f"{error} in its vocabulary spells no byte") from None
    for byte in range(256):
        if bytes([byte]) not in ordinary:
            raise FormatError(f"{path} lacks bytes: 0x{byte:02X} has no token.")
    tokens, merges = list(ordinary), _merges(path, model["merges"], ordinary)
    order: list[bytes] | None = tokens
    if merged:
        order = order_of_merges(tokens, merges, whole_pieces=bool(model.get("ignore_merges")))
    elif merges:
        raise FormatError(f"{path} is damaged: it has merges.")
    if order is None:
        raise UnsupportedTokenizerError(
            path, "its merges are in an order that tiktoken's ranks cannot express"
        )
    for name in dict.fromkeys((bos, eos, pad)):
        if name not in special_ids:
            special_ids[name] = len(ordinary) + len(special_ids)
    names = {i: name.encode("utf-8") for name, i in special_ids.items()}
    of_id = names | {i: token for token, i in ordinary.items()}
    special = SpecialTokens(
        ids=dict(sorted(special_ids.items(), key=lambda item: item[1])), bos=bos, eos=eos, pad=pad
    )
    prefix, suffix = _template(path, content.get("post_processor"), special_ids)
    return ByteLevel(
        pattern=pattern,
        token_bytes=[of_id[i] for i in range(len(of_id))],
        ranks={token: rank for rank, token in enumerate(order)},
        special=special,
        prefix=prefix,
        suffix=suffix,
    )


def _checked_vocab(path: Path, vocab: dict[str, Any], added_tokens: list[dict[str, Any]]) -> dict[str, int]:
    """Return all tokens in order of their ids, which are 0, 1, 2 and so on."""
    ids = dict(vocab)
    for token in added_tokens:
        name, token_id = token["content"], token["id"]
        if not isinstance(name, str) or not name:
            raise FormatError(f"{path} is damaged: an added token is named {shown(name)}.")
        if ids.setdefault(name, token_id) != token_id:
            raise FormatError(
                f"{path} is damaged: {shown(name)} has the ids {shown(ids[name])} and {shown(token_id)}."
            )
    for name, token_id in ids.items():
        if not isinstance(token_id, int) or isinstance(token_id, bool) or not name:
            raise FormatError(f"{path} is damaged: the id of {shown(name)} is {shown(token_id)}.")
    ordered = sorted(ids.items(), key=lambda item: item[1])
    for expected, (name, token_id) in enumerate(ordered):
        if token_id != expected:
            raise FormatError(
                f"{path} is damaged or unusual: its ids are not consecutive from 0; {shown(name)} has the id "
                f"{shown(token_id)} where {expected} should come."
            )
    return dict(ordered)


def _merges(path: Path, listed: list[Any], ordinary: Mapping[bytes, int]) -> list[Pair]:
    merges: list[Pair] = []
    for entry in listed:
        parts: list[str] = entry.split(" ") if isinstance(entry, str) else entry
        try:
            left, right = (unspell(part) for part in parts)
        except (ValueError, KeyError):
            raise FormatError(f"{path} is damaged: {shown(entry)} is not a merge.") from None
        if left not in ordinary or right not in ordinary or left + right not in ordinary:
            raise FormatError(f"{path} is damaged: the merge {shown(entry)} is not of tokens into a token.")
        merges.append((left, right))
    return merges


def _pattern(path: Path, pre_tokenizer: Any) -> str:
    parts: list[dict[str, Any]] = []
    if pre_tokenizer is not None:
        parts = pre_tokenizer["pretokenizers"] if pre_tokenizer["type"] == "Sequence" else [pre_tokenizer]
    types = [part["type"] for part in parts]
    if types not in (["ByteLevel"], ["Split", "ByteLevel"]):
        raise UnsupportedTokenizerError(path, f"its pre-tokenizers are {shown(types)}")
    byte_level = parts[-1]
    if byte_level.get("add_prefix_space"):
        raise UnsupportedTokenizerError(path, "it adds a space before the text (add_prefix_space)")
    splits = byte_level.get("use_regex", True)
    if len(parts) == 1 and splits:
        return GPT2_PATTERN
    pattern = parts[0].get("pattern", {}).get("Regex")
    if len(parts) == 1 or splits or parts[0]["behavior"] != "Isolated" or parts[0].get("invert"):
        raise UnsupportedTokenizerError(path, "it does not split text by one regular expression")
    if not isinstance(pattern, str) or not _PORTABLE_PATTERN.fullmatch(pattern):
        raise UnsupportedTokenizerError(
            path, f"its split pattern {shown(pattern)} may mean something else to tiktoken"
        )
    return pattern


def _template(path: Path, processor: Any, ids: Mapping[str, int]) -> tuple[list[int], list[int]]:
    """Return the ids before and behind a text."""
    if processor is None or processor["type"] == "ByteLevel":
        return [], []
    if processor["type"] == "Sequence":
        parts = [part for part in processor["processors"] if part["type"] != "ByteLevel"]
        if len(parts) > 1:
            raise UnsupportedTokenizerError(path, "it has more than one post-processor")
        return _template(path, parts[0] if parts else None, ids)
    if processor["type"] != "TemplateProcessing":
        raise UnsupportedTokenizerError(path, f"its post-processor is {shown(processor['type'])}")
    before: list[int] = []
    after: list[int] = []
    side = before
    for item in processor["single"]:
        if "Sequence" in item:
            side = after
            continue
        for token_id in processor["special_tokens"][item["SpecialToken"]["id"]]["ids"]:
            if token_id not in ids.values():
                raise FormatError(
                    f"{path} is damaged: its template has the id {shown(token_id)}, not a special one."
                )
            side.append(token_id)
    return before, after
