"""Models of ONNX: files, and ``onnx.ModelProto`` objects."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from hamerspace._imports import has, need
from hamerspace.exceptions import ModelError, first_line
from hamerspace.models.info import ModelInfo, TensorSpec, fitted
from hamerspace.models.reading import check_exists
from hamerspace.models.source import ModelSource
from hamerspace.runtimes.base import Runner, RunOptions

SINGLE_FILE_LIMIT = (2 << 30) - (16 << 20)
"""Protobuf holds less than 2 GB; some is left for what is no weight."""
_SAME_NUMBERS = {"Cast", "Identity", "Reshape", "Squeeze", "Unsqueeze", "Flatten", "Transpose", "Expand"}
"""Operators whose output holds the numbers of their first input."""


def read(model: Any, *, input_shape: Any = None, name: str | None = None) -> ModelSource:
    """Read a model and find out its signature.

    Args:
        model: a path, or an ``onnx.ModelProto``.
        input_shape: lengths for axes that the model leaves free: one shape, a list of shapes, or shapes by
            name; None is an axis of any length.
        name: for reports.

    Raises:
        ModelNotFoundError: there is no such file.
        ModelError: it is no model of ONNX, is damaged, misses its external data, takes or gives what is no
            tensor of numbers, or gives NaN.
        ConstraintError: ``input_shape`` does not fit the model.
    """
    onnx = need("onnx")
    path: Path | None = None
    if isinstance(model, (str, Path)):
        path = Path(model).absolute()
        check_exists(path)
        check(path)
        proto = open_model(path, weights=False)
    elif isinstance(model, onnx.ModelProto):
        _check_proto(model, "the model")
        proto = model
    else:
        raise ModelError(f"the model is {type(model).__name__}; a path or an onnx.ModelProto is wanted")
    info = describe(proto, name or (path.stem if path else proto.graph.name or "model"), input_shape)
    info = replace(info, path=str(path) if path else None)
    source = ModelSource(info=info, model=None if path else model, path=path)
    if has("onnxruntime"):
        _try_once(source)
    return source


def load(source: ModelSource) -> Any:
    """Load the ``onnx.ModelProto`` with its weights."""
    if source.path is None:
        raise ModelError("the model is neither there nor on disk")
    return open_model(source.path)


def stage(source: ModelSource, folder: Path) -> Path:
    """Write a live model where a worker process can read it."""
    return save(source.model, folder / "model.onnx")


def original(source: ModelSource, options: RunOptions) -> Runner:
    """Return the model as it came in, run by ONNX Runtime."""
    from hamerspace.runtimes.onnxruntime import OnnxRunner, open_session

    given = source.path if source.path is not None else source.model.SerializeToString()
    return OnnxRunner(open_session(given, options), source.info.inputs, source.info.outputs)


def open_model(path: Path, *, weights: bool = True) -> Any:
    """Load a file; without ``weights``, what lies in other files is left there.

    Raises:
        ModelError: it is no model of ONNX, or is damaged.
    """
    onnx = need("onnx")
    message = need("google.protobuf.message")
    try:
        model = onnx.load(str(path), load_external_data=False)
        if weights:
            _check_data_files(model, path)
            onnx.load_external_data_for_model(model, str(path.parent))
    except (message.DecodeError, UnicodeDecodeError, onnx.checker.ValidationError) as error:
        raise ModelError(f"{path} is no model of ONNX, or is damaged: {first_line(error)}") from error
    if not model.ir_version or not (model.graph.node or model.graph.output):
        raise ModelError(f"{path} is no model of ONNX")
    return model


def save(model: Any, path: Path) -> Path:
    """Write a model; weights that one file cannot hold go into a second one, ``.data`` added to its name."""
    onnx = need("onnx")
    if model.ByteSize() < SINGLE_FILE_LIMIT:
        onnx.save(model, str(path))
    else:
        held = onnx.ModelProto()
        held.CopyFrom(model)
        onnx.save(held, str(path), save_as_external_data=True, location=f"{path.name}.data")
    return path


def check(path: Path) -> None:
    """Raise unless a file is a whole, valid model of ONNX.

    Raises:
        ModelError: with what is wrong with it.
    """
    onnx = need("onnx")
    model = open_model(path, weights=False)
    _check_data_files(model, path)
    try:
        onnx.checker.check_model(str(path))
    except onnx.checker.ValidationError as error:
        raise ModelError(f"{path} is no valid model of ONNX: {first_line(error)}") from error


def data_files(model: Any) -> dict[str, int]:
    """Names of the files in which a model's external data lies, and how long each has to be."""
    found: dict[str, int] = {}
    for tensor in (one for part in (model.graph, *model.functions) for one in tensors_of(part)):
        entries = {one.key: one.value for one in tensor.external_data}
        if "location" in entries and tensor.data_location == tensor.EXTERNAL:
            end = int(entries.get("offset", 0)) + int(entries.get("length", 0))
            found[entries["location"]] = max(found.get(entries["location"], 0), end)
    return found


def tensors_of(graph: Any) -> Iterator[Any]:
    """Yield each stored tensor: initialisers, and constants of nodes, of subgraphs too.

    Args:
        graph: of a model, or one of a model's functions, which has nodes alone.
    """
    yield from getattr(graph, "initializer", ())
    for sparse in getattr(graph, "sparse_initializer", ()):
        yield from (sparse.values, sparse.indices)
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("t"):
                yield attribute.t
            if attribute.HasField("sparse_tensor"):
                yield from (attribute.sparse_tensor.values, attribute.sparse_tensor.indices)
            yield from attribute.tensors
            for inner in (*((attribute.g,) if attribute.HasField("g") else ()), *attribute.graphs):
                yield from tensors_of(inner)


