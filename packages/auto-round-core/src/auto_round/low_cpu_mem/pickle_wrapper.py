"""`load`, `loads`, `dump` and `dumps` as in `pickle`, for tensors and plain containers.

What is read is not run: see `load`.
"""

from __future__ import annotations

import functools
import io
import os
import pickle
import warnings
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import IO, Any, cast

import torch
from torch import Tensor

from auto_round._files import shown, write_atomically
from auto_round.exceptions import CheckpointError, ConfigurationError, UnsafeLoadWarning
from auto_round.low_cpu_mem._checkpoint import INDEX_END, CheckpointReader, kind_of
from auto_round.low_cpu_mem._pickle_machine import Machine
from auto_round.low_cpu_mem._sources import FileSource, MemorySource, Source, SourceFile, read_bytes
from auto_round.low_cpu_mem._torch_file import load_whole

__all__ = ["dump", "dumps", "load", "loads"]

PathOrFile = str | os.PathLike[str] | IO[bytes]
_BYTES = Path("<bytes>")


def load(
    f: PathOrFile,
    tensor_name: str | None = None,
    prefix: str | None = None,
    map_location: Any = None,
    *,
    allow_unsafe: bool = False,
    **pickle_load_args: Any,
) -> Any:
    """Load an object, or of a checkpoint one tensor or some, without running anything that the file names.

    Tensors, parameters, numbers, text, bytes, lists, tuples, dictionaries (also `OrderedDict` and
    `Counter`), sets, `torch.Size`, types and devices are read; anything else is refused by name. Where
    tensors are asked for by name or prefix, only the bytes of these are read, from safetensors and from the
    zip files of `torch.save`; older files of torch are loaded whole.

    Args:
        f: A file of safetensors, `torch.save`, `dump` or `pickle`; a folder with a checkpoint, or the index
            of one, which leads to the right shard; or a file object. What that holds from its position on
            must be one object; at the start of a regular file, parts of it can be read alone.
        tensor_name: The one tensor to return.
        prefix: With `tensor_name`, what may stand before the name: the name itself is looked for, then the
            name without the prefix, then the name with it (a base model's prefix such as `model` is in some
            checkpoints and not in others). Alone, the module whose tensors are to be returned: those with a
            name that is `prefix` or begins with `prefix` and a dot.
        map_location: Device of the tensors; by default the CPU, whatever device they were saved from. Where
            a file of torch is loaded whole, anything that `torch.load` takes.
        allow_unsafe: Run whatever a pickle names, as `pickle.load` does. A file can then do anything that the
            user of the process may do; only for a file whose writer is trusted like the author of a program.
            Only for one file, not for a folder or an index.
        pickle_load_args: For plain pickles `encoding`, of text that Python 2 wrote ("utf-8" by default). All
            others only together with `allow_unsafe`, for `torch.load` or `pickle.load`.

    Returns:
        With `tensor_name` the tensor; with `prefix` alone a dictionary of tensors under their full names, as
        they stand in the checkpoint; else the whole object, which is a dictionary of all tensors for
        safetensors, a folder or an index. Tensors are contiguous and own their memory, except that names of
        one tied tensor get the same tensor, and that a file of torch that is loaded whole is as
        `torch.load` returns it. Attributes that were set on an `OrderedDict` in a plain pickle are left out.

    Raises:
        UnsafeFileError: The file names something else than what is read; nothing of it was run.
        CheckpointError: The file is missing or damaged, or has no such tensor.
        ConfigurationError: The arguments do not go together.

    Warns:
        UnsafeLoadWarning: `allow_unsafe` is used.
    """
    if isinstance(f, str | os.PathLike):
        path = Path(f)
        if path.is_dir() or path.name.endswith(INDEX_END):
            if allow_unsafe or pickle_load_args:
                raise ConfigurationError(
                    f"allow_unsafe and arguments of pickle are for one file, and {path} stands for several; "
                    f"load its files one by one."
                )
            only = functools.partial(_wanted, tensor_name=tensor_name, prefix=prefix)
            with CheckpointReader(path, only=only) as reader:
                return _select(reader, tensor_name, prefix, map_location)
        source: Source = FileSource(path)
    else:
        source = _source_of(f)
    return _load(source, tensor_name, prefix, map_location, allow_unsafe, pickle_load_args)


