"""A model of TensorFlow as one compiled function with named inputs and outputs."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, cast

from hamerspace._imports import need
from hamerspace.exceptions import ModelError
from hamerspace.models.info import Structure, TensorSpec
from hamerspace.runtimes._tensorflow_library import keras, quiet, tensorflow

SIGNATURE: Final = "serving_default"
"""The signature under which SavedModels have what a caller runs."""
_SHAPE_OPS: Final = ("Shape", "ShapeN", "Size", "Rank", "OnesLike", "ZerosLike")
"""What depends on lengths alone."""
GATHERS: Final = {"GatherV2": 1, "ResourceGather": 1, "Gather": 1}
"""Lookups in a table, with the place of the indices among their inputs."""


@dataclass(frozen=True, kw_only=True)
class Endpoint:
    """A function of a graph, as a SavedModel has it, in place of a Keras model."""

    function: Any
    """Concrete; takes tensors by the names in `inputs`."""
    owner: Any
    """Holds the function's variables, and can be saved."""
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    structure: Structure

    def __call__(self, tensors: Sequence[Any]) -> Any:
        """Return outputs by name."""
        given = self.function(**dict(zip(self.inputs, tensors, strict=True)))
        return {name: given[name] for name in self.outputs}


@dataclass(frozen=True, kw_only=True)
class Traced:
    """What `trace` gives."""

    function: Any
    """A concrete function: takes tensors by position or name, gives tensors by name."""
    owner: Any
    """Holds the variables; the function does not keep them alive."""
    structure: Structure
    outputs: tuple[TensorSpec, ...]


def caller_of(model: Any) -> Callable[[Sequence[Any]], Any]:
    """Return a function of tensors in the order of the model's inputs, in evaluation mode."""
    if isinstance(model, Endpoint):
        return model
    if len(model.inputs) == 1 and not isinstance(_input_structure(model), (dict, list, tuple)):
        return lambda tensors: model(tensors[0], training=False)
    structure = _input_structure(model)
    return lambda tensors: model(keras().tree.pack_sequence_as(structure, list(tensors)), training=False)


def _input_structure(model: Any) -> Any:
    inputs = model.inputs
    return getattr(model, "_inputs_struct", inputs if len(inputs) > 1 else inputs[0])


def trace(
    call: Callable[[Sequence[Any]], Any],
    owner: Any,
    inputs: Sequence[TensorSpec],
    names: Sequence[str] | None = None,
    structure: Structure | None = None,
) -> Traced:
    """Compile a call of a model into one function.

    Args:
        call: takes tensors in the order of ``inputs``.
        owner: holds the variables.
        inputs: dtypes and shapes to compile for; an axis with a name stays of any length.
        names: of the outputs, where the call itself gives none.
        structure: of the outputs, where it is another than the call's.

    Raises:
        ModelError: the call fails, or gives no tensors.
    """
    tf = tensorflow()
    found: dict[str, Structure] = {}

    def body(*tensors: Any) -> dict[str, Any]:
        found["structure"], outputs = named_tensors(call(tensors), names)
        # numpy, and so every runtime's edge, has no bfloat16.
        return {
            name: tf.cast(one, tf.float32) if one.dtype == tf.bfloat16 else tf.identity(one)
            for name, one in outputs.items()
        }

    signature = [tf.TensorSpec(free_shape(spec), spec.dtype, name=spec.name) for spec in inputs]
    try:
        with quiet():
            function = tf.function(body, input_signature=signature, autograph=False).get_concrete_function()
    except Exception as error:
        raise ModelError(
            f"the model cannot be called with {describe(inputs)}: {first_line(error)}; give "
            "input_shape that fits"
        ) from error
    outputs = tuple(
        TensorSpec(
            name=name,
            dtype=tensor.dtype.name,
            shape=tuple(
                length if length is not None else "batch" if axis == 0 else f"axis_{axis}"
                for axis, length in enumerate(tensor.shape.as_list() if tensor.shape.rank is not None else [])
            ),
        )
        for name, tensor in function.structured_outputs.items()
    )
    order = list(names or ())
    if set(order) == {spec.name for spec in outputs}:
        outputs = tuple(sorted(outputs, key=lambda spec: order.index(spec.name)))
    return Traced(function=function, owner=owner, structure=structure or found["structure"], outputs=outputs)


