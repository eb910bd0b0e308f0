"""Tokenizers by name, and from folders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from llm_trainer._files import shown
from llm_trainer.exceptions import FormatError, TokenizerError
from llm_trainer.tokenizer._base import Tokenizer
from llm_trainer.tokenizer._bpe import BPETokenizer
from llm_trainer.tokenizer._byte_level import UnsupportedTokenizerError
from llm_trainer.tokenizer._char import CharTokenizer
from llm_trainer.tokenizer._hf import HFTokenizer
from llm_trainer.tokenizer._hf_files import find_files

_KINDS: dict[str, type[BPETokenizer] | type[CharTokenizer] | type[HFTokenizer]] = {
    "bpe": BPETokenizer,
    "char": CharTokenizer,
    "hf": HFTokenizer,
}


def create_tokenizer(kind: str, path: str | Path | None = None, **options: Any) -> Tokenizer:
    """Make a tokenizer: a new one to train, or the one in `path`.

    Args:
        kind: "bpe" (`BPETokenizer`), "char" (`CharTokenizer`) or "hf" (`HFTokenizer`, which needs `path`).
        path: A folder with a `tokenizer.json`, or that file.
        options: What the class takes to make a new one: `special_tokens`.

    Raises:
        TokenizerError: The kind or an option is unknown, or options come with a path.
        FormatError: What is in `path` cannot be read, or not as this kind.
    """
    if kind not in _KINDS:
        raise TokenizerError(f"There is no tokenizer {shown(kind)}; there are {', '.join(_KINDS)}.")
    chosen = _KINDS[kind]
    if path is not None or chosen is HFTokenizer:
        if path is None:
            raise TokenizerError('create_tokenizer("hf") needs the path of a tokenizer.json.')
        if options:
            raise TokenizerError(
                f"{', '.join(options)}: options are for a new tokenizer, not for one in a path."
            )
        return chosen.from_pretrained(path)
    unknown = options.keys() - {"special_tokens"}
    if unknown:
        raise TokenizerError(f"There is no option {', '.join(sorted(unknown))}; there is special_tokens.")
    return chosen(**options)


def load_tokenizer(directory: str | Path) -> Tokenizer:
    """Read the tokenizer in a folder, of whichever kind the folder says it is.

    Other people's folders give a `BPETokenizer` where that encodes exactly as they do, else an `HFTokenizer`.

    Raises:
        FormatError: A file is missing, damaged or newer than this release.
        MissingPackageError: The folder needs `tokenizers`, which is not installed.
    """
    files = find_files(directory)
    if files.kind is not None:
        if files.kind not in _KINDS:
            raise FormatError(f"{files.path} is of an unknown kind, {shown(files.kind)}.")
        return _KINDS[files.kind].from_pretrained(directory)
    try:
        return BPETokenizer.from_pretrained(directory)
    except UnsupportedTokenizerError:
        return HFTokenizer.from_pretrained(directory)
