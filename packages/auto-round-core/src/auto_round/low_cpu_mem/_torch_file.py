"""The tensors of a file that `torch.save` wrote (.bin, .pt, .pth), found without reading their values."""

from __future__ import annotations

import io
import math
import pickle
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from auto_round._files import shown
from auto_round.exceptions import CheckpointError, UnsafeFileError
from auto_round.low_cpu_mem._pickle_machine import Call, Machine
from auto_round.low_cpu_mem._sources import MemorySource, Source, SourceFile, read_bytes
from auto_round.low_cpu_mem._stored import StoredTensor, memory_of
from auto_round.low_cpu_mem._zip_records import Record, find_records, is_zip

MOST_PICKLE_BYTES = 1 << 26
"""Longest description of a file's content; a checkpoint of 10,000 tensors needs about 1.5 MB."""

_STORAGE_NAMES: dict[str, torch.dtype | None] = {
    "torch.DoubleStorage": torch.float64,
    "torch.FloatStorage": torch.float32,
    "torch.HalfStorage": torch.float16,
    "torch.BFloat16Storage": torch.bfloat16,
    "torch.LongStorage": torch.int64,
    "torch.IntStorage": torch.int32,
    "torch.ShortStorage": torch.int16,
    "torch.CharStorage": torch.int8,
    "torch.ByteStorage": torch.uint8,
    "torch.BoolStorage": torch.bool,
    "torch.ComplexFloatStorage": torch.complex64,
    "torch.ComplexDoubleStorage": torch.complex128,
    # These have no type of their own.
    "torch.UntypedStorage": None,
    "torch.storage.UntypedStorage": None,
}
_REBUILDS = (
    "torch._utils._rebuild_tensor",
    "torch._utils._rebuild_tensor_v2",
    "torch._utils._rebuild_tensor_v3",
    "torch._utils._rebuild_parameter",
    "torch._utils._rebuild_parameter_with_state",
)
# What torch.load(weights_only=True) accepts as well, and what is not a plain piece of one storage.
_WHOLE_ONLY = (
    "torch._utils._rebuild_qtensor",
    "torch._utils._rebuild_sparse_tensor",
    "torch._utils._rebuild_meta_tensor_no_storage",
    "torch._utils._rebuild_wrapper_subclass",
    "torch._utils._rebuild_device_tensor_from_numpy",
    "torch._utils._rebuild_device_tensor_from_cpu_tensor",
    "torch._tensor._rebuild_from_type_v2",
    "torch.nn.parameter.Parameter",
    "torch.Tensor",
    "torch.serialization._get_layout",
)
_WHOLE_ONLY_NAMES = (
    "torch.per_tensor_affine",
    "torch.per_tensor_symmetric",
    "torch.per_channel_affine",
    "torch.per_channel_symmetric",
    "torch.per_channel_affine_float_qparams",
    *(
        f"torch.{prefix}{kind}Storage"
        for prefix in ("", "storage.")
        for kind in ("QInt8", "QUInt8", "QInt32")
    ),
    *(f"torch.{kind}" for kind in ("qint8", "quint8", "qint32", "quint4x2", "quint2x4")),
)
# The first bytes of torch's format before 1.6: a pickled number that marks it.
_LEGACY_START = pickle.dumps(0x1950A86A20F9469CFC6C, protocol=2)
# That number, the version of the format, and the sizes of the machine's types.
_LEGACY_PREAMBLE = 3
_TAR_MARK = slice(257, 262)


@dataclass(frozen=True)
class WholeOnly:
    """A value that torch can load with the whole file, but that cannot be read on its own."""

    what: str


@dataclass(frozen=True)
class _StorageType:
    dtype: torch.dtype | None
    """None where the storage has no type of its own."""


@dataclass(frozen=True)
class _Storage:
    dtype: torch.dtype | None
    start: int
    size: int


def is_legacy(start: bytes) -> bool:
    """Whether a file is one of torch's formats before 1.6, which hold tensors but cannot be read in parts."""
    return start.startswith(_LEGACY_START) or start[_TAR_MARK] == b"ustar"


def read_tensors(source: Source) -> dict[str, StoredTensor | WholeOnly]:
    """Return the tensors by name of a file that holds a state dict; what else is in it is left out.

    Raises:
        UnsafeFileError: The file names code other than what builds tensors and plain containers.
        CheckpointError: The file is damaged, or holds no dictionary with tensors at its top.
    """
    value = read_description(source)
    entries = cast("dict[Any, Any]", value) if isinstance(value, dict) else {}
    found = {
        name: entry
        for name, entry in entries.items()
        if isinstance(name, str) and isinstance(entry, StoredTensor | WholeOnly)
    }
    if not found:
        raise _no_state_dict(source.path, value)
    return found


