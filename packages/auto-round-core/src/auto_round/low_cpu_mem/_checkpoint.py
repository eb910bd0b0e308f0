"""A checkpoint on disk: one file, or a folder as Hugging Face lays it out."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Callable, Collection
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Literal, Self, cast

import torch
from torch import Tensor

from auto_round._files import parse_object, shown
from auto_round.exceptions import CheckpointError
from auto_round.low_cpu_mem._safetensors import MOST_BYTES, is_safetensors, read_header
from auto_round.low_cpu_mem._sources import FileSource, Source, read_bytes
from auto_round.low_cpu_mem._stored import StoredTensor
from auto_round.low_cpu_mem._torch_file import WholeOnly, hold_tensors, is_legacy, read_tensors
from auto_round.low_cpu_mem._zip_records import is_zip

INDEX_END = ".index.json"
# The order in which transformers prefers them.
_WEIGHTS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
_SHARDS = (
    re.compile(r"model-(\d{5})-of-(\d{5})\.safetensors", re.ASCII),
    re.compile(r"pytorch_model-(\d{5})-of-(\d{5})\.bin", re.ASCII),
)
_SHARD_NAME = re.compile(r"(?!\.)[^/\\\x00:]+")
_START_BYTES = 512


@dataclass(frozen=True, kw_only=True)
class TensorInfo:
    """What is known of a tensor before its values are read."""

    shape: tuple[int, ...]
    """Shape."""
    dtype: torch.dtype
    """Type of the stored values."""
    file: Path
    """The file that has them."""
    bytes: int
    """Size of the values in memory, in their own type."""


class CheckpointReader:
    """Reads single tensors, or some rows of one, from a checkpoint.

    Opening reads the headers (safetensors) or descriptions (.bin, .pt, .pth) alone, and checks them: where
    every tensor lies, and that it lies within its file. Values are then copied from the file straight into
    the tensor that is returned. No file is mapped, so nothing else of it counts as memory of the process.

    Any number of threads may read at once. The files stay open until `close`, the end of the `with` block,
    or the end of the reader.

    Files of torch before 1.6, which are no zip archives, cannot be read in parts: such a file is loaded whole
    when the reader is opened and held until it goes. Files in torch's zip format that were compressed later
    are refused, and so are big-endian ones.

    Args:
        path: A folder with `model.safetensors`, `model.safetensors.index.json`, `pytorch_model.bin`,
            `pytorch_model.bin.index.json` (the first of these that is there is taken), or the numbered shards
            of such an index without it; or such an index; or one file of safetensors or torch, whatever its
            name. In a file of torch the tensors at the top of a state dict count, and nothing else does. Of a
            shard the tensors count that the index places in it.
        only: Given the names in an index, returns those that are wanted; the others do not count, and shards
            that have none of the wanted are not opened. Where it returns none, all count.

    Raises:
        CheckpointError: A part is missing or damaged; the message names the file and the tensor.
        UnsafeFileError: A file of torch names code other than what rebuilds tensors; nothing of it was run.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        only: Callable[[Collection[str]], Collection[str]] | None = None,
    ) -> None:
        self._only = only
        self._open(Path(path), None)

    @classmethod
    def from_source(cls, source: Source) -> Self:
        """Open one file that is open already or in memory, and close it with the reader.

        Raises:
            CheckpointError: As for a path.
        """
        reader = cls.__new__(cls)
        reader._only = None
        reader._open(source.path, source)
        return reader

    def _open(self, path: Path, source: Source | None) -> None:
        self.path = path
        """What was opened."""
        self._tensors: dict[str, StoredTensor | WholeOnly] = {}
        self._files: dict[str, Path] = {}
        self._sources: list[Source] = []
        with ExitStack() as undo:
            undo.callback(self.close)
            if source is not None:
                self._add(source)
            elif path.is_dir():
                self._open_folder()
            elif path.name.endswith(INDEX_END):
                self._open_index(path)
            else:
                self._add(FileSource(path))
            undo.pop_all()
        self._shares = _find_shared(self._tensors)

    @property
    def names(self) -> tuple[str, ...]:
        """The tensors' names, in the order of the file or of the index."""
        return tuple(self._tensors)

    def __contains__(self, name: object) -> bool:
        return name in self._tensors

    def info(self, name: str) -> TensorInfo:
        """Return shape, type, file and size of a tensor.

        Raises:
            CheckpointError: There is none of that name, or it is of a kind that is only loaded with its
                file (sparse, quantised, conjugate, a subclass).
        """
        stored = self._find(name)
        return TensorInfo(shape=stored.shape, dtype=stored.dtype, file=self._files[name], bytes=stored.nbytes)

    def read(self, name: str, *, dtype: torch.dtype | None = None) -> Tensor:
        """Return a tensor's values.

        Args:
            name: Its name.
            dtype: What to convert to; by default the type stays as it is stored. Values are converted, and
                brought into order where they are stored transposed, in pieces of 1 MiB, which is all that
                is taken beside the result.

        Returns:
            A new contiguous tensor on the CPU that shares no memory with any other.

        Raises:
            CheckpointError: As for `info`; or the file is closed, or has become shorter; or complex values
                should become real ones.
        """
        stored = self._find(name)
        try:
            return stored.read(dtype)
        except CheckpointError as error:
            raise self._failure(name, error) from error

    def read_rows(self, name: str, rows: slice | Tensor, *, dtype: torch.dtype | None = None) -> Tensor:
        """Return some rows (indices of the first dimension) of a tensor, reading no others.

        Args:
            name: Its name.
            rows: A slice whose bounds lie within the tensor, or a tensor of integers with one dimension, in
                any order and with repetitions; none may be negative. Rows that follow each other in the file
                are read at once.
            dtype: As for `read`.

        Returns:
            What `read(name)[rows]` would, as a new contiguous tensor on the CPU.

        Raises:
            CheckpointError: A row is not there; or as for `read`.
        """
        stored = self._find(name)
        try:
            return stored.read_rows(rows, dtype)
        except CheckpointError as error:
            raise self._failure(name, error) from error

    def shares(self, name: str) -> str | None:
        """Return the first name of the same values (tied weights), or None if `name` itself is that.

        Only .bin and .pt files have such; safetensors has no two names for the same bytes.

        Raises:
            CheckpointError: As for `info`.
        """
        self._find(name)
        return self._shares.get(name)

    def unnamed_shards(self) -> list[str]:
        """Return the names of numbered shards that belong to those that have tensors, and have none."""
        used = {path.name for path in self._files.values()}
        found: set[str] = set()
        for name in used:
            if any(pattern.fullmatch(name) for pattern in _SHARDS):
                start, _, end = name.rpartition("-of-")
                total, width = int(end.split(".")[0]), len("-00001")
                found |= {f"{start[:-width]}-{number:05}-of-{end}" for number in range(1, total + 1)}
        return sorted(found - used)

    def close(self) -> None:
        """Close all files; a read in another thread still ends."""
        for source in self._sources:
            source.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _failure(self, name: str, error: CheckpointError) -> CheckpointError:
        return CheckpointError(f"{self._files[name]}: tensor {shown(name)}: {error}".rstrip(".") + ".")

    def _find(self, name: str) -> StoredTensor:
        stored = self._tensors.get(name)
        if stored is None:
            near = difflib.get_close_matches(str(name), self._tensors, n=3)
            raise CheckpointError(
                f"{self.path} has no tensor {shown(name)}; "
                + (
                    f"did you mean {' or '.join(map(shown, near))}?"
                    if near
                    else f"it has {shown(self.names)}."
                )
            )
        if isinstance(stored, WholeOnly):
            raise CheckpointError(
                f"{self._files[name]}: tensor {shown(name)} is not stored as plain values ({stored.what}) "
                f"and cannot be read on its own; auto_round.low_cpu_mem.load reads the whole file."
            )
        return stored

    def _open_folder(self) -> None:
        for name in _WEIGHTS:
            # A link that leads nowhere is an error that names it, not a reason to take another file.
            path = self.path / name
            if path.exists() or path.is_symlink():
                if name.endswith(INDEX_END):
                    self._open_index(path)
                else:
                    self._add(FileSource(path))
                return
        for pattern in _SHARDS:
            shards = sorted(path.name for path in self.path.iterdir() if pattern.fullmatch(path.name))
            if shards:
                for name in _complete(self.path, shards, pattern):
                    self._add(FileSource(self.path / name))
                return
        raise CheckpointError(
            f"{self.path} has no weights: none of {', '.join(_WEIGHTS)}, and no numbered shards. If they "
            f"have another name, give the file itself."
        )

    def _open_index(self, index: Path) -> None:
        files = _read_index(index)
        wanted = self._only(files) if self._only is not None else ()
        if wanted:
            files = {name: files[name] for name in files if name in wanted}
        held: dict[str, dict[str, StoredTensor | WholeOnly]] = {}
        for name, file_name in files.items():
            path = index.parent / file_name
            if file_name not in held:
                try:
                    held[file_name] = self._find_in(FileSource(path))
                except CheckpointError as error:
                    raise type(error)(f"{error} {index.name} places tensor {shown(name)} in it.") from error
            if name not in held[file_name]:
                raise CheckpointError(f"{path} lacks tensor {shown(name)}, which {index.name} places in it.")
            self._tensors[name] = held[file_name][name]
            self._files[name] = path

    def _find_in(self, source: Source) -> dict[str, StoredTensor | WholeOnly]:
        self._sources.append(source)
        return find_tensors(source)

    def _add(self, source: Source) -> None:
        for name, stored in self._find_in(source).items():
            if name in self._tensors:
                raise CheckpointError(
                    f"{self._files[name]} and {source.path} both have a tensor {shown(name)}."
                )
            self._tensors[name] = stored
            self._files[name] = source.path


