"""The state of a run in a file: nested values with tensors in them, and every source of random numbers."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.optim import Optimizer

from llm_trainer._tensor_files import save_tensors
from llm_trainer.exceptions import CheckpointError, TrainingError

_KEY = "state"


def save_state(path: Path, state: Mapping[str, Any]) -> None:
    """Write nested dictionaries, lists and tuples of tensors and plain values as one safetensors file.

    The tensors are its body; the rest, with the tensors' names in their places, is JSON in its metadata.
    Numbers come back to the bit. A tensor that is there under several names, as tied weights are, is written
    once.

    Raises:
        OSError: The file cannot be written.
    """
    stored = _Stored()
    layout = json.dumps(_take_out(state, stored))
    # A file without a tensor is not one.
    stored.tensors.setdefault("", torch.zeros(0))
    save_tensors(path, stored.tensors, {_KEY: layout})


def load_state(path: Path, *, with_tensors: bool = True) -> dict[str, Any]:
    """Read what `save_state` wrote; without its tensors, each of which is then None, it is little to read.

    Raises:
        CheckpointError: The file is missing or something else.
    """
    try:
        with cast("Any", safe_open)(path, framework="pt") as file:
            layout = json.loads(file.metadata()[_KEY])
            return cast("dict[str, Any]", _put_back(layout, file if with_tensors else None))
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing.") from None
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{path} does not hold the state of a run: {error!r}.") from error


class _Stored:
    """Tensors of a file, of which no two may share memory."""

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}
        self._names: dict[tuple[object, ...], str] = {}
        self._memory: set[int] = set()

    def add(self, tensor: Tensor) -> str:
        """Return the tensor's name, which is that of an equal view of the same memory if there was one."""
        memory = tensor.untyped_storage().data_ptr()
        # Values that have no memory, such as empty ones, are told apart by themselves.
        view = (tensor.device, memory or id(tensor), tensor.storage_offset(), tensor.shape, tensor.stride())
        name = self._names.setdefault((*view, tensor.dtype), str(len(self.tensors)))
        if name not in self.tensors:
            copied = tensor.detach().to("cpu").contiguous()
            self.tensors[name] = copied.clone() if memory in self._memory else copied
            self._memory.add(memory)
        return name


def _take_out(value: Any, stored: _Stored) -> Any:
    if isinstance(value, Tensor):
        return {"tensor": stored.add(value)}
    if isinstance(value, Mapping):
        items = cast("Mapping[Any, Any]", value).items()
        # Keys may be numbers, which JSON's are not.
        return {"dict": [[key, _take_out(item, stored)] for key, item in items]}
    if isinstance(value, list | tuple):
        kind = "tuple" if isinstance(value, tuple) else "list"
        return {kind: [_take_out(item, stored) for item in cast("Sequence[Any]", value)]}
    return value


def _put_back(layout: Any, file: Any) -> Any:
    if not isinstance(layout, dict):
        return layout
    ((kind, content),) = cast("dict[str, Any]", layout).items()
    match kind:
        case "tensor":
            return None if file is None else file.get_tensor(content)
        case "dict":
            return {key: _put_back(item, file) for key, item in content}
        case "list":
            return [_put_back(item, file) for item in content]
        case "tuple":
            return tuple(_put_back(item, file) for item in content)
        case _:
            raise ValueError(f"unknown kind {kind!r}")


def require_finite(model: nn.Module, optimizer: Optimizer | None, step: int) -> None:
    """Refuse to save a model or optimizer that a number has spoiled.

    Raises:
        TrainingError: A weight or the optimizer's state is not finite, or a buffer holds a NaN: infinity has
            its place in masks.
    """
    tensors: dict[str, Tensor] = dict(model.named_parameters())
    parts: Mapping[str, Optimizer] = {} if optimizer is None else getattr(optimizer, "parts", {"": optimizer})
    for number, state in enumerate(state for part in parts.values() for state in part.state.values()):
        for name, value in state.items():
            if isinstance(value, Tensor):
                tensors[f"{name} of the optimizer's parameter {number}"] = value
    spoiled = [name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()]
    spoiled += [name for name, buffer in model.named_buffers() if buffer.isnan().any()]
    if spoiled:
        raise TrainingError(
            f"{spoiled[0]} is not finite after step {step}, so no checkpoint is made of it; the ones that "
            f"are there are not concerned. Resume from one with a lower learning rate."
        )


def random_state() -> dict[str, Any]:
    """Return the state of Python's, numpy's and torch's random numbers, on all devices in use."""
    kind, keys, position, has_gauss, gauss = cast("Any", np.random.get_state())
    state: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": (kind, keys.tolist(), int(position), int(has_gauss), float(gauss)),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        state["cuda"] = torch.cuda.get_rng_state_all()
    if torch.backends.mps.is_available():
        state["mps"] = torch.mps.get_rng_state()
    return state


def restore_random_state(state: Mapping[str, Any]) -> None:
    """Go back to what `random_state` returned; a device that is not here any more is passed over."""
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        for index, device_state in enumerate(state["cuda"][: torch.cuda.device_count()]):
            torch.cuda.set_rng_state(device_state, index)
    if "mps" in state and torch.backends.mps.is_available():
        torch.mps.set_rng_state(state["mps"])