def read_description(source: Source) -> Any:
    """Return what a zip file of torch holds, with a `StoredTensor` or `WholeOnly` in place of each tensor.

    Raises:
        UnsafeFileError: As for `read_tensors`.
        CheckpointError: The file is damaged.
    """
    path = source.path
    records = find_records(source)
    order = records.get("byteorder")
    if order is not None and (text := read_bytes(source, order.start, min(order.size, 20))) != b"little":
        raise CheckpointError(
            f"{path} has the byte order {shown(text)}; only little-endian files are read. Load it with torch "
            f"on any machine and save it again."
        )
    record = records.get("data.pkl")
    if record is None:
        raise CheckpointError(f"{path} is a zip archive without data.pkl; torch.save did not write it.")
    if record.size > MOST_PICKLE_BYTES:
        raise CheckpointError(
            f"{path}: data.pkl has {record.size} bytes, but at most {MOST_PICKLE_BYTES} are read; values "
            f"belong into tensors."
        )
    builder = _Builder(source, records)
    return builder.machine().run(read_bytes(source, record.start, record.size))


class _Builder:
    """Makes stored tensors of what the description says."""

    def __init__(self, source: Source, records: Mapping[str, Record]) -> None:
        self._source = source
        self._records = records

    def machine(self) -> Machine:
        calls: dict[str, Call] = {name: _whole_only(name) for name in _WHOLE_ONLY}
        builders = (self._tensor, self._tensor, self._typed_tensor, _parameter, _parameter)
        calls |= dict(zip(_REBUILDS, builders, strict=True))
        names: dict[str, Any] = {name: WholeOnly(name) for name in _WHOLE_ONLY_NAMES}
        names |= {name: _StorageType(dtype) for name, dtype in _STORAGE_NAMES.items()}
        return Machine(self._source.path, calls=calls, names=names, persistent=self._storage)

    def _storage(self, identifier: Any) -> _Storage | WholeOnly:
        path = self._source.path
        match identifier:
            case ("storage", _StorageType() | WholeOnly() as kind, str(key), str(), int(count)) if count >= 0:
                pass
            case _:
                raise UnsafeFileError(
                    f"{path} asks for the persistent object {shown(identifier)}; only storages are read."
                )
        record = self._records.get(f"data/{key}")
        if record is None:
            raise UnsafeFileError(
                f"{path} asks for the storage {shown(key)}, which is not among the records of the file."
            )
        if isinstance(kind, WholeOnly):
            return kind
        if record.size != count * (kind.dtype.itemsize if kind.dtype else 1):
            raise CheckpointError(
                f"{path}: storage {shown(key)} should have {shown(count)} values of "
                f"{kind.dtype or 'one byte'}, but its record has {record.size} bytes."
            )
        return _Storage(kind.dtype, record.start, record.size)

    def _tensor(
        self,
        storage: Any,
        offset: Any,
        size: Any,
        stride: Any,
        requires_grad: Any = None,
        hooks: Any = None,
        metadata: Any = None,
    ) -> StoredTensor | WholeOnly:
        del requires_grad, hooks
        return self._view(storage, None, offset, size, stride, metadata)

    def _typed_tensor(
        self,
        storage: Any,
        offset: Any,
        size: Any,
        stride: Any,
        requires_grad: Any,
        hooks: Any,
        dtype: Any,
        metadata: Any = None,
    ) -> StoredTensor | WholeOnly:
        del requires_grad, hooks
        if not isinstance(dtype, torch.dtype):
            raise TypeError("the type of a tensor is none")
        return self._view(storage, dtype, offset, size, stride, metadata)

    def _view(
        self, storage: Any, dtype: torch.dtype | None, offset: Any, size: Any, stride: Any, metadata: Any
    ) -> StoredTensor | WholeOnly:
        if isinstance(storage, WholeOnly):
            return storage
        if not isinstance(storage, _Storage):
            raise TypeError("a tensor has no storage")
        dtype = dtype or storage.dtype or torch.uint8
        shape, steps = _integers(size), _integers(stride)
        if len(shape) != len(steps):
            raise ValueError("a tensor's shape and strides differ in length")
        start = storage.start + _integers((offset,))[0] * dtype.itemsize
        tensor = StoredTensor(source=self._source, offset=start, dtype=dtype, shape=shape, stride=steps)
        # An empty tensor may stand anywhere, and often does.
        if math.prod(shape):
            _check(tensor, storage.start, storage.start + storage.size)
        # Conjugate and negated views need arithmetic after reading.
        return WholeOnly("a conjugate or negated view") if metadata else tensor


