"""Checkpoints that transformers reads and writes: the door to the rest of the world."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from llm_trainer._files import read_json_object, write_json
from llm_trainer.config import ModelConfig
from llm_trainer.exceptions import FormatError, ModelConfigurationError
from llm_trainer.models import _model_files
from llm_trainer.models._hf_config import architecture_of, hf_config, read_hf_config
from llm_trainer.models._hf_shards import INDEX, SINGLE, StoredWeights
from llm_trainer.models._hf_tensors import Parameter, base_prefix, is_constant


class SavedTokenizer(Protocol):
    """What an export needs of a tokenizer."""

    @property
    def vocab_size(self) -> int:
        """Number of token ids."""
        ...

    @property
    def bos_token_id(self) -> int | None:
        """Begins a text."""
        ...

    @property
    def eos_token_id(self) -> int | None:
        """Ends a text."""
        ...

    @property
    def pad_token_id(self) -> int | None:
        """Fills a batch."""
        ...

    def save_pretrained(self, save_directory: str | Path) -> object:
        """Write `tokenizer.json` and `tokenizer_config.json`."""
        ...


def write_checkpoint(
    directory: Path,
    config: ModelConfig,
    state: Mapping[str, Tensor],
    tokenizer: SavedTokenizer | None,
    max_shard_size: int | str,
) -> None:
    """Write the files; `config.json` goes before anything is replaced and comes back last.

    See `TransformerLM.export_hf` for what is raised.
    """
    architecture = architecture_of(config)
    if tokenizer is not None and tokenizer.vocab_size > config.vocab_size:
        raise ModelConfigurationError(
            f"The tokenizer has {tokenizer.vocab_size} tokens, but the model's vocab_size is "
            f"{config.vocab_size}: it is not the one that the model was trained with."
        )
    config_path = directory / "config.json"
    _model_files.check_replaceable(directory, architecture)
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    token_ids: dict[str, int | None] = {
        name: None if tokenizer is None else getattr(tokenizer, name) for name in names
    }
    tensors: dict[str, Tensor] = {}
    for name, tensor in _model_files.without_tied(state, config).items():
        tensors |= Parameter(architecture, config, name, tensor.shape).split(tensor)
    written = _model_files.write_weights(
        directory, tensors, {}, max_shard_size, before_replacing=lambda: config_path.unlink(missing_ok=True)
    )
    if tokenizer is not None:
        tokenizer.save_pretrained(directory)
    known_ids = {name: number for name, number in token_ids.items() if number is not None}
    write_json(directory / "generation_config.json", known_ids)
    dtype = str(state["embedding.weight"].dtype).removeprefix("torch.")
    write_json(config_path, hf_config(config, dtype, token_ids))
    _model_files.remove_other_weights(directory, written)


class Checkpoint:
    """A folder of transformers' files, whose weights are read when `state` asks for them.

    Raises:
        FormatError: A file is missing or damaged.
        ModelConfigurationError: It holds a model that ours cannot be.
    """

    def __init__(self, directory: Path) -> None:
        path = directory / "config.json"
        self._architecture, self.config = read_hf_config(path, read_json_object(path))
        self._weights = _stored(directory)
        _model_files.check_layers(self._weights, self.config)

    def state(
        self, expected: Mapping[str, Tensor], dtype: torch.dtype | None, device: str | torch.device
    ) -> dict[str, Tensor]:
        """Return the weights under our names.

        Args:
            expected: The model's state, of which shapes are read.
            dtype: Type to convert to; None keeps each one's.
            device: Where to put them.

        Raises:
            FormatError: They do not fit the configuration, or are damaged.
        """
        parameters = [
            Parameter(self._architecture, self.config, name, tensor.shape)
            for name, tensor in _model_files.without_tied(expected, self.config).items()
        ]
        pieces = {name: shape for parameter in parameters for name, shape in parameter.pieces.items()}
        renamed = self._check(pieces)
        values = self._weights.read(dtype, device)
        if self.config.tie_embeddings and "lm_head.weight" in values:
            (embedding,) = (parameter for parameter in parameters if parameter.name == "embedding.weight")
            (shared,) = embedding.pieces
            if not torch.equal(values["lm_head.weight"], values[renamed[shared]]):
                raise FormatError(
                    f"{self._weights.path}: lm_head.weight is not the embedding, but config.json says "
                    f"that they are tied."
                )
        # Each is let go as it is joined, so that never more than one is held twice.
        return {
            parameter.name: parameter.join({piece: values.pop(renamed[piece]) for piece in parameter.pieces})
            for parameter in parameters
        }

    def _check(self, pieces: Mapping[str, tuple[int, ...]]) -> dict[str, str]:
        """Compare the headers with what the model needs; return the stored names of the pieces."""
        stored, prefix = self._weights.tensors, base_prefix(self._architecture)
        bare = not any(name.startswith(prefix) for name in stored)
        renamed = {piece: piece.removeprefix(prefix) if bare else piece for piece in pieces}
        ignored = {"lm_head.weight"} if self.config.tie_embeddings else set[str]()
        unexpected = stored.keys() - renamed.values() - ignored
        for name in sorted(name for name in unexpected if not is_constant(name)):
            raise FormatError(f"{stored[name].path} has an unexpected tensor {name!r}.")
        for piece, name in sorted(renamed.items()):
            if name not in stored:
                raise FormatError(f"{self._weights.path} lacks tensor {name!r}.")
            _model_files.check_tensor(name, stored[name], pieces[piece])
        return renamed


def _stored(directory: Path) -> StoredWeights:
    if not (directory / SINGLE).exists() and not (directory / INDEX).exists():
        pickled = sorted(
            path.name for path in directory.iterdir() if path.suffix in {".bin", ".pt", ".pth", ".ckpt"}
        )
        if pickled:
            raise FormatError(
                f"{directory / pickled[0]} is pickled: reading it could run any program, so only safetensors "
                f"are read. Load it with transformers where you trust it, and call save_pretrained there."
            )
    return StoredWeights(directory)
