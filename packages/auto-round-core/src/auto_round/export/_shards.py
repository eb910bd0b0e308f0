"""Writing checkpoints in safetensors, tensor by tensor: https://github.com/huggingface/safetensors#format.

All names, types and shapes are known before the first value is, so headers are written first and values go
to their file as they come. What is in memory is one tensor, or the piece of one that its plan gives at once.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from auto_round._files import shown
from auto_round.exceptions import ExportError
from auto_round.low_cpu_mem._safetensors import MOST_BYTES, TYPES
from auto_round.low_cpu_mem._stored import memory_of

_CODES = {dtype: code for code, dtype in TYPES.items()}
_METADATA = "__metadata__"
_ALIGNMENT = 8


@dataclass(frozen=True, kw_only=True, slots=True)
class PlannedTensor:
    """A tensor that is to be written."""

    name: str
    """Its name in the checkpoint."""
    dtype: torch.dtype
    """Type of its values."""
    shape: tuple[int, ...]
    """Its shape."""
    pieces: Callable[[], Iterable[Tensor]]
    """Gives its values in order, in one tensor or in several, on the CPU and of this type; their shapes do
    not matter. Called once, when the tensor's turn has come."""

    @property
    def nbytes(self) -> int:
        """Bytes that the values take."""
        return math.prod(self.shape) * self.dtype.itemsize


def write_shards(folder: Path, plan: Sequence[PlannedTensor], max_shard_bytes: int) -> tuple[str, ...]:
    """Write a checkpoint into a folder, and return the names of its files.

    One file is `model.safetensors`; several are `model-00001-of-000NN.safetensors` with an index, as
    transformers reads them. Tensors go to shards in the order of the plan. In a file those of wide types come
    first, so that all are aligned as readers that map the file want them. What was written before an error
    stays, so the folder should be one that is thrown away then.

    Args:
        folder: Where to; files of these names in it are replaced.
        plan: What to write.
        max_shard_bytes: The most that the values in a file take, which a tensor that is larger by itself has
            to exceed.

    Raises:
        ExportError: The plan is impossible (a name twice, a header beyond the format's 100 MB), a tensor's
            pieces are not what was planned, or the disk is full, which is found out before the work where
            the file system says so.
    """
    _check_names(plan)
    _check_room(folder, sum(tensor.nbytes for tensor in plan))
    shards = _shards(plan, max_shard_bytes)
    names = (
        ["model.safetensors"]
        if len(shards) == 1
        else [f"model-{index:05d}-of-{len(shards):05d}.safetensors" for index in range(1, len(shards) + 1)]
    )
    for name, shard in zip(names, shards, strict=True):
        write_file(folder / name, shard)
    if len(shards) > 1:
        index = {
            "metadata": {"total_size": sum(tensor.nbytes for tensor in plan)},
            "weight_map": {
                tensor.name: name for name, shard in zip(names, shards, strict=True) for tensor in shard
            },
        }
        names.append("model.safetensors.index.json")
        try:
            (folder / names[-1]).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
        except OSError as error:
            raise not_written(folder / names[-1], error) from error
    return tuple(names)


def write_file(path: Path, tensors: Iterable[PlannedTensor]) -> None:
    """Write one file of tensors.

    Raises:
        ExportError: As for `write_shards`.
    """
    ordered = sorted(tensors, key=lambda tensor: -tensor.dtype.itemsize)
    header = _header(ordered, path)
    try:
        with path.open("wb") as file:
            file.write(header)
            for tensor in ordered:
                written = 0
                for piece in tensor.pieces():
                    _check_piece(tensor, piece)
                    written += file.write(memory_of(piece.contiguous()))
                if written != tensor.nbytes:
                    raise ExportError(
                        f"tensor {shown(tensor.name)} was to have {tensor.nbytes} bytes, and had {written}."
                    )
    except ExportError:
        raise
    except OSError as error:
        raise not_written(path, error) from error


def not_written(path: Path, error: OSError) -> ExportError:
    """Return the error that says what stopped a file or folder from being written, and what to do."""
    return ExportError(
        f"{path} cannot be written: {error.strerror or error}. Nothing was exported; make room, or set "
        "export.export_path to a folder elsewhere."
    )


def _check_room(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise ExportError(
            f"the tensors take {needed / 1e6:.0f} MB, and the disk of {folder.parent} has {free / 1e6:.0f} "
            "MB left; make room, or set export.export_path to a folder elsewhere."
        )


def _check_names(plan: Sequence[PlannedTensor]) -> None:
    seen: set[str] = set()
    for tensor in plan:
        if tensor.name in seen or tensor.name == _METADATA:
            reason = "comes twice" if tensor.name in seen else "is not free in the format"
            raise ExportError(f"the name {shown(tensor.name)} of a tensor {reason}.")
        seen.add(tensor.name)


def _check_piece(tensor: PlannedTensor, piece: Tensor) -> None:
    if piece.dtype != tensor.dtype:
        raise ExportError(
            f"tensor {shown(tensor.name)} was to be {tensor.dtype}, and its values are {piece.dtype}."
        )


def _shards(plan: Sequence[PlannedTensor], most: int) -> list[list[PlannedTensor]]:
    shards: list[list[PlannedTensor]] = [[]]
    size = 0
    for tensor in plan:
        if shards[-1] and size + tensor.nbytes > most:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += tensor.nbytes
    return shards


def _header(tensors: Sequence[PlannedTensor], path: Path) -> bytes:
    # What transformers looks at before it reads a file.
    entries: dict[str, Mapping[str, object]] = {_METADATA: {"format": "pt"}}
    offset = 0
    for tensor in tensors:
        code = _CODES.get(tensor.dtype)
        if code is None:
            raise ExportError(
                f"tensor {shown(tensor.name)} is {tensor.dtype}; safetensors holds {', '.join(TYPES)}."
            )
        shape = list(tensor.shape)
        if code == "F4":
            shape[-1] *= 2
        entries[tensor.name] = {
            "dtype": code,
            "shape": shape,
            "data_offsets": [offset, offset + tensor.nbytes],
        }
        offset += tensor.nbytes
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    text += b" " * (-len(text) % _ALIGNMENT)
    if len(text) > MOST_BYTES:
        raise ExportError(
            f"{path} would have a header of {len(text)} bytes, and the format allows {MOST_BYTES}; a smaller "
            "export.max_shard_size spreads the tensors over more files."
        )
    return len(text).to_bytes(8, "little") + text
