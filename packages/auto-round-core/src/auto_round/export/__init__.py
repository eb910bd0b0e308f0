"""Writing quantised models in formats that others read."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from auto_round.config_manager import AutoRoundConfig, LayerSettings
from auto_round.exceptions import ConfigurationError
from auto_round.export import _auto_round, _fake
from auto_round.export._files_beside import save_tokenizer
from auto_round.export._shards import not_written
from auto_round.export._whole_folder import check_folder, whole_folder
from auto_round.quantization._results import ResultStore
from auto_round.quantization._source import FloatModel

__all__ = ["check_export", "check_folder", "export_model"]

_WRITERS = {"auto_round": _auto_round.write_auto_round, "fake": _fake.write_fake}


def check_export(
    config: AutoRoundConfig, layers: Mapping[str, LayerSettings], source: FloatModel | None = None
) -> None:
    """Refuse what cannot be exported, before anything is quantised.

    Args:
        config: Formats, and what is asked of weights and activations.
        layers: The layers that are to be quantised, by their full names.
        source: The model; where it is given, the layers' shapes are looked at too.

    Raises:
        ConfigurationError: A format is none that is written, cannot hold a layer, or
            `export.mixed_precision` is False and layers differ.
    """
    for name in config.export.formats:
        if name not in _WRITERS:
            raise ConfigurationError(
                f"export.export_format {name!r} is not written by this release; it writes "
                f"{' and '.join(_WRITERS)}."
            )
    if not config.export.mixed_precision:
        _check_alike(layers)
    if "auto_round" in config.export.formats:
        _auto_round.check_settings(config, layers)
        if source is not None:
            _auto_round.check_shapes(source, layers)


def export_model(
    format_name: str,
    source: FloatModel,
    store: ResultStore,
    config: AutoRoundConfig,
    folder: Path,
    tokenizer: Any = None,
    beside: Callable[[Path], None] | None = None,
) -> None:
    """Write a quantised model, with what else was in the checkpoint's folder but code and pickles.

    The folder appears under its name when it is whole and on disk; until then it has a hidden name beside
    that. Memory for one layer is taken beside what is there. A model that brings its own code needs that code
    put beside the export by hand.

    Args:
        format_name: auto_round or fake.
        source: The float model.
        store: The quantised layers.
        config: Has the size of files.
        folder: Where to; it must not be there, or be empty.
        tokenizer: Is saved too if it is none that was loaded from the checkpoint's folder.
        beside: Writes what else belongs into the folder that it is given.

    Raises:
        ConfigurationError: As for `check_export` with all that is known, or the folder holds something.
        ExportError: It cannot be written; nothing is left of it.
        CheckpointError: The float checkpoint cannot be read any more.
    """
    asked = config.copy()
    asked.update(export={"export_format": format_name})
    check_export(asked, store.layers, source)
    with whole_folder(folder) as temporary:
        _WRITERS[format_name](source, store, temporary, config.export.max_shard_bytes)
        save_tokenizer(tokenizer, source.folder, temporary)
        if beside is not None:
            try:
                beside(temporary)
            except OSError as error:
                raise not_written(folder, error) from error


def _check_alike(layers: Mapping[str, LayerSettings]) -> None:
    first: tuple[str, LayerSettings] | None = None
    for name, settings in layers.items():
        if first is None:
            first = name, settings
        elif settings != first[1]:
            raise ConfigurationError(
                f"export.mixed_precision is False, but {first[0]} has {first[1]} and {name} has {settings}; "
                "set it to True, or give all layers the same in quantization.layer_config."
            )
