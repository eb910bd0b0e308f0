"""Files that are there whole or not at all, and that are read with care."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file  # pyright: ignore[reportUnknownVariableType]
from torch import Tensor

from bitmodels.exceptions import CheckpointError

__all__ = ["CONFIG", "WEIGHTS", "read_json", "read_tensors", "write_json", "write_safely", "write_tensors"]

CONFIG, WEIGHTS = "config.json", "model.safetensors"
_MOST_JSON_BYTES = 1 << 24


def write_safely(path: Path, write: Callable[[Path], None]) -> None:
    """Call `write` with a private file beside `path`, which then takes the place of `path` at once.

    Raises:
        OSError: It cannot be written; what was at `path` is still there.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    temporary = Path(name)
    try:
        write(temporary)
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.chmod(0o666 & ~_umask())
        temporary.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Write a JSON object for people to read."""
    text = json.dumps(values, indent=2, ensure_ascii=False) + "\n"
    write_safely(path, lambda file: cast("None", file.write_text(text, encoding="utf-8")))


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file.

    Raises:
        OSError: It cannot be written.
    """
    whole = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}

    def write(file: Path) -> None:
        try:
            save_file(whole, file, dict(metadata))
        except SafetensorError as error:
            raise OSError(f"{path} cannot be written: {error}") from error

    write_safely(path, write)


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object of a file.

    Raises:
        CheckpointError: There is none.
    """
    try:
        if path.stat().st_size > _MOST_JSON_BYTES:
            raise CheckpointError(f"{path} is too large to be a configuration.")
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} does not exist.") from error
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{path} holds no JSON object.")
    return cast("dict[str, Any]", values)


def read_tensors(path: Path, device: torch.device | str = "cpu") -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors and the metadata of a safetensors file.

    Raises:
        CheckpointError: It is missing or damaged.
    """
    try:
        with safe_open(path, "pt", device=str(device)) as file:  # pyright: ignore
            stored = cast("Any", file)
            names: list[str] = list(stored.keys())
            return {name: stored.get_tensor(name) for name in names}, dict(stored.metadata() or {})
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} does not exist.") from error
    except (OSError, SafetensorError, ValueError) as error:
        raise CheckpointError(f"{path} is damaged: {error}") from error


def _umask() -> int:
    """Return the process's mask, which can only be read by setting it."""
    mask = os.umask(0o077)
    os.umask(mask)
    return mask
