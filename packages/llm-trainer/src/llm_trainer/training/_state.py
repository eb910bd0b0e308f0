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
from torch import Tensor

from llm_trainer._tensor_files import save_tensors
from llm_trainer.exceptions import CheckpointError

_KEY = "state"


def save_state(path: Path, state: Mapping[str, Any]) -> None:
    """Write nested dictionaries, lists and tuples of tensors and plain values as one safetensors file.

    The tensors are its body; the rest, with the tensors' names in their places, is JSON in its metadata.
    Numbers come back to the bit.

    Raises:
        OSError: The file cannot be written.
    """
    tensors: dict[str, Tensor] = {}
    layout = json.dumps(_take_out(state, tensors))
    # A file without a tensor is not one.
    tensors.setdefault("", torch.zeros(0))
    save_tensors(path, tensors, {_KEY: layout})


def load_state(path: Path) -> dict[str, Any]:
    """Read what `save_state` wrote.

    Raises:
        CheckpointError: The file is missing or something else.
    """
    try:
        with cast("Any", safe_open)(path, framework="pt") as file:
            layout = json.loads(file.metadata()[_KEY])
            return cast("dict[str, Any]", _put_back(layout, file))
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing.") from None
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{path} does not hold the state of a run: {error!r}.") from error


def _take_out(value: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, Tensor):
        name = str(len(tensors))
        tensors[name] = value.detach().to("cpu").contiguous()
        return {"tensor": name}
    if isinstance(value, Mapping):
        items = cast("Mapping[Any, Any]", value).items()
        # Keys may be numbers, which JSON's are not.
        return {"dict": [[key, _take_out(item, tensors)] for key, item in items]}
    if isinstance(value, list | tuple):
        kind = "tuple" if isinstance(value, tuple) else "list"
        return {kind: [_take_out(item, tensors) for item in cast("Sequence[Any]", value)]}
    return value


def _put_back(layout: Any, file: Any) -> Any:
    if not isinstance(layout, dict):
        return layout
    ((kind, content),) = cast("dict[str, Any]", layout).items()
    match kind:
        case "tensor":
            return file.get_tensor(content)
        case "dict":
            return {key: _put_back(item, file) for key, item in content}
        case "list":
            return [_put_back(item, file) for item in content]
        case "tuple":
            return tuple(_put_back(item, file) for item in content)
        case _:
            raise ValueError(f"unknown kind {kind!r}")


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