def kind_of(source: Source) -> Literal["safetensors", "zip", "legacy", "other"]:
    """Return the format of a file by its first bytes, and where these say nothing by its name."""
    start = read_bytes(source, 0, min(source.size, _START_BYTES))
    if is_zip(start):
        return "zip"
    if is_legacy(start):
        return "legacy"
    return "safetensors" if is_safetensors(start[:9]) or source.path.suffix == ".safetensors" else "other"


def find_tensors(source: Source) -> dict[str, StoredTensor | WholeOnly]:
    """Return the tensors of one file.

    Raises:
        CheckpointError: It is of no format that holds tensors, or damaged.
        UnsafeFileError: It names code.
    """
    match kind_of(source):
        case "zip":
            return read_tensors(source)
        case "legacy":
            return hold_tensors(source)
        case "safetensors":
            return dict(read_header(source))
        case "other":
            raise CheckpointError(
                f"{source.path} is no safetensors file and none that torch.save wrote: it begins with "
                f"{shown(read_bytes(source, 0, min(source.size, 16)))}. It may be damaged, or a pointer of "
                f"Git LFS whose file was not fetched."
            )


def _find_shared(tensors: dict[str, StoredTensor | WholeOnly]) -> dict[str, str]:
    first: dict[StoredTensor, str] = {}
    shared: dict[str, str] = {}
    for name, stored in tensors.items():
        if isinstance(stored, StoredTensor) and stored.nbytes:
            other = first.setdefault(stored, name)
            if other != name:
                shared[name] = other
    return shared