def loads(data: bytes | bytearray | memoryview, tensor_name: str | None = None, **kwargs: Any) -> Any:
    """Load from bytes what `load` does from a file; see there.

    Args:
        data: The content of a file.
        tensor_name: As for `load`.
        kwargs: `prefix`, `map_location`, `allow_unsafe` and the arguments of pickle, as for `load`.

    Returns:
        As `load`.

    Raises:
        UnsafeFileError: As for `load`.
        CheckpointError: As for `load`.
        ConfigurationError: As for `load`.
    """
    prefix: Any = kwargs.pop("prefix", None)
    map_location: Any = kwargs.pop("map_location", None)
    allow_unsafe: Any = kwargs.pop("allow_unsafe", False)
    return _load(MemorySource(data, _BYTES), tensor_name, prefix, map_location, allow_unsafe, kwargs)


def dump(obj: Any, file: PathOrFile) -> None:
    """Write an object: as a pickle, or where there are tensors in it as `torch.save` does.

    `load` reads back tensors and plain containers. Other objects are written as well, but only
    `load(..., allow_unsafe=True)` reads them.

    Args:
        obj: The object.
        file: A path, which gets the new file once that is complete and on disk, so that a crash leaves the
            old one; its folder is made if it is missing. Or a file object, open for writing bytes.

    Raises:
        OSError: The file cannot be written.
        pickle.PicklingError: The object holds something that cannot be pickled.
    """
    if not isinstance(file, str | os.PathLike):
        _write(obj, file)
        return

    def write(temporary: Path) -> None:
        with temporary.open("wb") as stream:
            _write(obj, stream)

    write_atomically(Path(file), write)


def dumps(obj: Any) -> bytes:
    """Return as bytes what `dump` writes.

    Raises:
        pickle.PicklingError: As for `dump`.
    """
    stream = io.BytesIO()
    _write(obj, stream)
    return stream.getvalue()


class _TensorFoundError(Exception):
    pass


class _PlainPickler(pickle.Pickler):
    def reducer_override(self, obj: Any, /) -> Any:
        if isinstance(obj, Tensor | torch.UntypedStorage | torch.TypedStorage):
            raise _TensorFoundError
        return NotImplemented


def _write(obj: Any, stream: IO[bytes]) -> None:
    # A pickle that breaks off at a tensor must not be in the file yet.
    buffer = io.BytesIO()
    try:
        _PlainPickler(buffer, protocol=4).dump(obj)
    except _TensorFoundError:
        # Its pickles of tensors hold the values themselves, which no reader could pass over.
        torch.save(obj, stream)
    else:
        stream.write(buffer.getbuffer())


def _source_of(file: IO[bytes]) -> Source:
    if not callable(getattr(file, "read", None)):
        raise ConfigurationError(f"f must be a path or a file object, not {shown(file)}.")
    name = getattr(file, "name", None)
    path = Path(name if isinstance(name, str) else "<file>")
    try:
        if file.tell() == 0:
            return FileSource(path, file.fileno())
    except (OSError, CheckpointError):
        # No regular file, or one without a number such as io.BytesIO.
        pass
    return MemorySource(file.read(), path)


