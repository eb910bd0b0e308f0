"""The files of a model on disk: `config.json` and the weights, in one file or several."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from llm_trainer._files import (
    check_version,
    json_sha256,
    read_json_object,
    shown,
    write_atomically,
    write_json,
)
from llm_trainer._tensor_files import save_tensors
from llm_trainer.config import ModelConfig
from llm_trainer.exceptions import ConfigurationError, FormatError
from llm_trainer.models._hf_shards import (
    INDEX,
    SINGLE,
    TENSORS_HASH,
    StoredTensor,
    StoredWeights,
    plan_files,
    shard_bytes,
    tensors_sha256,
)

FORMAT_VERSION = 1
MODEL_TYPE = "llm_trainer"
_CONFIG_HASH = "llm_trainer_config_sha256"
_TOKENIZER_HASH = "tokenizer_sha256"
_TIED = "head.weight"
_TIED_TO = "embedding.weight"
# Those of a save, and the hidden ones that it has while it works.
_WEIGHTS_FILE = re.compile(
    r"(model(-\d{5,}-of-\d{5,})?\.safetensors(\.index\.json)?"
    r"|\.+model\b.*\.safetensors\b.*\.(staged|tmp))",
    re.ASCII,
)


def write_model(
    directory: Path,
    config: ModelConfig,
    state: Mapping[str, Tensor],
    *,
    max_shard_size: int | str,
    tokenizer_sha256: str | None = None,
) -> None:
    """Write the weights, then the configuration, then remove what an earlier save left over.

    The weights carry the hash of the configuration, and that the tokenizer's, so that a crash between two
    files leaves none that pass for a pair.

    Raises:
        ConfigurationError: `max_shard_size` is not a size.
        OSError: A file cannot be written, or would replace a model of transformers.
    """
    check_replaceable(directory, MODEL_TYPE)
    content: dict[str, Any] = {
        "model_type": MODEL_TYPE,
        "format_version": FORMAT_VERSION,
        "model": config.to_dict(),
    }
    if tokenizer_sha256 is not None:
        content[_TOKENIZER_HASH] = tokenizer_sha256
    metadata = {"llm_trainer_format_version": str(FORMAT_VERSION), _CONFIG_HASH: json_sha256(content)}
    written = write_weights(directory, without_tied(state, config), metadata, max_shard_size)
    write_json(directory / "config.json", content)
    remove_other_weights(directory, written)


def check_replaceable(directory: Path, model_type: str) -> None:
    """Keep a model of ours from replacing one of transformers in the same folder, and the other way round.

    Raises:
        FileExistsError: It would.
    """
    try:
        found: object = read_json_object(directory / "config.json").get("model_type")
    except FormatError:
        return
    if isinstance(found, str) and (found == MODEL_TYPE) != (model_type == MODEL_TYPE):
        raise FileExistsError(
            f"{directory} holds a {shown(found)} model, which one of type {model_type!r} would replace; "
            f"choose another folder."
        )


def write_weights(
    directory: Path,
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str],
    max_shard_size: int | str,
    *,
    before_replacing: Callable[[], None] = lambda: None,
) -> set[str]:
    """Write all files under other names first, and replace earlier ones once all are complete.

    Args:
        directory: Folder, made if it is missing.
        tensors: What to write.
        metadata: What each file is to carry besides the hash of its tensors.
        max_shard_size: Most bytes of a file; see `TransformerLM.save_pretrained`.
        before_replacing: Called when everything is written and nothing replaced.

    Returns:
        The names of the files.

    Raises:
        ConfigurationError: `max_shard_size` is not a size.
        OSError: A file cannot be written; it is named, and those that were there before are whole.
    """
    plan = plan_files(tensors, shard_bytes(max_shard_size))
    hashes: dict[str, str] = {}
    try:
        for file_name, names in plan.items():
            shard = {name: tensors[name].detach().to("cpu").contiguous() for name in names}
            hashes[file_name] = tensors_sha256(shard)
            _stage(
                directory / file_name, shard, {"format": "pt", **metadata, TENSORS_HASH: hashes[file_name]}
            )
        before_replacing()
        for file_name in plan:
            _staged(directory / file_name).replace(directory / file_name)
    finally:
        for file_name in plan:
            _staged(directory / file_name).unlink(missing_ok=True)
    if SINGLE in plan:
        return set(plan)
    index = {
        "metadata": {"total_size": sum(map(_bytes, tensors.values())), TENSORS_HASH: hashes},
        "weight_map": {name: file_name for file_name, names in plan.items() for name in names},
    }
    write_json(directory / INDEX, index)
    return {*plan, INDEX}


def _stage(path: Path, shard: dict[str, Tensor], metadata: dict[str, str]) -> None:
    write_atomically(_staged(path), lambda temporary: save_tensors(temporary, shard, metadata, target=path))


def _staged(path: Path) -> Path:
    return path.with_name(f".{path.name}.staged")


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def remove_other_weights(directory: Path, kept: set[str]) -> None:
    """Remove the weights of earlier saves, and what a save that was killed left of its own."""
    # The index first, so that none is left that names missing files.
    for path in sorted(directory.iterdir(), key=lambda path: path.name != INDEX):
        if path.name not in kept and _WEIGHTS_FILE.fullmatch(path.name):
            path.unlink()


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


def read_model(directory: Path) -> tuple[ModelConfig, StoredWeights]:
    """Return the configuration and the weights, whose values are not read yet.

    Raises:
        FormatError: A file is missing, damaged, newer than this release, or of another kind of model.
    """
    config_path = directory / "config.json"
    content = read_json_object(config_path)
    if content.get("model_type") != MODEL_TYPE:
        raise FormatError(
            f"{config_path} describes a {shown(content.get('model_type'))} model, not one of llm-trainer; "
            f"TransformerLM.from_hf reads those of Llama and GPT-2."
        )
    check_version(config_path, content.get("format_version"), FORMAT_VERSION)
    try:
        config = ModelConfig.from_dict(content["model"])
    except (ConfigurationError, KeyError, TypeError) as error:
        raise FormatError(f"{config_path} does not describe a model: {error}") from error
    weights = StoredWeights(directory)
    expected = json_sha256(content)
    for path, metadata in weights.metadata.items():
        # Weights of another writer have no hash; their names and shapes are checked all the same.
        if metadata.get(_CONFIG_HASH, expected) != expected:
            raise FormatError(
                f"{path} was not saved with {config_path.name} beside it: a save was cut short, files of two "
                f"saves were mixed, or {config_path.name} was edited. Take both files from one save, or load "
                f"that one, change its `config`, and save it again."
            )
    check_layers(weights, config)
    return config, weights


def check_layers(weights: StoredWeights, config: ModelConfig) -> None:
    """Compare the number of layers with that of the tensors.

    To be called before a model of that many layers is built, for a few digits can ask for any amount of work.

    Raises:
        FormatError: There are fewer tensors than layers.
    """
    if config.n_layers > len(weights.tensors):
        raise FormatError(
            f"{weights.path} has {len(weights.tensors)} tensors, too few for the {config.n_layers} layers of "
            f"config.json."
        )


def check_state(weights: StoredWeights, expected: Mapping[str, Tensor], config: ModelConfig) -> None:
    """Compare the weights' names, shapes and types with the model's.

    Raises:
        FormatError: They are those of another model; the first difference is named.
    """
    found = weights.tensors
    optional = {_TIED} if config.tie_embeddings else set[str]()
    for name in sorted((expected.keys() ^ found.keys()) - optional):
        path = found[name].path if name in found else weights.path
        raise FormatError(f"{path} {'has an unexpected' if name in found else 'lacks'} tensor {name!r}.")
    for name, tensor in expected.items():
        if name in found:
            check_tensor(name, found[name], tuple(tensor.shape))


def check_tensor(name: str, found: StoredTensor, shape: tuple[int, ...]) -> None:
    """Compare one tensor's shape and type with the model's.

    Raises:
        FormatError: It has another shape, or is not of floating point.
    """
    if found.shape != shape or not found.is_floating_point:
        raise FormatError(
            f"{found.path}: {name!r} has shape {found.shape} and type {found.type_name}, but config.json "
            f"calls for floating point of shape {shape}."
        )


def without_tied(state: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """Return the weights with the tied one under one of its names."""
    return {name: value for name, value in state.items() if not (config.tie_embeddings and name == _TIED)}


def untied(state: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """Return the weights with the tied one under both of its names."""
    return {**state, _TIED: state[_TIED_TO]} if config.tie_embeddings else dict(state)
