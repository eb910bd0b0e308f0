"""What stands beside the weights: configuration, tokenizer, licence."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from auto_round._files import read_json_object
from auto_round.exceptions import CheckpointError
from auto_round.export._shards import not_written

CONFIG = "config.json"
_INDEX_END = ".index.json"
_MOST_CONFIG_BYTES = 10_000_000
_MOST_BYTES = 100_000_000
"""Largest file that is copied; tokenizers have some 30 MB."""
_SUFFIXES = {".json", ".txt", ".model", ".jinja", ".md", ".tiktoken", ".bpe", ".vocab", ".yaml", ".yml"}
_NAMES = ("licen", "notice", "use_policy")
# A pickle and a zip archive, which is what torch.save writes, whatever the file's name.
_NOT_TEXT = (b"\x80", b"PK\x03\x04")


def copy_files(source: Path, target: Path) -> None:
    """Copy the small files of a checkpoint's folder that hold no weights and no code, byte by byte.

    Those are files of text (and tokenizers' `.model` files) at the top of the folder, of at most 100 MB:
    configuration, tokenizer, templates, licence and model card. Python files, pickles, hidden files, indexes
    of weights and folders are left out, and so are links that lead out of the folder, except to where the
    cache of the Hugging Face hub keeps the files of the same model.

    Raises:
        ExportError: A file cannot be read or written.
    """
    for path in sorted(source.iterdir()):
        if _is_wanted(path, source):
            try:
                with path.open("rb") as file:
                    if file.read(4).startswith(_NOT_TEXT):
                        continue
                shutil.copyfile(path, target / path.name)
            except OSError as error:
                raise not_written(target / path.name, error) from error


def write_config(target: Path, config: Mapping[str, Any]) -> None:
    """Write a `config.json`.

    Raises:
        ExportError: It cannot be written.
    """
    try:
        (target / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise not_written(target / CONFIG, error) from error


def read_config(folder: Path) -> dict[str, Any]:
    """Return a folder's `config.json`.

    Raises:
        CheckpointError: There is none, or it is none.
    """
    return read_json_object(folder / CONFIG, CheckpointError, _MOST_CONFIG_BYTES)


def save_tokenizer(tokenizer: Any, source: Path | None, target: Path) -> None:
    """Write a tokenizer's files by its own `save_pretrained`, where it has one.

    Does nothing for a tokenizer that was loaded from `source`, whose own files are copied as they are.
    """
    origin = getattr(tokenizer, "name_or_path", None)
    if not hasattr(tokenizer, "save_pretrained") or (
        source is not None and isinstance(origin, str) and Path(origin).resolve() == source.resolve()
    ):
        return
    with tempfile.TemporaryDirectory(prefix="auto-round-") as folder:
        tokenizer.save_pretrained(folder)
        copy_files(Path(folder), target)


def _is_wanted(path: Path, folder: Path) -> bool:
    name = path.name.lower()
    if name.startswith(".") or name.endswith(_INDEX_END) or not path.is_file():
        return False
    if path.suffix.lower() not in _SUFFIXES and not (name.startswith(_NAMES) and not path.suffix):
        return False
    if path.is_symlink():
        real, home = path.resolve(), folder.resolve()
        # The hub's cache: models--x/snapshots/REVISION/NAME leads to models--x/blobs/HASH.
        blobs = home.parent.parent / "blobs" if home.parent.name == "snapshots" else home
        if real.parent not in (home, blobs):
            return False
    return path.stat().st_size <= _MOST_BYTES
