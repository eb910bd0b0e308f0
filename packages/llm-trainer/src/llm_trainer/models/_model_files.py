"""The files of a model on disk: `config.json` and `model.safetensors`."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file  # pyright: ignore[reportUnknownVariableType]
from torch import Tensor

from llm_trainer._files import (
    check_version,
    json_sha256,
    read_json_object,
    shown,
    write_atomically,
    write_json,
)
from llm_trainer.config import ModelConfig
from llm_trainer.exceptions import ConfigurationError, FormatError

FORMAT_VERSION = 1
_CONFIG_HASH = "llm_trainer_config_sha256"
_TOKENIZER_HASH = "tokenizer_sha256"
_TIED = "head.weight"
_TIED_TO = "embedding.weight"


def write_model(
    directory: Path, config: ModelConfig, state: Mapping[str, Tensor], tokenizer_sha256: str | None = None
) -> None:
    """Write the weights, then the configuration, each atomically.

    The weights carry the hash of the configuration, and that the tokenizer's, so that a crash between two
    files leaves none that pass for a pair.

    Raises:
        OSError: A file cannot be written.
    """
    content: dict[str, Any] = {
        "model_type": "llm_trainer",
        "format_version": FORMAT_VERSION,
        "model": config.to_dict(),
    }
    if tokenizer_sha256 is not None:
        content[_TOKENIZER_HASH] = tokenizer_sha256
    kept = {
        name: tensor.detach().to("cpu").contiguous()
        for name, tensor in state.items()
        if not (config.tie_embeddings and name == _TIED)
    }
    metadata = {
        "format": "pt",
        "llm_trainer_format_version": str(FORMAT_VERSION),
        _CONFIG_HASH: json_sha256(content),
    }
    weights_path = directory / "model.safetensors"
    try:
        write_atomically(weights_path, lambda path: save_file(kept, path, metadata=metadata))
    except SafetensorError as error:
        # It has no number, so whether the disk is full is seen from the disk.
        needed = sum(tensor.numel() * tensor.element_size() for tensor in kept.values())
        full = shutil.disk_usage(directory).free < needed
        number = errno.ENOSPC if full else errno.EIO
        raise OSError(number, f"The weights cannot be written ({error})", str(weights_path)) from error
    write_json(directory / "config.json", content)


def check_tokenizer(directory: Path, sha256: str) -> None:
    """Compare a tokenizer with the one that the model in `directory` was saved with, if it was with one.

    Raises:
        FormatError: It is another one.
    """
    path = directory / "config.json"
    if read_json_object(path).get(_TOKENIZER_HASH, sha256) != sha256:
        raise FormatError(
            f"{path} belongs to another tokenizer than the one given: a save was cut short, or files of two "
            f"saves were mixed. Take all files from one save, or save the model again."
        )


def read_model(directory: Path) -> tuple[ModelConfig, dict[str, Tensor]]:
    """Return the configuration and the weights.

    Raises:
        FormatError: A file is missing, damaged, newer than this release, or of another kind of model.
    """
    config_path, weights_path = directory / "config.json", directory / "model.safetensors"
    content = read_json_object(config_path)
    if content.get("model_type") != "llm_trainer":
        raise FormatError(
            f"{config_path} describes a {shown(content.get('model_type'))} model, not one of llm-trainer."
        )
    check_version(config_path, content.get("format_version"), FORMAT_VERSION)
    try:
        config = ModelConfig.from_dict(content["model"])
    except (ConfigurationError, KeyError, TypeError) as error:
        raise FormatError(f"{config_path} does not describe a model: {error}") from error
    try:
        state = _load_weights(weights_path, config_path, content)
    except FileNotFoundError:
        raise FormatError(f"{weights_path} does not exist.") from None
    except (SafetensorError, OSError) as error:
        raise FormatError(
            f"{weights_path} is damaged: {error}. Restore it or save the model again."
        ) from error
    # Looked at before a model of that many is built, for a few digits can ask for any amount of work.
    if config.n_layers > len(state):
        raise FormatError(
            f"{weights_path} has {len(state)} tensors, too few for the {config.n_layers} layers of "
            f"{config_path.name}."
        )
    return config, state


def _load_weights(path: Path, config_path: Path, content: dict[str, Any]) -> dict[str, Tensor]:
    with cast("Any", safe_open)(path, framework="pt") as file:
        found = cast("dict[str, str] | None", file.metadata()) or {}
    # Weights of another writer have no hash; their names and shapes are checked all the same.
    expected = json_sha256(content)
    if found.get(_CONFIG_HASH, expected) != expected:
        raise FormatError(
            f"{path} was not saved with {config_path.name} beside it: a save was cut short, files of two "
            f"saves were mixed, or {config_path.name} was edited. Take both files from one save, or load "
            f"that one, change its `config`, and save it again."
        )
    return load_file(path)


def check_state(directory: Path, expected: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> None:
    """Compare the weights' names, shapes and types with the model's.

    Raises:
        FormatError: They are those of another model; the first difference is named.
    """
    path = directory / "model.safetensors"
    wanted = {name: tensor for name, tensor in expected.items() if name in state or name != _TIED}
    for name in sorted(wanted.keys() ^ state.keys()):
        raise FormatError(f"{path} {'lacks' if name in wanted else 'has an unexpected'} tensor {name!r}.")
    for name, tensor in wanted.items():
        if state[name].shape != tensor.shape or not state[name].is_floating_point():
            raise FormatError(
                f"{path}: {name!r} has shape {tuple(state[name].shape)} and type {state[name].dtype}, "
                f"but config.json calls for floating point of shape {tuple(tensor.shape)}."
            )


def untied(state: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """Return the weights with the tied one under both of its names."""
    return {**state, _TIED: state[_TIED_TO]} if config.tie_embeddings else dict(state)
