"""Which tensors of a checkpoint make up each tensor of a model."""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from auto_round._files import shown
from auto_round.exceptions import CheckpointError
from auto_round.low_cpu_mem._checkpoint import CheckpointReader

Shape = tuple[int, ...]
_LEGACY_ENDINGS = (
    (re.compile(r"LayerNorm\.gamma$"), "LayerNorm.weight"),
    (re.compile(r"LayerNorm\.beta$"), "LayerNorm.bias"),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Piece:
    """A tensor of a checkpoint, and the part of a tensor of the model that it is."""

    source: str
    """Name in the checkpoint."""
    place: tuple[slice | int, ...]
    """Index of the part in the model's tensor; empty for the whole tensor."""
    transposed: bool
    """The last two dimensions are the other way round in the checkpoint."""


@dataclass(frozen=True, slots=True)
class _Joined:
    """A tensor that is put together out of pieces."""

    shape: Shape
    pieces: tuple[Piece, ...]


def map_keys(
    model: nn.Module, shapes: Mapping[str, Shape], reader: CheckpointReader
) -> tuple[dict[str, tuple[Piece, ...]], tuple[str, ...]]:
    """Find the pieces of each tensor of the model that the checkpoint has.

    Names are changed as transformers does when it loads the model: by its own table of conversions where it
    has one (5.x), by the class's table and the old names of layer norms else; and the base model's prefix is
    added or taken away where only that gives a name that the model has.

    Args:
        model: The model; any module, where the names need no change.
        shapes: Shapes of all its tensors by name, tied ones under each of their names.
        reader: The checkpoint.

    Returns:
        The pieces by the model's names, and the checkpoint's names that the model has no use for.

    Raises:
        CheckpointError: A shape disagrees, parts of a tensor are missing, or transformers converts a tensor
            in a way that is not known here.
    """
    convert = _transformers_renaming(model, shapes) or _plain_renaming(model, shapes)
    whole: dict[str, str] = {}
    parts: dict[str, dict[str, list[str]]] = {}
    converters: dict[str, Any] = {}
    unused: list[str] = []
    for key in sorted(reader.names, key=_natural):
        name, pattern, converter = convert(key)
        if name not in shapes or name in whole or (pattern is None and name in parts):
            unused.append(key)
        elif pattern is None:
            whole[name] = key
        else:
            parts.setdefault(name, {}).setdefault(pattern, []).append(key)
            converters[name] = converter
    found: dict[str, tuple[Piece, ...]] = {}
    for name, key in whole.items():
        stored = reader.info(key).shape
        if stored != shapes[name]:
            raise CheckpointError(_disagreement(reader, key, stored, name, shapes[name]))
        found[name] = (Piece(source=key, place=(), transposed=False),)
    for name, keys in parts.items():
        found[name] = _join(converters[name], keys, name, shapes[name], reader)
    return found, tuple(unused)


_Renaming = Callable[[str], tuple[str, str | None, Any]]


def _transformers_renaming(model: nn.Module, shapes: Mapping[str, Shape]) -> _Renaming | None:
    """Return transformers' own renaming, if it is one of its models and a version that has such a table."""
    if not hasattr(model, "base_model_prefix"):
        return None
    try:
        mapping: Any = importlib.import_module("transformers.conversion_mapping")
        loading: Any = importlib.import_module("transformers.core_model_loading")
    except ImportError:
        return None
    entries: list[Any] = mapping.get_model_conversion_mapping(model)
    renamings = [entry for entry in entries if isinstance(entry, loading.WeightRenaming)]
    converters = [entry for entry in entries if isinstance(entry, loading.WeightConverter)]
    by_pattern = {pattern: entry for entry in converters for pattern in entry.source_patterns}
    prefix = str(model.base_model_prefix)

    def rename(key: str) -> tuple[str, str | None, Any]:
        name, pattern = loading.rename_source_key(key, renamings, converters, prefix, shapes)
        if name not in shapes and key in shapes:
            name, pattern = key, None
        return name, pattern, by_pattern.get(pattern)

    return rename


def _plain_renaming(model: nn.Module, shapes: Mapping[str, Shape]) -> _Renaming:
    table: Mapping[str, str] = getattr(model, "_checkpoint_conversion_mapping", None) or {}
    rules = [*((re.compile(old), re.sub(r"^\^", "", new)) for old, new in table.items()), *_LEGACY_ENDINGS]
    prefix = getattr(model, "base_model_prefix", "")

    def rename(key: str) -> tuple[str, str | None, Any]:
        name = key
        for old, new in rules:
            name = old.sub(new, name)
        for candidate in (name, name.removeprefix(f"{prefix}."), f"{prefix}.{name}", key):
            if candidate in shapes:
                return candidate, None, None
        return name, None, None

    return rename


def _join(
    converter: Any, keys: Mapping[str, list[str]], name: str, shape: Shape, reader: CheckpointReader
) -> tuple[Piece, ...]:
    """Carry out on descriptions what transformers carries out on tensors."""
    groups: dict[str, list[_Joined]] = {
        pattern: [
            _Joined(reader.info(key).shape, (Piece(source=key, place=(), transposed=False),))
            for key in keys.get(pattern, [])
        ]
        for pattern in converter.source_patterns
    }
    for pattern, group in groups.items():
        if not group:
            raise CheckpointError(f"{reader.path} has no tensor {shown(pattern)}, a part of {shown(name)}.")
    values = list(groups.values())
    for operation in converter.operations:
        match type(operation).__name__:
            case "MergeModulelist":
                _check_complete(values, name, reader)
                values = [[_stack(group, operation.dim, name, reader)] for group in values]
            case "Concatenate":
                values = [
                    [_concatenate([one for group in values for one in group], operation.dim, name, reader)]
                ]
            case "Transpose":
                values = [[_transpose(one, operation, shape, name) for one in group] for group in values]
            case other:
                raise CheckpointError(
                    f"tensor {shown(name)} is made by transformers' operation {other} from several values, "
                    f"which cannot be read tensor by tensor. Load the model by from_pretrained, and save it "
                    f"with save_pretrained(..., save_original_format=False)."
                )
    joined = [one for group in values for one in group]
    if len(joined) != 1 or joined[0].shape != shape:
        first = joined[0].pieces[0].source
        raise CheckpointError(_disagreement(reader, first, joined[0].shape, name, shape))
    return joined[0].pieces


def _check_complete(groups: list[list[_Joined]], name: str, reader: CheckpointReader) -> None:
    counts = {len(group) for group in groups}
    if len(counts) > 1:
        fewest = min(groups, key=len)
        raise CheckpointError(
            f"{reader.path}: tensor {shown(name)} is stored in parts, and some are missing: there are "
            f"{max(counts)} of one kind, but {len(fewest)} like {shown(fewest[0].pieces[0].source)}."
        )


def _stack(group: list[_Joined], dim: int, name: str, reader: CheckpointReader) -> _Joined:
    shape = group[0].shape
    pieces: list[Piece] = []
    for number, one in enumerate(group):
        if one.shape != shape or dim != 0:
            raise CheckpointError(_disagreement(reader, one.pieces[0].source, one.shape, name, shape))
        pieces += [
            Piece(source=piece.source, place=(number, *piece.place), transposed=piece.transposed)
            for piece in one.pieces
        ]
    return _Joined((len(group), *shape), tuple(pieces))


def _concatenate(group: list[_Joined], dim: int, name: str, reader: CheckpointReader) -> _Joined:
    shape = group[0].shape
    pieces: list[Piece] = []
    end = 0
    for one in group:
        if (
            len(one.shape) != len(shape)
            or one.shape[:dim] + one.shape[dim + 1 :] != shape[:dim] + shape[dim + 1 :]
        ):
            raise CheckpointError(_disagreement(reader, one.pieces[0].source, one.shape, name, shape))
        start, end = end, end + one.shape[dim]
        for piece in one.pieces:
            place = [*piece.place, *[slice(None)] * (dim + 1 - len(piece.place))]
            place[dim] = slice(start, end)
            pieces.append(Piece(source=piece.source, place=tuple(place), transposed=piece.transposed))
    return _Joined((*shape[:dim], end, *shape[dim + 1 :]), tuple(pieces))


def _transpose(one: _Joined, operation: Any, shape: Shape, name: str) -> _Joined:
    if operation.check_dims and one.shape == shape:
        return one
    rank = len(one.shape)
    last_two = {operation.dim0 % rank, operation.dim1 % rank} == {rank - 2, rank - 1}
    if not last_two or any(piece.place for piece in one.pieces):
        raise CheckpointError(
            f"tensor {shown(name)} has dimensions {operation.dim0} and {operation.dim1} exchanged in the "
            f"checkpoint; only the last two of a whole tensor can be."
        )
    pieces = (Piece(source=piece.source, place=(), transposed=not piece.transposed) for piece in one.pieces)
    return _Joined((*one.shape[:-2], one.shape[-1], one.shape[-2]), tuple(pieces))


def _disagreement(reader: CheckpointReader, key: str, stored: Shape, name: str, wanted: Shape) -> str:
    target = "the model" if key == name else f"{shown(name)} of the model"
    return (
        f"{reader.info(key).file}: tensor {shown(key)} has shape {stored}, but {target} needs {wanted}; the "
        f"configuration and the weights are not of one model."
    )


def _natural(key: str) -> list[tuple[int, int, str]]:
    parts = key.split(".")
    return [(0, int(part), "") if part.isdecimal() and len(part) < 19 else (1, 0, part) for part in parts]