def _complete(folder: Path, shards: list[str], pattern: re.Pattern[str]) -> list[str]:
    """Return the names of shards whose index is missing, if none of them is."""
    matches = [match for name in shards if (match := pattern.fullmatch(name))]
    totals = {match[2] for match in matches}
    if len(totals) > 1:
        raise CheckpointError(
            f"{folder} has no index, and shards of several checkpoints: of {' and of '.join(sorted(totals))} "
            f"shards."
        )
    numbers = {int(match[1]) for match in matches}
    missing = sorted(set(range(1, int(matches[0][2]) + 1)) - numbers)
    if missing or len(numbers) > int(matches[0][2]):
        raise CheckpointError(
            f"{folder} has {len(shards)} of {int(matches[0][2])} shards and no index; the first that is "
            f"missing is number {missing[0] if missing else 1}."
        )
    return shards


def _read_index(path: Path) -> dict[str, str]:
    """Return the file of each tensor, by name."""
    # A pipe under this name is refused, where opening it as any file would wait for its writer.
    source = FileSource(path)
    try:
        if source.size > MOST_BYTES:
            raise CheckpointError(f"{path} has {source.size} bytes; an index has at most {MOST_BYTES}.")
        content = parse_object(
            read_bytes(source, 0, source.size), f"{path}: the index", CheckpointError, "The file is damaged."
        )
    finally:
        source.close()
    weight_map: object = content.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path} has no weight_map, so it does not say where the tensors are.")
    files: dict[str, str] = {}
    for name, file_name in cast("dict[str, object]", weight_map).items():
        if not isinstance(file_name, str) or not _SHARD_NAME.fullmatch(file_name):
            raise CheckpointError(
                f"{path} says that tensor {shown(name)} is in {shown(file_name)}, which is not the name of a "
                f"file in the same folder."
            )
        files[name] = file_name
    return files