def describe(model: Any, name: str, input_shape: Any = None) -> ModelInfo:
    """Write down what a model takes and gives.

    Raises:
        ModelError: an input or output is no tensor of numbers.
        ConstraintError: ``input_shape`` does not fit.
    """
    graph = model.graph
    stored = {tensor.name for tensor in graph.initializer}
    highs = _highs(graph)
    inputs = [_spec(one, highs.get(one.name)) for one in graph.input if one.name not in stored]
    if not inputs:
        raise ModelError(f"{name} takes no inputs")
    # The axis that grows with the first input's samples is known where those have a name.
    samples = inputs[0].shape[0] if inputs[0].shape else None
    outputs = tuple(_with_batch_axis(_spec(one), samples) for one in graph.output)
    inputs = fitted(inputs, input_shape)
    # Integers of these widths are shapes and indices, not weights.
    weights = [
        one
        for one in tensors_of(graph)
        if one.data_type not in (element_types().INT64, element_types().INT32)
    ]
    return ModelInfo(
        framework="onnx",
        name=name,
        inputs=inputs,
        outputs=outputs,
        structure="tensor" if len(outputs) == 1 else "dict",
        parameters=sum(math.prod(one.dims) for one in weights),
        size_bytes=sum(_bytes(one) for one in tensors_of(graph)),
        form="onnx",
    )


def _with_batch_axis(spec: TensorSpec, samples: int | str | None) -> TensorSpec:
    if isinstance(samples, str) and samples in spec.shape:
        return replace(spec, batch_axis=spec.shape.index(samples))
    return spec


def element_types() -> Any:
    """ONNX's enumeration of element types."""
    return need("onnx").TensorProto


def _bytes(tensor: Any) -> int:
    dtype = need("onnx").helper.tensor_dtype_to_np_dtype(tensor.data_type)
    count = math.prod(tensor.dims)
    if dtype.name in ("int4", "uint4", "float4_e2m1fn"):
        return (count + 1) // 2
    return count * dtype.itemsize


def _spec(value: Any, high: int | None = None) -> TensorSpec:
    onnx = need("onnx")
    tensor = value.type.tensor_type
    if not value.type.HasField("tensor_type") or tensor.elem_type in (0, onnx.TensorProto.STRING):
        raise ModelError(f"{value.name} is no tensor of numbers, and only those are supported")
    dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type)
    shape: list[int | str] = []
    for axis, length in enumerate(tensor.shape.dim):
        if length.dim_value > 0:
            shape.append(length.dim_value)
        else:
            shape.append(length.dim_param or ("batch" if axis == 0 else f"axis_{axis}"))
    return TensorSpec(name=value.name, dtype=dtype.name, shape=tuple(shape), high=high)


def _highs(graph: Any) -> dict[str, int]:
    """How many rows the tables have that an input's numbers are looked up in, by input."""
    tables = {tensor.name: list(tensor.dims) for tensor in graph.initializer}
    origin = {value.name: value.name for value in graph.input}
    found: dict[str, int] = {}
    for node in graph.node:
        first = node.input[0] if node.input else ""
        if node.op_type in _SAME_NUMBERS and first in origin:
            origin[node.output[0]] = origin[first]
        elif node.op_type == "DequantizeLinear" and first in tables:
            tables[node.output[0]] = tables[first]
        elif node.op_type == "Gather" and first in tables and node.input[1] in origin:
            axis = next((one.i for one in node.attribute if one.name == "axis"), 0)
            name, rows = origin[node.input[1]], tables[first][axis]
            found[name] = min(found.get(name, rows), rows)
    return found


def _check_proto(model: Any, where: str) -> None:
    onnx = need("onnx")
    try:
        if model.ByteSize() < SINGLE_FILE_LIMIT:
            onnx.checker.check_model(model)
    except onnx.checker.ValidationError as error:
        raise ModelError(f"{where} is no valid model of ONNX: {first_line(error)}") from error


def _check_data_files(model: Any, path: Path) -> None:
    for name, length in data_files(model).items():
        file = path.parent / name
        if not file.resolve().is_relative_to(path.parent.resolve()):
            raise ModelError(f"{path} names external data {name!r}, which leads out of its folder")
        if not file.is_file():
            raise ModelError(f"{path} needs its external data {name}, which is not beside it")
        if file.stat().st_size < length:
            raise ModelError(f"{file} is truncated: {path.name} needs {length:,} bytes of it")


def _try_once(source: ModelSource) -> None:
    """Run a model once, so that one that cannot run, or gives NaN, is known before long work starts."""
    try:
        outputs = original(source, RunOptions(threads=1)).run(source.info.draw(1))
    except ModelError:
        raise
    except Exception as error:
        raise ModelError(
            f"{source.info.name} fails in ONNX Runtime on inputs drawn to its signature: "
            f"{first_line(error)}; give input_shape if it needs other lengths"
        ) from error
    for name, array in outputs.items():
        if array.dtype.kind == "f" and np.isnan(array).any():
            raise ModelError(f"the model gives NaN in {name!r}; look for weights that are NaN")