def _load(
    source: Source,
    tensor_name: str | None,
    prefix: str | None,
    map_location: Any,
    allow_unsafe: bool,
    arguments: Mapping[str, Any],
) -> Any:
    try:
        kind = kind_of(source)
        if allow_unsafe and kind != "safetensors":
            return _pick(_load_unsafe(source, kind, map_location, arguments), source, tensor_name, prefix)
        encoding: object = arguments.get("encoding", "utf-8")
        if arguments.keys() - ({"encoding"} if kind == "other" else ()) or not isinstance(encoding, str):
            raise ConfigurationError(
                f"{shown(dict(arguments))} cannot be given here: without allow_unsafe=True only `encoding` "
                f"is known, a text, and for plain pickles alone."
            )
        if kind == "safetensors" or tensor_name is not None or prefix is not None:
            with CheckpointReader.from_source(source) as reader:
                return _select(reader, tensor_name, prefix, map_location)
        if kind == "other":
            if not source.size:
                raise CheckpointError(f"{source.path} is empty.")
            return Machine(source.path, encoding=encoding).run(read_bytes(source, 0, source.size))
        return load_whole(source, "cpu" if map_location is None else map_location)
    finally:
        source.close()


def _select(reader: CheckpointReader, tensor_name: str | None, prefix: str | None, map_location: Any) -> Any:
    device = _device(map_location)
    if tensor_name is not None:
        return reader.read(_known_name(reader, tensor_name, prefix)).to(device)
    found: dict[str, Tensor] = {}
    for name in _with_prefix(reader.names, prefix, reader.path):
        first = reader.shares(name)
        found[name] = found[first] if first in found else reader.read(name).to(device)
    return found


def _wanted(names: Collection[str], *, tensor_name: str | None, prefix: str | None) -> Collection[str]:
    """Return what is asked for by name or prefix of the names in an index."""
    if tensor_name is not None:
        return {_known_name(names, tensor_name, prefix)} & set(names)
    return {name for name in names if _is_below(name, prefix)} if prefix else ()


def _known_name(names: Any, name: str, prefix: str | None) -> str:
    if prefix:
        start = prefix.rstrip(".") + "."
        for candidate in (name, name.removeprefix(start), start + name):
            if candidate in names:
                return candidate
    return name


def _with_prefix(names: Any, prefix: str | None, path: Path) -> list[str]:
    if not prefix:
        return list(names)
    found = [name for name in names if _is_below(name, prefix)]
    if not found:
        raise CheckpointError(f"{path} has no tensors below {shown(prefix)}; it has {shown(tuple(names))}.")
    return found


def _is_below(name: object, prefix: str) -> bool:
    start = prefix.rstrip(".")
    return name == start or str(name).startswith(start + ".")


def _device(map_location: Any) -> torch.device:
    if map_location is not None and not isinstance(map_location, str | int | torch.device):
        raise ConfigurationError(
            f"map_location is {shown(map_location)}; for tensors that are read one by one it must be a "
            f"device."
        )
    try:
        return torch.device("cpu" if map_location is None else map_location)
    except RuntimeError as error:
        raise ConfigurationError(f"map_location is {shown(map_location)}, which is no device.") from error


def _load_unsafe(source: Source, kind: str, map_location: Any, arguments: Mapping[str, Any]) -> Any:
    warnings.warn(
        f"{source.path} is loaded with allow_unsafe=True: whatever code it names is run.",
        UnsafeLoadWarning,
        stacklevel=4,
    )
    stream = io.BufferedReader(SourceFile(source))
    try:
        if kind == "other":
            return pickle.load(stream, **arguments)  # noqa: S301
        location = "cpu" if map_location is None else map_location
        return torch.load(stream, map_location=location, weights_only=False, **arguments)
    except (pickle.UnpicklingError, EOFError) as error:
        raise CheckpointError(f"{source.path} is damaged: {error}.") from error


def _pick(value: Any, source: Source, tensor_name: str | None, prefix: str | None) -> Any:
    if tensor_name is None and prefix is None:
        return value
    if not isinstance(value, dict):
        raise CheckpointError(f"{source.path} holds a {type(value).__name__}, which has no names.")
    entries = cast("dict[Any, Any]", value)
    if tensor_name is None:
        return {name: entries[name] for name in _with_prefix(entries, prefix, source.path)}
    name = _known_name(entries, tensor_name, prefix)
    if name not in entries:
        raise CheckpointError(f"{source.path} has no entry {shown(name)}; it has {shown(tuple(entries))}.")
    return entries[name]
