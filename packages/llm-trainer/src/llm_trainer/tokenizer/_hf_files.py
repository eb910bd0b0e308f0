"""The files of a tokenizer on disk: Hugging Face's `tokenizer.json` and `tokenizer_config.json`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from llm_trainer._files import check_version, read_json_object, shown, write_json
from llm_trainer.exceptions import FormatError
from llm_trainer.tokenizer._byte_tokens import spell
from llm_trainer.tokenizer._merges import Pair
from llm_trainer.tokenizer._special import SpecialTokens

FORMAT_VERSION = 2
_VERSION_KEY = "llm_trainer_format_version"
_KIND_KEY = "llm_trainer_tokenizer"
# The largest vocabularies in use make files of 35 MB.
_LARGEST_FILE_BYTES = 1 << 28


@dataclass(frozen=True)
class TokenizerFiles:
    """What a folder holds, before it is understood."""

    path: Path
    """The `tokenizer.json`."""
    kind: str | None
    """Which of our tokenizers wrote it; None for other people's."""
    config: dict[str, Any]
    """The `tokenizer_config.json`, over the `special_tokens_map.json` of older folders."""

    def content(self) -> dict[str, Any]:
        """Read the `tokenizer.json`."""
        if self.path.exists() and self.path.stat().st_size > _LARGEST_FILE_BYTES:
            raise FormatError(
                f"{self.path} has {self.path.stat().st_size:,} bytes; no tokenizer is larger than "
                f"{_LARGEST_FILE_BYTES:,}."
            )
        return read_json_object(self.path)

    def roles(self) -> dict[str, str | None]:
        """Return the names of the tokens that begin, end and pad, as far as the configuration says."""
        return {role: _token_name(self.config.get(role)) for role in ("bos_token", "eos_token", "pad_token")}


def find_files(location: str | Path) -> TokenizerFiles:
    """Look at a folder, or at a `tokenizer.json` itself.

    Raises:
        FormatError: There is no `tokenizer.json`, or its configuration is damaged or newer than this release.
    """
    path = Path(location)
    if not path.is_file():
        path /= "tokenizer.json"
    if not path.is_file():
        raise FormatError(f"{path} does not exist.")
    config_path = path.with_name("tokenizer_config.json")
    config: dict[str, Any] = {}
    # Older folders name the special tokens in a file of their own.
    for name in ("special_tokens_map.json", config_path.name):
        if (path.parent / name).exists():
            config |= read_json_object(path.parent / name)
    kind = None
    if _VERSION_KEY in config:
        check_version(config_path, config[_VERSION_KEY], FORMAT_VERSION)
        # Version 1 knew one kind only.
        kind = config.get(_KIND_KEY, "bpe")
        if not isinstance(kind, str):
            raise FormatError(f"{config_path} names no tokenizer, but {shown(kind)}.")
    return TokenizerFiles(path, kind, config)


def _token_name(value: object) -> str | None:
    # A plain string, or a description with the string in it.
    if isinstance(value, dict):
        value = cast("dict[str, object]", value).get("content")
    return value if isinstance(value, str) and value else None


def write_byte_level(
    directory: Path,
    kind: str,
    *,
    token_bytes: Sequence[bytes],
    merges: Sequence[Pair],
    whole_pieces: bool,
    pattern: str,
    special: SpecialTokens,
    prefix: Sequence[int],
    suffix: Sequence[int],
) -> None:
    """Write both files of a tokenizer that splits text at `pattern` and merges bytes.

    Encoding there puts `prefix` and `suffix` around a text, as ours does.
    """
    names = {token_id: name for name, token_id in special.ids.items()}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
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
            for token, token_id in special.ids.items()
        ],
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]},
        "post_processor": _template([names[i] for i in prefix], [names[i] for i in suffix], special),
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": whole_pieces,
            "vocab": {names.get(i) or spell(token): i for i, token in enumerate(token_bytes)},
            "merges": [(spell(left), spell(right)) for left, right in merges],
        },
    }
    write_json(directory / "tokenizer.json", tokenizer, indent=None)
    write_config(directory, kind, special)


def write_config(directory: Path, kind: str, special: SpecialTokens) -> None:
    """Write `tokenizer_config.json`."""
    write_json(
        directory / "tokenizer_config.json",
        {
            _VERSION_KEY: FORMAT_VERSION,
            _KIND_KEY: kind,
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": special.bos,
            "eos_token": special.eos,
            "pad_token": special.pad,
            "clean_up_tokenization_spaces": False,
        },
    )


def _template(prefix: Sequence[str], suffix: Sequence[str], special: SpecialTokens) -> dict[str, Any] | None:
    if not prefix and not suffix:
        return None
    before, after = (
        [{"SpecialToken": {"id": name, "type_id": 0}} for name in part] for part in (prefix, suffix)
    )
    text_a, text_b = ({"Sequence": {"id": name, "type_id": 0}} for name in "AB")
    return {
        "type": "TemplateProcessing",
        "single": [*before, text_a, *after],
        "pair": [*before, text_a, text_b, *after],
        "special_tokens": {
            name: {"id": name, "ids": [special.ids[name]], "tokens": [name]}
            for name in dict.fromkeys([*prefix, *suffix])
        },
    }
