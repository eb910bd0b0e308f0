"""The files of a model on disk: `config.json` and `model.safetensors`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file  # pyright: ignore[reportUnknownVariableType]
from torch import Tensor

from llm_trainer._files import check_version, read_json_object, write_atomically, write_json
from llm_trainer.config import ModelConfig
from llm_trainer.exceptions import ConfigurationError, FormatError

FORMAT_VERSION = 1
_TIED = "head.weight"
_TIED_TO = "embedding.weight"


def write_model(directory: Path, config: ModelConfig, state: Mapping[str, Tensor]) -> None:
    """Write the weights, then the configuration, each atomically."""
    kept = {
        name: tensor.detach().to("cpu").contiguous()
        for name, tensor in state.items()
        if not (config.tie_embeddings and name == _TIED)
    }
    write_atomically(
        directory / "model.safetensors",
        lambda path: save_file(
            kept, path, metadata={"format": "pt", "llm_trainer_format_version": str(FORMAT_VERSION)}
        ),
    )
    write_json(
        directory / "config.json",
        {"model_type": "llm_trainer", "format_version": FORMAT_VERSION, "model": config.to_dict()},
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
            f"{config_path} describes a {content.get('model_type')!r} model, not one of llm-trainer."
        )
    check_version(config_path, content.get("format_version"), FORMAT_VERSION)
    try:
        config = ModelConfig.from_dict(content["model"])
    except (ConfigurationError, KeyError, TypeError) as error:
        raise FormatError(f"{config_path} does not describe a model: {error}") from error
    try:
        return config, load_file(weights_path)
    except FileNotFoundError:
        raise FormatError(f"{weights_path} does not exist.") from None
    except (SafetensorError, OSError) as error:
        raise FormatError(
            f"{weights_path} is damaged: {error}. Restore it or save the model again."
        ) from error


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
