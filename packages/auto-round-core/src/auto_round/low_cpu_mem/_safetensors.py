"""The header of a safetensors file: https://github.com/huggingface/safetensors#format."""

from __future__ import annotations

import math
from typing import Any, cast

import torch

from auto_round._files import parse_object, shown
from auto_round.exceptions import CheckpointError
from auto_round.low_cpu_mem._sources import Source, read_bytes
from auto_round.low_cpu_mem._stored import StoredTensor, check_shape, contiguous_stride

_PREFIX_BYTES = 8
MOST_BYTES = 100_000_000
"""Longest header or index that is read; the format sets it for its headers."""
_FIELDS = {"dtype", "shape", "data_offsets"}
TYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "F8_E8M0": torch.float8_e8m0fnu,
    "U16": torch.uint16,
    "I16": torch.int16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "U32": torch.uint32,
    "I32": torch.int32,
    "F32": torch.float32,
    "U64": torch.uint64,
    "I64": torch.int64,
    "F64": torch.float64,
    "C64": torch.complex64,
    # Two values a byte; torch counts bytes in the last dimension, the format counts values.
    "F4": torch.float4_e2m1fn_x2,
}


def is_safetensors(start: bytes) -> bool:
    """Whether a file with these first nine bytes can only be a safetensors file."""
    return len(start) == 9 and int.from_bytes(start[:8], "little") <= MOST_BYTES and start[8:] == b"{"


def read_header(source: Source) -> dict[str, StoredTensor]:
    """Return the tensors of a file, in the order of its header, having read nothing but that.

    Raises:
        CheckpointError: The header is too long, is no valid one, or does not describe the whole file.
    """
    path = source.path
    length = int.from_bytes(read_bytes(source, 0, _PREFIX_BYTES), "little")
    if length > MOST_BYTES:
        raise CheckpointError(
            f"{path}: the header says that it has {length} bytes, but the format allows {MOST_BYTES}; this "
            f"is no safetensors file, or a damaged one."
        )
    start = _PREFIX_BYTES + length
    if start > source.size:
        raise CheckpointError(
            f"{path} is truncated: it has {source.size} bytes, but its header alone needs {start}."
        )
    header = parse_object(
        read_bytes(source, _PREFIX_BYTES, length),
        f"{path}: the header",
        CheckpointError,
        "The file is damaged.",
    )
    metadata: object = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(
        isinstance(value, str) for value in cast("dict[str, object]", metadata).values()
    ):
        raise CheckpointError(f"{path}: the header's __metadata__ must map text to text.")
    tensors: dict[str, StoredTensor] = {}
    ranges: list[tuple[int, int, str]] = []
    for name, entry in header.items():
        try:
            dtype, shape, begin, end = _parse_entry(entry)
        except CheckpointError as error:
            raise CheckpointError(f"{path}: tensor {shown(name)}: {error}.") from None
        ranges.append((begin, end, name))
        tensors[name] = StoredTensor(
            source=source,
            offset=start + begin,
            dtype=dtype,
            shape=shape,
            stride=contiguous_stride(shape),
        )
    _check_ranges(source, ranges, source.size - start)
    return tensors


def _parse_entry(entry: Any) -> tuple[torch.dtype, tuple[int, ...], int, int]:
    fields = cast("dict[str, Any]", entry) if isinstance(entry, dict) else {}
    if fields.keys() != _FIELDS:
        raise CheckpointError(f"its entry must have {', '.join(sorted(_FIELDS))} and nothing else")
    dtype = TYPES.get(fields["dtype"]) if isinstance(fields["dtype"], str) else None
    if dtype is None:
        raise CheckpointError(
            f"its type {shown(fields['dtype'])} is none that torch has; known are {', '.join(TYPES)}"
        )
    shape = _counts(fields["shape"], "shape")
    offsets = _counts(fields["data_offsets"], "data_offsets")
    if len(offsets) != 2 or offsets[0] > offsets[1]:
        raise CheckpointError(f"its data_offsets {shown(list(offsets))} must be a start and an end")
    if dtype == torch.float4_e2m1fn_x2:
        if not shape or shape[-1] % 2:
            raise CheckpointError(f"its shape {shown(shape)} does not fill whole bytes with 4-bit values")
        shape = (*shape[:-1], shape[-1] // 2)
    check_shape(shape, dtype.itemsize)
    needed = math.prod(shape) * dtype.itemsize
    if needed != offsets[1] - offsets[0]:
        raise CheckpointError(
            f"its shape {shown(shape)} needs {needed} bytes as {fields['dtype']}, but it has "
            f"{offsets[1] - offsets[0]}"
        )
    return dtype, shape, offsets[0], offsets[1]


def _counts(value: Any, what: str) -> tuple[int, ...]:
    values = cast("list[int]", value) if isinstance(value, list) else [-1]
    if not all(type(number) is int and 0 <= number < 2**63 for number in values):
        raise CheckpointError(
            f"its {what} must be a list of numbers from 0 to 2**63 - 1, but is {shown(cast('object', value))}"
        )
    return tuple(values)


def _check_ranges(source: Source, ranges: list[tuple[int, int, str]], size: int) -> None:
    """Have the tensors follow each other without gap or overlap, and fill the file."""
    reached = 0
    for begin, end, name in sorted(ranges):
        if begin != reached:
            raise CheckpointError(
                f"{source.path}: tensor {shown(name)} begins at byte {begin} of the data, but the ones "
                f"before it end at {reached}; the format allows neither gaps nor overlaps."
            )
        reached = end
    if reached > size:
        raise CheckpointError(
            f"{source.path} is truncated: its tensors need {reached} bytes, but it has {size} after the "
            f"header."
        )
    if reached < size:
        raise CheckpointError(
            f"{source.path} has {size - reached} bytes after its last tensor; the format allows none."
        )
