"""The format fake: quantised weights as the numbers that they stand for, in the checkpoint's own layout.

Whatever loads the float checkpoint loads this one, with the results of the quantised model and the size of
the float one. Activations are not quantised in it.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from auto_round.export._files_beside import copy_files
from auto_round.export._shards import PlannedTensor, write_shards
from auto_round.export._tensors import CheckpointTensors, LayerRows, ModuleTensors, Part, parts_of_layers
from auto_round.quantization._results import ResultStore
from auto_round.quantization._source import CheckpointModel, FloatModel


def write_fake(source: FloatModel, store: ResultStore, folder: Path, max_shard_bytes: int) -> None:
    """Write the weights, and what stands beside them but the tokenizer.

    A checkpoint gets its own names back, its experts one by one, its own types, and each tensor that is not
    quantised byte by byte. A module in memory, which holds the quantised weights already, is saved by its own
    `save_pretrained`, or as its state dict where it has none.

    Raises:
        ExportError: A file cannot be written, or a layer has no place in the checkpoint.
        CheckpointError: The checkpoint cannot be read.
    """
    model: Any = source.model
    if isinstance(source, CheckpointModel):
        write_shards(folder, fake_plan(source, store), max_shard_bytes)
        copy_files(source.weights.reader.path, folder)
    elif hasattr(model, "save_pretrained"):
        model.save_pretrained(str(folder), max_shard_size=max_shard_bytes)
    else:
        tensors = ModuleTensors(source.model)
        write_shards(folder, [tensors.copy(name) for name in tensors.names], max_shard_bytes)


def fake_plan(source: CheckpointModel, store: ResultStore) -> list[PlannedTensor]:
    """Return the checkpoint's tensors, in its order as far as parts of a layer can follow each other.

    Raises:
        ExportError: A layer has no place of its own in the checkpoint.
    """
    tensors = CheckpointTensors(source.weights)
    rows = LayerRows(store)
    quantised: dict[str, list[PlannedTensor]] = {}
    for layer, parts in parts_of_layers(source, tensors, store.layers):
        planned = [_planned(rows, layer.name, part, tensors.copy(part.name).dtype) for part in parts]
        quantised.update({part.name: planned for part in parts})
    plan: dict[str, PlannedTensor] = {}
    for name in tensors.names:
        for tensor in quantised.get(name) or [tensors.copy(name)]:
            plan[tensor.name] = tensor
    return list(plan.values())


def _planned(rows: LayerRows, layer: str, part: Part, dtype: torch.dtype) -> PlannedTensor:
    return PlannedTensor(
        name=part.name, dtype=dtype, shape=part.shape, pieces=partial(_values, rows, layer, part, dtype)
    )


def _values(rows: LayerRows, layer: str, part: Part, dtype: torch.dtype) -> Iterator[Tensor]:
    yield part.stored(rows.read(layer, part.rows).dequantize(dtype))
