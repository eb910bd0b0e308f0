"""Any registered model: `config.json` and `model.safetensors`."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
from bitcore.config import BitQuantConfig
from bitlayers.utils import deploy_layers
from torch import Tensor

from bitmodels.config import ModelConfig
from bitmodels.exceptions import BitLabError, CheckpointError
from bitmodels.formats._files import CONFIG, WEIGHTS, read_json, read_tensors, write_json, write_tensors
from bitmodels.formats._loading import fill, is_packed
from bitmodels.registry import MODEL_REGISTRY

if TYPE_CHECKING:
    from bitmodels.base import BitModelBase

__all__ = ["load", "save"]

_FORMAT, _VERSION = "bitmodels", 1
_Model = TypeVar("_Model", bound="BitModelBase")


def save(model: BitModelBase, folder: Path) -> None:
    """Write a checkpoint; see `BitModelBase.save_pretrained`."""
    name = type(model).registered_name
    if name is None or MODEL_REGISTRY.get(name) is not type(model):
        raise CheckpointError(
            f"{type(model).__name__} is not registered, so nothing could read its checkpoint; decorate it "
            "with register_model."
        )
    if type(model).config_class is not type(model.config) or not isinstance(model.config, ModelConfig):
        raise CheckpointError(
            f"the configuration of a {name} is a {type(model.config).__name__}, which cannot be stored; make "
            "it a ModelConfig and name its class as the model's config_class."
        )
    deployed = is_packed(model)
    tensors, shared = _once_each(model.state_dict())
    values: dict[str, Any] = {
        "format": _FORMAT,
        "format_version": _VERSION,
        "model": name,
        "config": model.config.to_dict(),
        "quant_config": model.get_quant_config(),
        "deployed": deployed,
        "shared": shared,
    }
    # Both files say what they are, so that two halves of different checkpoints are never taken for one.
    write_tensors(folder / WEIGHTS, tensors, {"format": "pt", _FORMAT: json.dumps(values, sort_keys=True)})
    write_json(folder / CONFIG, values)


def load(folder: Path, expected: type[_Model], device: torch.device | str) -> _Model:
    """Read a checkpoint; see `BitModelBase.from_pretrained`."""
    path = folder / CONFIG
    values = read_json(path)
    if values.get("format") != _FORMAT:
        raise CheckpointError(
            f"{path} is not of a bitmodels checkpoint; those of Hugging Face are read by "
            "bitmodels.formats.huggingface.load."
        )
    if values.get("format_version") != _VERSION:
        raise CheckpointError(
            f"{path} has format version {values.get('format_version')!r}; this release reads {_VERSION}."
        )
    kind = MODEL_REGISTRY[str(values.get("model"))]
    if not issubclass(kind, expected):
        raise CheckpointError(f"{folder} holds a {kind.__name__}, not a {expected.__name__}.")
    if kind.config_class is None:
        raise CheckpointError(f"{kind.__name__} has no config_class, so its checkpoint cannot be read.")
    try:
        config = kind.config_class.from_dict(values.get("config") or {})
        given = values.get("quant_config")
        quant_config = None if given is None else BitQuantConfig.from_dict(given)
    except (BitLabError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path}: {error}") from error
    tensors, metadata = read_tensors(folder / WEIGHTS, device)
    if metadata.get(_FORMAT) != json.dumps(values, sort_keys=True):
        raise CheckpointError(f"{path} and {WEIGHTS} beside it are not of one checkpoint.")
    deployed, names = values.get("deployed") is True, values.get("shared")
    if not isinstance(names, list):
        raise CheckpointError(f"{path} does not say which tensors have two names.")
    shared = {str(name) for name in cast("list[Any]", names)}

    def made(place: str) -> _Model:
        try:
            with torch.device(place):
                model = kind(config, quant_config)
                if deployed:
                    deploy_layers(model)
                return model
        except (RuntimeError, TypeError, OverflowError, MemoryError) as error:
            raise CheckpointError(f"no model can be made as {path} says: {error}") from error

    model = None
    if not shared:
        # A constructor that needs numbers fails on the meta device.
        with contextlib.suppress(CheckpointError):
            model = made("meta")
    if model is not None:
        fill(model, tensors, folder / WEIGHTS)
    # What it makes beside what is stored is left without numbers there.
    if model is None or any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers())):
        model = made("cpu")
        fill(model, tensors, folder / WEIGHTS, shared=shared)
    return model.to(device).eval()


def _once_each(state: dict[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """Return tensors without those that are others' under a second name, and these names."""
    seen: set[tuple[object, ...]] = set()
    tensors: dict[str, Tensor] = {}
    shared: list[str] = []
    for name, tensor in state.items():
        place = (tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride())
        if tensor.numel() and place in seen:
            shared.append(name)
        else:
            seen.add(place)
            tensors[name] = tensor
    return tensors, sorted(shared)
