"""The files of a tokenizer on disk: Hugging Face's `tokenizer.json` and `tokenizer_config.json`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from llm_trainer._files import check_version, read_json_object, write_json
from llm_trainer.exceptions import FormatError

FORMAT_VERSION = 1
_VERSION_KEY = "llm_trainer_format_version"


def _byte_characters() -> list[str]:
    """Return the character that spells each byte in a vocabulary, as GPT-2 published it.

    Bytes that are printable in Latin-1 are themselves; the others are numbered from U+0100.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]


_CHARACTER_OF_BYTE = _byte_characters()
_BYTE_OF_CHARACTER = {character: byte for byte, character in enumerate(_CHARACTER_OF_BYTE)}


def _spell(token: bytes) -> str:
    return "".join(_CHARACTER_OF_BYTE[byte] for byte in token)


def token_strings(ranks: Mapping[bytes, int]) -> dict[str, int]:
    """Spell each token of bytes in printable characters."""
    return {_spell(token): rank for token, rank in ranks.items()}


def _merges(ranks: Mapping[bytes, int]) -> list[tuple[str, str]]:
    """List every pair of tokens that joins into a token, in order of the result's rank.

    tiktoken joins any two neighbours whose concatenation is a token, so all the splits of a token belong
    here.
    """
    merges: list[tuple[int, int, int, str, str]] = []
    for token, rank in ranks.items():
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            left_rank, right_rank = ranks.get(left), ranks.get(right)
            if left_rank is not None and right_rank is not None:
                merges.append((rank, left_rank, right_rank, _spell(left), _spell(right)))
    return [(left, right) for _, _, _, left, right in sorted(merges)]


def write_files(
    directory: Path,
    ranks: Mapping[bytes, int],
    special_ids: Mapping[str, int],
    pattern: str,
    *,
    bos: str,
    eos: str,
    pad: str,
) -> None:
    """Write both files; encoding there begins with `bos`, as `BPETokenizer.encode` does."""
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    begin = {"SpecialToken": {"id": bos, "type_id": 0}}
    text_a, text_b = ({"Sequence": {"id": name, "type_id": 0}} for name in "AB")
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {
                "id": token_id,
                "content": token,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": True,
            }
            for token, token_id in special_ids.items()
        ],
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]},
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [begin, text_a],
            "pair": [begin, text_a, text_b],
            "special_tokens": {bos: {"id": bos, "ids": [special_ids[bos]], "tokens": [bos]}},
        },
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            # tiktoken looks a whole word up before it merges.
            "ignore_merges": True,
            "vocab": token_strings(ranks) | dict(special_ids),
            "merges": _merges(ranks),
        },
    }
    write_json(directory / "tokenizer.json", tokenizer, indent=None)
    write_json(
        directory / "tokenizer_config.json",
        {
            _VERSION_KEY: FORMAT_VERSION,
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": bos,
            "eos_token": eos,
            "pad_token": pad,
            "clean_up_tokenization_spaces": False,
        },
    )


def read_files(directory: Path, special_tokens: Sequence[str], pattern: str) -> dict[bytes, int]:
    """Return the ranks of the tokens of bytes from files that `write_files` wrote.

    Raises:
        FormatError: A file is missing, damaged, newer than this release, or of another kind of tokenizer.
    """
    config_path, path = directory / "tokenizer_config.json", directory / "tokenizer.json"
    check_version(config_path, read_json_object(config_path).get(_VERSION_KEY), FORMAT_VERSION)
    content = read_json_object(path)
    try:
        vocab = cast("dict[str, int]", content["model"]["vocab"])
        found_pattern = content["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"]
        ordered = sorted(vocab.items(), key=lambda item: item[1])
        count = len(ordered) - len(special_tokens)
        tokens = [bytes(_BYTE_OF_CHARACTER[character] for character in token) for token, _ in ordered[:count]]
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        raise FormatError(f"{path} is not a tokenizer that llm-trainer wrote ({error!r}).") from error
    _require(found_pattern == pattern, path, "its split pattern is another one")
    _require(
        [rank for _, rank in ordered] == list(range(len(ordered))), path, "its ids are not consecutive from 0"
    )
    _require(
        [token for token, _ in ordered[count:]] == list(special_tokens), path, "its special tokens are others"
    )
    ranks = {token: rank for rank, token in enumerate(tokens)}
    _require(
        len(ranks) == count and all(bytes([byte]) in ranks for byte in range(256)), path, "it lacks bytes"
    )
    return ranks


def _require(condition: Any, path: Path, problem: str) -> None:
    if not condition:
        raise FormatError(f"{path} is not a tokenizer that llm-trainer wrote, or is damaged: {problem}.")
