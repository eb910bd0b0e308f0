"""Training and validation data as a `DataConfig` describes them."""

from __future__ import annotations

import dataclasses
import logging
import re
from pathlib import Path

from llm_trainer._files import json_sha256, read_json_object, write_json
from llm_trainer.config import DataConfig
from llm_trainer.config._base import check_type
from llm_trainer.data._dataset import LanguageModelingDataset
from llm_trainer.data._folder import make_folder
from llm_trainer.data._sources import Source, find_dataset, find_files
from llm_trainer.data._store import VERSION, TokenStore, write_store
from llm_trainer.data._tokens import tokenize
from llm_trainer.exceptions import DataError, FormatError
from llm_trainer.tokenizer import Tokenizer, create_tokenizer, load_tokenizer

_logger = logging.getLogger(__name__)
_TRAINED_KINDS = ("bpe", "char")


@dataclasses.dataclass(frozen=True)
class Splits:
    """What `load_splits` returns."""

    tokenizer: Tokenizer
    """The tokenizer that was given, read, or trained on the training text."""
    train: LanguageModelingDataset
    """Rows to train on."""
    validation: LanguageModelingDataset | None
    """Rows to evaluate on; None where the configuration names none."""


def load_splits(
    config: DataConfig, tokenizer: Tokenizer | None = None, *, cache_dir: str | Path | None = None
) -> Splits:
    """Read the text that `config` names and turn it into rows.

    With a folder for it, tokens and a tokenizer that was trained are kept in files, whose names hold a hash
    of text, tokenizer and settings: as long as these stay the same, the text is only read to hash it, and
    what belongs to others is left alone. A damaged file is made anew. Several processes can share the folder.

    Args:
        config: What to read, and how.
        tokenizer: Used instead of the one of `config`.
        cache_dir: Folder of the files where `config.cache_dir` is None; if both are, all is held in memory.

    Raises:
        ConfigurationError: `config` is no `DataConfig`.
        DataError: A file, folder, data set, split or column is missing, or its first document is not text:
            before any work; what is found further on, when its turn comes.
        FormatError: `config.tokenizer` is a folder without a tokenizer.
        MissingPackageError: The data set takes a package that is not installed.
        OSError: The folder cannot be written.
    """
    check_type(config, DataConfig, "config")
    train_source, validation_source = checked_sources(config)
    chosen = config.cache_dir if config.cache_dir is not None else cache_dir
    cache = None if chosen is None else Path(chosen)
    if tokenizer is None and config.tokenizer not in _TRAINED_KINDS:
        if not Path(config.tokenizer).exists():
            raise DataError(
                f"DataConfig.tokenizer is {config.tokenizer!r}, which is no folder and none of "
                f"{', '.join(_TRAINED_KINDS)}."
            )
        tokenizer = load_tokenizer(config.tokenizer)
    if cache is None:
        if tokenizer is None:
            tokenizer = create_tokenizer(config.tokenizer)
            tokenizer.train(train_source.texts(), config.vocab_size)
        validation = None if validation_source is None else _in_memory(validation_source, tokenizer, config)
        return Splits(tokenizer, _in_memory(train_source, tokenizer, config), validation)
    # A folder that cannot be written to is found before the work, not after it.
    cache.mkdir(parents=True, exist_ok=True)
    text = _Text("train", train_source)
    if tokenizer is None:
        tokenizer = _cached_tokenizer(cache, text, config)
    validation = (
        None
        if validation_source is None
        else _cached_rows(cache, _Text("validation", validation_source), tokenizer, config)
    )
    return Splits(tokenizer, _cached_rows(cache, text, tokenizer, config), validation)


def training_source(data: DataConfig) -> Source:
    """Find the text to train on.

    Raises:
        DataError: It does not exist.
    """
    if data.train_file is not None:
        return find_files(data.train_file, data.file_patterns, data.text_column)
    return find_dataset(
        data.dataset_name, data.dataset_config, data.dataset_split, data.text_column, data.file_patterns
    )


def held_out(data: DataConfig) -> DataConfig | None:
    """Return a configuration whose training text is the text that `data` evaluates on; None without any."""
    if data.validation_file is not None:
        return dataclasses.replace(data, train_file=data.validation_file, validation_file=None)
    if data.train_file is None and data.validation_split is not None:
        return dataclasses.replace(data, dataset_split=data.validation_split, validation_split=None)
    return None


