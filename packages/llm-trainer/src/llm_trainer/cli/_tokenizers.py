"""The tokenizer of a run: kept, or trained when the text is another one."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from llm_trainer._files import read_json_object, write_json
from llm_trainer.cli._settings import TRAINED_KINDS
from llm_trainer.config import DataConfig
from llm_trainer.data._folder import make_folder
from llm_trainer.data._splits import training_source
from llm_trainer.exceptions import ConfigurationError, FormatError
from llm_trainer.tokenizer import Tokenizer, create_tokenizer, load_tokenizer

_logger = logging.getLogger(__name__)
_RECORD = "trained.json"


def tokenizer_of(data: DataConfig, folder: Path, *, force: bool = False) -> Tokenizer:
    """Return the tokenizer that `data` asks for.

    Args:
        data: A folder with a tokenizer, or the kind and vocabulary size of one to train on its text.
        folder: Where a trained one is kept; it is used again for the same text, kind and size.
        force: Train even so.

    Raises:
        ConfigurationError: There is no such folder or kind.
        DataError: The text is missing or not text.
    """
    if data.tokenizer not in TRAINED_KINDS:
        if not Path(data.tokenizer).exists():
            raise ConfigurationError(
                f"data.tokenizer is {data.tokenizer!r}, which is no folder and none of "
                f"{', '.join(TRAINED_KINDS)}."
            )
        return load_tokenizer(data.tokenizer)
    source = training_source(data)
    wanted = {
        "version": 1,
        "kind": data.tokenizer,
        "vocab_size": data.vocab_size,
        "text": source.describe()["fingerprint"],
    }
    if not force:
        kept = _kept(folder, wanted)
        if kept is not None:
            return kept
    _logger.info("Training a %s tokenizer of %s tokens on %s.", data.tokenizer, data.vocab_size, source.name)
    tokenizer = create_tokenizer(data.tokenizer)
    tokenizer.train(source.texts(), data.vocab_size)

    def write(place: Path) -> None:
        tokenizer.save_pretrained(place)
        write_json(place / _RECORD, wanted | {"tokenizer": tokenizer.fingerprint()})

    make_folder(folder, write)
    return tokenizer


def _kept(folder: Path, wanted: dict[str, Any]) -> Tokenizer | None:
    if not folder.exists():
        return None
    try:
        found = read_json_object(folder / _RECORD)
        tokenizer = load_tokenizer(folder)
    except FormatError as error:
        _logger.warning("The tokenizer is trained again: %s", error)
        return None
    changed = [name for name in wanted if found.get(name) != wanted[name]]
    if changed:
        _logger.info("The tokenizer in %s is replaced: its %s changed.", folder, " and ".join(changed))
        return None
    if found.get("tokenizer") != tokenizer.fingerprint():
        _logger.warning("The tokenizer in %s is damaged; it is trained again.", folder)
        return None
    return tokenizer