def named_tensors(value: Any, names: Sequence[str] | None) -> tuple[Structure, dict[str, Any]]:
    """Return the structure that a call gave and its tensors by name.

    Raises:
        TypeError: it holds what is no tensor.
    """
    tf, kind = tensorflow(), type(value).__name__
    if isinstance(value, Mapping):
        pairs = cast("Mapping[Any, Any]", value)
        structure, found = (
            "dict",
            dict(zip(unique([str(name) for name in pairs]), pairs.values(), strict=True)),
        )
    elif isinstance(value, (list, tuple)):
        values = list(cast("Sequence[Any]", value))
        usable = names if names is not None and len(names) == len(values) else None
        structure = "tuple"
        found = dict(zip(usable or [f"output_{place}" for place in range(len(values))], values, strict=True))
    else:
        structure, found = "tensor", {names[0] if names and len(names) == 1 else "output": value}
    tensors: list[Any] = list(found.values())
    if not tensors or not all(tf.is_tensor(one) and isinstance(one, tf.Tensor) for one in tensors):
        raise TypeError(f"it gives {kind}, which holds other things than dense tensors")
    if structure == "dict" and names is not None and set(names) == set(found):
        found = {name: found[name] for name in names}
    return structure, found  # pyright: ignore[reportReturnType]


def unique(names: Sequence[str]) -> list[str]:
    """Return names that every format takes: letters, digits and underscores, each name once."""
    found: list[str] = []
    for name in names:
        plain = re.sub(r"\W", "_", name, flags=re.ASCII)
        plain = f"_{plain}" if not plain or plain[0].isdigit() else plain
        place = 1
        while (candidate := plain if place == 1 else f"{plain}_{place}") in found:
            place += 1
        found.append(candidate)
    return found


def free_shape(spec: TensorSpec) -> tuple[int | None, ...]:
    """Lengths, None where any goes."""
    return tuple(length if isinstance(length, int) else None for length in spec.shape)


def describe(inputs: Sequence[TensorSpec]) -> str:
    """Name inputs with dtypes and shapes, for a message."""
    return ", ".join(f"{spec.name} {spec.dtype}{list(spec.shape)}" for spec in inputs)


def first_line(error: BaseException) -> str:
    """Return what an exception says, short."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if lines and lines[0] == "Graph execution error:":
        # The reason is behind the trace, before the name of the node.
        nodes = [place for place, line in enumerate(lines) if line.startswith("[[")]
        lines = lines[nodes[0] - 1 :] if nodes else lines
    return f"{type(error).__name__}: {lines[0][:300]}" if lines else type(error).__name__


def frozen(function: Any) -> Any:
    """Return a concrete function with its variables as constants and the functions it calls inlined."""
    tensorflow()
    with quiet():
        conversion = need("tensorflow.python.framework.convert_to_constants")
        return conversion.convert_variables_to_constants_v2(function)


def trace_frozen(traced: Traced, inputs: Sequence[TensorSpec]) -> Traced:
    """Freeze a compiled function, and compile that one with the same names."""
    tf = tensorflow()
    inlined, pattern = frozen(traced.function), traced.function.structured_outputs

    def call(tensors: Sequence[Any]) -> Any:
        held = dict(zip([spec.name for spec in inputs], tensors, strict=True))
        given = inlined(*[held[tensor.op.name] for tensor in inlined.inputs])
        return tf.nest.pack_sequence_as(pattern, given if isinstance(given, list) else [given])

    names = [spec.name for spec in traced.outputs]
    return trace(call, tf.Module(), inputs, names, traced.structure)


def vocabularies(function: Any) -> dict[str, int]:
    """Find inputs whose values are looked up in tables, such as token ids, with the smallest table's length.

    A value is followed through operations whose result is integer, which takes in the casts and the turning
    of negative indices that Keras puts before a lookup; what depends on lengths alone is not followed.

    Args:
        function: frozen.
    """
    tf = tensorflow()
    found: dict[str, int] = {}
    for tensor in function.inputs:
        reached: list[Any] = [tensor]
        seen: set[str] = set()
        while reached:
            for operation in reached.pop().consumers():
                if operation.name in seen or operation.type in _SHAPE_OPS:
                    continue
                seen.add(operation.name)
                place = GATHERS.get(operation.type)
                if place is None:
                    reached.extend(one for one in operation.outputs if one.dtype in (tf.int32, tf.int64))
                    continue
                table = operation.inputs[0].shape
                if table.rank == 2 and table[0] and table[0] > 1:
                    name = tensor.op.name
                    found[name] = min(found.get(name, table[0]), table[0])
    return found
