"""The float tensors that an export begins with, and which of them are parts of quantised layers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Container, Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from auto_round.exceptions import ExportError
from auto_round.export._shards import PlannedTensor
from auto_round.low_cpu_mem._weights import ModelWeights
from auto_round.quantization._layers import Layer, find_layers
from auto_round.quantization._quantized import QuantizedWeight
from auto_round.quantization._results import ResultStore
from auto_round.quantization._source import CheckpointModel, FloatModel

_PIECE_BYTES = 8 << 20


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """A tensor that is some rows of a layer's matrix [rows, in]; mostly it is all of them.

    The weights of all experts are one layer, and in checkpoints a tensor for each expert and matrix.
    """

    name: str
    """The tensor's name."""
    shape: tuple[int, ...]
    """The tensor's shape."""
    rows: slice
    """Which rows."""
    transposed: bool
    """The tensor is [.., in, out], as Conv1D has it."""

    def stored(self, matrix: Tensor) -> Tensor:
        """Return rows of a matrix, `matrix[self.rows]`, in the shape and order of the tensor."""
        if not self.transposed:
            return matrix.view(self.shape)
        return matrix.view(*self.shape[:-2], self.shape[-1], self.shape[-2]).mT.contiguous()


class FloatTensors(ABC):
    """Tensors under the names that an export gives them, those that are tied once."""

    names: tuple[str, ...]
    """Their names."""

    @abstractmethod
    def parts(self, layer: Layer) -> tuple[Part, ...]:
        """Return the tensors that make up a layer's weight.

        Raises:
            ExportError: One of them is not whole rows of it.
        """

    @abstractmethod
    def copy(self, name: str) -> PlannedTensor:
        """Return the plan that copies a tensor as it is."""


class CheckpointTensors(FloatTensors):
    """All tensors of a checkpoint, under its own names.

    Args:
        weights: The checkpoint's.
    """

    def __init__(self, weights: ModelWeights) -> None:
        self._weights = weights
        self._reader = weights.reader
        self.names = weights.reader.names

    def parts(self, layer: Layer) -> tuple[Part, ...]:
        """Return the tensors that make up a layer's weight."""
        shape = layer.weight.shape
        width = shape[-2 if layer.transposed else -1]
        # Views without memory of their own that say in which row and column of the matrix each value is.
        row = torch.arange(layer.weight.numel() // width, device="cpu").unsqueeze(1).expand(-1, width)
        column = torch.arange(width, device="cpu").expand(len(row), width)
        found: list[Part] = []
        for piece in self._weights.pieces(layer.parameter_name):
            rows, columns = (_like(index, shape, layer.transposed)[piece.place] for index in (row, column))
            if layer.transposed:
                rows, columns = rows.mT, columns.mT
            numbers = rows[..., 0].reshape(-1)
            start, stop = int(numbers[0]), int(numbers[-1]) + 1
            in_order = torch.equal(numbers, torch.arange(start, stop, device="cpu"))
            if not in_order or not torch.equal(columns[(0,) * (columns.ndim - 1)], column[0]):
                raise ExportError(
                    f"{piece.source} of the checkpoint is not whole rows of {layer.name}, so the quantised "
                    "weights cannot be written under the checkpoint's names; leave the layer out in "
                    "quantization.ignore_layers."
                )
            part = Part(
                name=piece.source,
                shape=self._reader.info(piece.source).shape,
                rows=slice(start, stop),
                transposed=layer.transposed != piece.transposed,
            )
            found.append(part)
        return tuple(found)

    def copy(self, name: str) -> PlannedTensor:
        """Return the plan that copies a tensor as it is."""
        info = self._reader.info(name)
        return PlannedTensor(name=name, dtype=info.dtype, shape=info.shape, pieces=partial(self._read, name))

    def _read(self, name: str) -> Iterator[Tensor]:
        info = self._reader.info(name)
        if info.bytes <= _PIECE_BYTES or not info.shape:
            yield self._reader.read(name)
            return
        step = max(1, _PIECE_BYTES * info.shape[0] // info.bytes)
        for start in range(0, info.shape[0], step):
            yield self._reader.read_rows(name, slice(start, min(start + step, info.shape[0])))


class ModuleTensors(FloatTensors):
    """The state of a module in memory, under its own names.

    Args:
        model: The module.
    """

    def __init__(self, model: nn.Module) -> None:
        self._tensors: dict[str, Tensor] = {}
        seen: set[int] = set()
        for name, tensor in model.state_dict(keep_vars=True).items():
            if isinstance(tensor, Tensor) and id(tensor) not in seen:
                seen.add(id(tensor))
                self._tensors[name] = tensor.detach()
        self.names = tuple(self._tensors)

    def parts(self, layer: Layer) -> tuple[Part, ...]:
        """Return the tensors that make up a layer's weight: one."""
        shape = tuple(layer.weight.shape)
        rows = layer.weight.numel() // shape[-2 if layer.transposed else -1]
        name = layer.parameter_name
        return (Part(name=name, shape=shape, rows=slice(0, rows), transposed=layer.transposed),)

    def copy(self, name: str) -> PlannedTensor:
        """Return the plan that copies a tensor as it is."""
        tensor = self._tensors[name]
        shape = tuple(tensor.shape)
        return PlannedTensor(name=name, dtype=tensor.dtype, shape=shape, pieces=lambda: (tensor.cpu(),))


class LayerRows:
    """Reads rows of quantised layers, of which the last one is kept: parts of one layer follow each other.

    Args:
        store: Has the layers.
    """

    def __init__(self, store: ResultStore) -> None:
        self._store = store
        self._name: str | None = None
        self._weight: QuantizedWeight | None = None

    def read(self, layer: str, rows: slice) -> QuantizedWeight:
        """Return some rows of a layer."""
        if self._weight is None or self._name != layer:
            self._weight = None
            self._name, self._weight = layer, self._store.read(layer)
        weight = self._weight
        zero = None if weight.zero is None else weight.zero[rows]
        return replace(weight, codes=weight.codes[rows], scale=weight.scale[rows], zero=zero)


def float_tensors(source: FloatModel) -> FloatTensors:
    """Return the tensors of a float model."""
    if isinstance(source, CheckpointModel):
        return CheckpointTensors(source.weights)
    return ModuleTensors(source.model)


def parts_of_layers(
    source: FloatModel, tensors: FloatTensors, layers: Container[str]
) -> Iterator[tuple[Layer, tuple[Part, ...]]]:
    """Yield the layers of these names, and the tensors that make them up.

    Raises:
        ExportError: As for `FloatTensors.parts`, or two layers are one tensor.
    """
    owners: dict[str, str] = {}
    for layer in find_layers(source.model):
        if layer.name in layers:
            parts = tensors.parts(layer)
            for part in parts:
                if owners.setdefault(part.name, layer.name) != layer.name:
                    raise ExportError(
                        f"{layer.name} and {owners[part.name]} share their weight {part.name}, and were "
                        "quantised apart; leave both out in quantization.ignore_layers, or untie them."
                    )
            yield layer, parts


def _like(matrix: Tensor, shape: torch.Size, transposed: bool) -> Tensor:
    """Return a matrix [rows, in] as the model stores it."""
    if not transposed:
        return matrix.view(shape)
    return matrix.view(*shape[:-2], shape[-1], shape[-2]).mT