def _check(tensor: StoredTensor, start: int, end: int) -> None:
    try:
        tensor.check(start, end)
    except CheckpointError as error:
        raise CheckpointError(f"{tensor.source.path}: a tensor is damaged: {error}.") from None


def _integers(values: Any) -> tuple[int, ...]:
    if not isinstance(values, tuple):
        raise TypeError("a shape is no tuple")
    numbers = cast("tuple[Any, ...]", values)
    if not all(type(value) is int and 0 <= value < 2**63 for value in numbers):
        raise ValueError("a shape, stride or offset is out of range")
    return tuple(numbers)


def _parameter(data: Any, requires_grad: Any = None, hooks: Any = None, state: Any = None) -> Any:
    del requires_grad, hooks, state
    if not isinstance(data, StoredTensor | WholeOnly):
        raise TypeError("a parameter is made of what is no tensor")
    return data


def _whole_only(name: str) -> Callable[..., WholeOnly]:
    return lambda *_: WholeOnly(name)


def check_legacy(source: Source) -> None:
    """Refuse a file of an older format that names code, before torch sees it.

    Raises:
        UnsafeFileError: It does, or its description is longer than `MOST_PICKLE_BYTES`.
        CheckpointError: It is damaged.
    """
    head = read_bytes(source, 0, min(source.size, MOST_PICKLE_BYTES))
    if not head.startswith(_LEGACY_START):
        return
    stream = io.BytesIO(head)
    for _ in range(_LEGACY_PREAMBLE):
        Machine(source.path).run_next(stream)
    whole = WholeOnly("a file of an older format")
    calls: dict[str, Call] = dict.fromkeys((*_WHOLE_ONLY, *_REBUILDS), lambda *_: whole)
    names: dict[str, Any] = dict.fromkeys((*_WHOLE_ONLY_NAMES, *_STORAGE_NAMES), whole)
    Machine(source.path, calls=calls, names=names, persistent=lambda _: whole).run_next(stream)


def load_whole(source: Source, map_location: Any = "cpu") -> Any:
    """Load a file of torch, in any of its formats, as a whole and by torch's own rules for weights.

    Raises:
        UnsafeFileError: It names code that these rules do not allow.
        CheckpointError: It is damaged, or a tar file of torch 0.1, for which torch has no such rules.
    """
    if is_zip(read_bytes(source, 0, min(source.size, 4))):
        read_description(source)
    else:
        check_legacy(source)
    file: Any = io.BufferedReader(SourceFile(source))
    try:
        return torch.load(file, map_location=map_location, weights_only=True)
    except pickle.UnpicklingError as error:
        raise UnsafeFileError(f"{source.path} is refused, and nothing of it was run: {error}") from error
    except (RuntimeError, ValueError, TypeError, KeyError, IndexError, AttributeError, EOFError) as error:
        raise CheckpointError(f"{source.path} cannot be loaded: {error}") from error


def hold_tensors(source: Source) -> dict[str, StoredTensor | WholeOnly]:
    """Load a file of an older format whole, and return its tensors as if they were still on disk.

    Raises:
        CheckpointError: As for `load_whole`, or it holds no dictionary with tensors.
    """
    value = load_whole(source)
    memories: dict[int, MemorySource] = {}
    found: dict[str, StoredTensor | WholeOnly] = {}
    for name, tensor in cast("dict[Any, Any]", value).items() if isinstance(value, dict) else ():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            continue
        if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_conj() or tensor.is_neg():
            found[name] = WholeOnly(f"a tensor of layout {tensor.layout} and type {tensor.dtype}")
            continue
        found[name] = _held(tensor.detach(), source.path, memories)
    if not found:
        raise _no_state_dict(source.path, value)
    return found


def _no_state_dict(path: Path, value: Any) -> CheckpointError:
    held = f"a {type(value).__name__}"
    if isinstance(value, dict):
        held += f" with the keys {shown(list(cast('dict[Any, Any]', value)))}"
    return CheckpointError(
        f"{path} is no state dict: it must map names to tensors, but holds {held}. "
        f"auto_round.low_cpu_mem.load reads it whole."
    )


def _held(tensor: Tensor, path: Path, memories: dict[int, MemorySource]) -> StoredTensor:
    key = tensor.untyped_storage().data_ptr()
    if key not in memories:
        whole = torch.empty(0, dtype=torch.uint8, device="cpu").set_(tensor.untyped_storage())
        memories[key] = MemorySource(memory_of(whole) if whole.numel() else b"", path, owner=whole)
    held = StoredTensor(
        source=memories[key],
        offset=int(tensor.storage_offset()) * tensor.element_size(),
        dtype=tensor.dtype,
        shape=tuple(tensor.shape),
        stride=tensor.stride(),
    )
    if tensor.numel():
        _check(held, 0, memories[key].size)
    return held