def checked_sources(data: DataConfig) -> tuple[Source, Source | None]:
    """Find the text to train and to evaluate on, and read the first document of each.

    Raises:
        DataError: One does not exist, is not text, or is empty.
    """
    validation = held_out(data)
    sources = training_source(data), None if validation is None else training_source(validation)
    for source in sources:
        if source is not None and not any(text.strip() for text in source.texts()):
            raise DataError(f"{source.name} is empty; there is nothing to read.")
    return sources


class _Text:
    """A source and what it holds now."""

    def __init__(self, role: str, source: Source) -> None:
        self.source = source
        self.description = source.describe()
        name = re.sub(r"[^A-Za-z0-9._-]+", "-", Path(source.name).name).strip(".-") or "text"
        self.label = f"{name[:40]}-{role}"

    def path(self, cache: Path, kind: str, *settings: object) -> Path:
        """Return the name of what is made of this text with these settings."""
        key = json_sha256([kind, VERSION, self.description["fingerprint"], *settings])
        return cache / f"{self.label}-{kind}-{key[:16]}"

    def check_unchanged(self) -> None:
        """Refuse what was made of text that changed under way: its name would promise something else.

        Raises:
            DataError: It did.
        """
        if self.source.describe()["fingerprint"] != self.description["fingerprint"]:
            raise DataError(
                f"{self.source.name} changed while it was read; try again when nothing writes to it."
            )

    def announce(self, target: Path, kind: str) -> None:
        others = sorted(path.name for path in target.parent.glob(f"{self.label}-{kind}-*"))
        _logger.info(
            "Preparing %s of %s in %s.%s",
            kind,
            self.source.name,
            target,
            f" Text, tokenizer or settings are not those of {', '.join(others)}; delete what is not wanted."
            if others
            else "",
        )


def _in_memory(source: Source, tokenizer: Tokenizer, config: DataConfig) -> LanguageModelingDataset:
    data = tokenize(source.texts(), tokenizer, config.min_length, config.preprocessing_num_workers)
    return LanguageModelingDataset.from_store(data, config.max_length, config.pack_sequences, config.packing)


def _cached_rows(
    cache: Path, text: _Text, tokenizer: Tokenizer, config: DataConfig
) -> LanguageModelingDataset:
    target = text.path(cache, "tokens", tokenizer.fingerprint(), config.min_length)

    def make(folder: Path) -> None:
        text.announce(target, "tokens")
        write_store(
            folder,
            text.source.texts(),
            tokenizer,
            min_length=config.min_length,
            num_threads=config.preprocessing_num_workers,
            source=text.description,
        )
        text.check_unchanged()

    def opened() -> TokenStore | None:
        try:
            return TokenStore.open(target) if target.exists() else None
        except FormatError as error:
            _logger.warning("Tokens are prepared again: %s", error)
            return None

    store = opened()
    if store is None:
        make_folder(target, make, is_good=lambda _: opened() is not None)
        store = TokenStore.open(target, verify=False)
    return LanguageModelingDataset.from_store(store, config.max_length, config.pack_sequences, config.packing)


def _cached_tokenizer(cache: Path, text: _Text, config: DataConfig) -> Tokenizer:
    target = text.path(cache, config.tokenizer, config.vocab_size)

    def make(folder: Path) -> None:
        text.announce(target, config.tokenizer)
        trained = create_tokenizer(config.tokenizer)
        trained.train(text.source.texts(), config.vocab_size)
        trained.save_pretrained(folder)
        write_json(
            folder / "trained.json",
            {"version": 1, "source": text.description, "fingerprint": trained.fingerprint()},
        )
        text.check_unchanged()

    def read() -> Tokenizer:
        tokenizer = load_tokenizer(target)
        if tokenizer.fingerprint() != read_json_object(target / "trained.json").get("fingerprint"):
            raise FormatError(f"{target} is damaged: its tokenizer is not the one that was written.")
        return tokenizer

    def is_good(_: Path) -> bool:
        try:
            read()
        except FormatError as error:
            if target.exists():
                _logger.warning("The tokenizer is trained again: %s", error)
            return False
        return True

    if not is_good(target):
        make_folder(target, make, is_good)
    return read()
