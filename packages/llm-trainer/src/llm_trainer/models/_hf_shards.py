"""Weights on disk as Hugging Face lays them out: one safetensors file, or several and an index.

A file that llm-trainer wrote carries a hash of its tensors, and its index the hashes of all files, so that
neither damage nor files of two saves pass for a model. Files of other writers have none, and are read too.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from llm_trainer._files import read_json_object, shown
from llm_trainer.exceptions import ConfigurationError, FormatError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
TENSORS_HASH = "llm_trainer_tensors_sha256"

_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
_FILE_NAME = re.compile(r"\w[\w.\-]*\.safetensors", re.ASCII)
_TYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
# What is mapped stays in memory until the file is closed, so a file is opened again after so many bytes.
_READ_BYTES = 64 * 2**20


def shard_bytes(size: int | str) -> int:
    """Return a number of bytes that is given as one, or as text such as `5GB` (10**9) or `512MiB` (2**20).

    Raises:
        ConfigurationError: It is neither, or not positive.
    """
    match = (
        re.fullmatch(r"\s*(\d{1,12})\s*([KMGT]i?B)\s*", size, re.IGNORECASE)
        if isinstance(size, str)
        else None
    )
    value = int(match[1]) * _UNITS.get(match[2].upper(), 2**40) if match else size
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ConfigurationError(
            f'max_shard_size is {shown(size)}; it must be a number of bytes or text such as "5GB" or '
            f'"512MiB".'
        )
    return value


def plan_files(tensors: Mapping[str, Tensor], most_bytes: int) -> dict[str, list[str]]:
    """Share tensors out, in their order, to files of at most `most_bytes`; a larger tensor gets its own."""
    groups: list[list[str]] = [[]]
    filled = 0
    for name, tensor in tensors.items():
        size = tensor.numel() * tensor.element_size()
        if groups[-1] and filled + size > most_bytes:
            groups.append([])
            filled = 0
        groups[-1].append(name)
        filled += size
    if len(groups) == 1:
        return {SINGLE: groups[0]}
    return {
        f"model-{number:05d}-of-{len(groups):05d}.safetensors": names
        for number, names in enumerate(groups, start=1)
    }


class TensorsHash:
    """SHA-256 of named tensors, which are to come in the order of their names."""

    def __init__(self) -> None:
        self._hash = hashlib.sha256()

    def update(self, name: str, tensor: Tensor) -> None:
        """Add a contiguous tensor in the CPU's memory."""
        self._hash.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode("ascii"))
        self._hash.update(tensor.reshape(-1).view(torch.uint8).numpy().data)

    def hexdigest(self) -> str:
        """Return the hash of all so far."""
        return self._hash.hexdigest()


def tensors_sha256(tensors: Mapping[str, Tensor]) -> str:
    """Return the hash of contiguous tensors in the CPU's memory, whatever their order."""
    found = TensorsHash()
    for name in sorted(tensors):
        found.update(name, tensors[name])
    return found.hexdigest()


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor is, and what its file's header says of it."""

    path: Path
    shape: tuple[int, ...]
    type_name: str

    @property
    def is_floating_point(self) -> bool:
        """Whether it is of a type that a model can have."""
        return self.type_name in _TYPES


class StoredWeights:
    """The tensors of a folder: their headers at once, their values with `read`.

    A single file goes before an index, as in transformers.

    Raises:
        FormatError: A file is missing or damaged, or the index does not fit its files; it is named.
    """

    def __init__(self, directory: Path) -> None:
        self.path = directory / SINGLE
        self.tensors: dict[str, StoredTensor] = {}
        self.metadata: dict[Path, dict[str, str]] = {}
        self._names: dict[Path, list[str]] = {}
        if self.path.exists() or not (directory / INDEX).exists():
            self._open(self.path)
            return
        self.path = directory / INDEX
        files, hashes = _read_index(self.path)
        for file_name, names in files.items():
            path = directory / file_name
            self._open(path)
            if set(self._names[path]) != names:
                odd = min(names.symmetric_difference(self._names[path]))
                raise FormatError(f"{path} and {self.path.name} disagree on where tensor {odd!r} is.")
            if hashes.get(file_name) != self.metadata[path].get(TENSORS_HASH):
                raise FormatError(
                    f"{path} is not the file that {self.path.name} was saved with: a save was cut short, or "
                    f"files of two saves were mixed. Take all files from one save, or save the model again."
                )

    def _open(self, path: Path) -> None:
        with _opened(path) as file:
            self.metadata[path] = file.metadata() or {}
            self._names[path] = sorted(file.keys())
            for name in self._names[path]:
                header = file.get_slice(name)
                self.tensors[name] = StoredTensor(path, tuple(header.get_shape()), header.get_dtype())

    def read(self, dtype: torch.dtype | None = None, device: str | torch.device = "cpu") -> dict[str, Tensor]:
        """Return all tensors on `device`, in memory of their own, converted to `dtype` if one is given.

        Raises:
            FormatError: A file is damaged or its tensors are not those that were saved.
        """
        state: dict[str, Tensor] = {}
        for path, names in self._names.items():
            found = TensorsHash()
            expected = self.metadata[path].get(TENSORS_HASH)
            for group in self._groups(names):
                with _opened(path) as file:
                    for name in group:
                        tensor: Tensor = file.get_tensor(name)
                        if expected is not None:
                            found.update(name, tensor)
                        state[name] = tensor.to(device, dtype or tensor.dtype, copy=True)
                        del tensor
            if expected is not None and found.hexdigest() != expected:
                raise FormatError(
                    f"{path} is damaged: its tensors are not those that were saved. Restore it or save the "
                    f"model again."
                )
        return state

    def _groups(self, names: Sequence[str]) -> Iterator[list[str]]:
        group: list[str] = []
        filled = 0
        for name in names:
            group.append(name)
            filled += math.prod(self.tensors[name].shape) * 8
            if filled >= _READ_BYTES:
                yield group
                group, filled = [], 0
        yield group


@contextmanager
def _opened(path: Path) -> Generator[Any]:
    try:
        with cast("Any", safe_open)(path, framework="pt") as file:
            yield file
    except FileNotFoundError:
        raise FormatError(f"{path} does not exist.") from None
    except (SafetensorError, OSError) as error:
        raise FormatError(f"{path} is damaged: {error}. Restore it or save the model again.") from error


def _read_index(path: Path) -> tuple[dict[str, set[str]], dict[str, str]]:
    """Return the tensors' names by file, and the files' hashes as far as the index has them."""
    content = read_json_object(path)
    weight_map: object = content.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise FormatError(f"{path} has no weight_map, so it does not say where the tensors are.")
    files: dict[str, set[str]] = {}
    for name, file_name in cast("dict[str, object]", weight_map).items():
        if not isinstance(file_name, str) or not _FILE_NAME.fullmatch(file_name):
            raise FormatError(
                f"{path} says that tensor {shown(name)} is in {shown(file_name)}, which is not the name of a "
                f"safetensors file in the same folder."
            )
        files.setdefault(file_name, set()).add(name)
    metadata: object = content.get("metadata")
    hashes = cast("dict[str, object]", metadata).get(TENSORS_HASH) if isinstance(metadata, dict) else None
    return files, cast("dict[str, str]", hashes) if isinstance(hashes, dict) else {}
