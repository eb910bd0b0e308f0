"""Models of TensorFlow: Keras models live or as .keras and .h5, and SavedModels."""

from __future__ import annotations

import inspect
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np

from hamerspace._arrays import as_array
from hamerspace.exceptions import ModelError, ModelInputError
from hamerspace.models._keras_files import is_standard, open_keras
from hamerspace.models._saved_model_files import endpoint_of, open_saved_model, write_saved_model
from hamerspace.models._tensorflow_graph import (
    GATHERS,
    Endpoint,
    Traced,
    caller_of,
    describe,
    first_line,
    frozen,
    trace,
    unique,
    vocabularies,
)
from hamerspace.models.info import Array, ModelInfo, Structure, TensorSpec, fitted, shapes_of
from hamerspace.models.reading import check_exists
from hamerspace.models.source import ModelSource
from hamerspace.runtimes._tensorflow_library import keras, tensorflow
from hamerspace.runtimes.base import Runner, RunOptions


def read(
    model: Any,
    *,
    input_shape: Any = None,
    example_inputs: Any = None,
    name: str | None = None,
) -> ModelSource:
    """Read a model and find out its signature.

    A path is read in a process of its own where TensorFlow is not loaded in this one, which then stays
    without it.

    Args:
        model: a Keras 3 model, what ``tf.saved_model.load`` gave, a .keras or .h5 file, or a SavedModel's
            folder. No Python code in a file is executed.
        input_shape: one shape, a list of shapes, or shapes by name, where the model leaves lengths open; None
            is an axis of any length.
        example_inputs: a tensor, a tuple of tensors, or tensors by name; they fix open lengths other than the
            batch, and say what a subclassed model that has not been called takes.
        name: for reports.

    Raises:
        ModelNotFoundError: there is no such file.
        ModelError: it is no model of TensorFlow, is damaged, or what it takes cannot be found out.
        UnsafeModelError: the file holds code.
        ConstraintError: ``input_shape`` does not fit.
        ModelInputError: ``example_inputs`` do not fit.
        ImportError: TensorFlow is not installed.
        WorkerError: the process that read the path crashed.
    """
    if not isinstance(model, (str, Path)):
        return _described(model, None, input_shape, example_inputs, name)
    # As another process may be in another folder.
    path = Path(model).absolute()
    check_exists(path)
    if "tensorflow" in sys.modules:
        return read_here(path, input_shape=input_shape, example_inputs=example_inputs, name=name)
    from hamerspace.measure.elsewhere import describe_elsewhere

    # As arrays, for another process may have neither the library nor the device of a tensor.
    examples = _examples(example_inputs)
    return describe_elsewhere(path, input_shape=input_shape, example_inputs=examples, name=name)


def read_here(
    path: Path, *, input_shape: Any = None, example_inputs: Any = None, name: str | None = None
) -> ModelSource:
    """Read a path as `read` does, in this process whatever is loaded in it."""
    return _described(_open(path), path, input_shape, example_inputs, name)


def _described(
    model: Any, path: Path | None, input_shape: Any, example_inputs: Any, name: str | None
) -> ModelSource:
    model, specs = _opened(model, input_shape, example_inputs)
    specs = _with_examples(fitted(specs, input_shape), example_inputs)
    traced = trace_model(model, specs)
    inlined = frozen(traced.function) if isinstance(model, Endpoint) or _looks_up(traced) else None
    if inlined is not None:
        highs = vocabularies(inlined)
        specs = tuple(replace(spec, high=highs.get(spec.name)) for spec in specs)
    form = "saved_model" if isinstance(model, Endpoint) else "keras"
    parameters, size_bytes = _weights(model, inlined)
    info = ModelInfo(
        framework="tensorflow",
        name=name or (path.stem if path else _name_of(model)),
        inputs=specs,
        outputs=traced.outputs,
        structure=traced.structure,
        parameters=parameters,
        size_bytes=size_bytes,
        form=form,
        path=str(path) if path else None,
    )
    _try(traced, info)
    # A file whose classes only this process knows is of no use to another.
    kept = path if path is not None and (form == "keras") == path.is_file() else None
    return ModelSource(info=info, model=model, path=kept)


def load(source: ModelSource) -> Any:
    """Load what `stage` or `read` have on disk: a Keras model, or an `Endpoint` of a SavedModel."""
    if source.path is None:
        raise ModelError("the model is neither there nor on disk")
    return _open(source.path)


def stage(source: ModelSource, folder: Path) -> Path:
    """Write a live model where a worker process can read it."""
    if source.path is not None:
        return source.path
    if source.info.form == "keras":
        target = folder / "model.keras"
        source.model.save(target, include_optimizer=False)
        return target
    target = folder / "saved_model"
    export_saved_model(source, target)
    return target


def original(source: ModelSource, options: RunOptions) -> Runner:
    """Return the model as it came in, compiled into one function.

    That is what a careful user of TensorFlow runs: calling a Keras model itself takes many times longer.
    """
    from hamerspace.runtimes.tensorflow import FunctionRunner, start

    start(options)
    return FunctionRunner(traced_of(source), source.info.inputs, source.info.outputs, options)


def traced_of(source: ModelSource) -> Traced:
    """Compile a model for the names and shapes of its info.

    Raises:
        ModelError: the model does not take inputs of these shapes.
    """
    model, info = source.load(), source.info
    if info.form == "saved_model" and not isinstance(model, Endpoint):
        drawn = info.draw(1)
        by_place = [spec.name for spec in info.inputs] == _places(len(info.inputs))
        model = _opened(model, None, tuple(drawn.values()) if by_place else drawn)[0]
    return trace_model(model, info.inputs, info.outputs, info.structure)


def trace_model(
    model: Any,
    inputs: Sequence[TensorSpec],
    outputs: Sequence[TensorSpec] = (),
    structure: Structure | None = None,
) -> Traced:
    """Compile a Keras model or an `Endpoint` for these inputs, its outputs called as ``outputs`` says."""
    names = [spec.name for spec in outputs]
    if not isinstance(model, Endpoint):
        return trace(caller_of(model), model, inputs, names or _output_names(model), structure)
    # A SavedModel orders its inputs by name, whatever their order was: names count where they agree.
    takes, gives = unique(model.inputs), unique(model.outputs)
    names = names or gives
    wanted = [spec.name for spec in inputs]
    taken = wanted if set(wanted) == set(takes) else takes
    given_as = gives if set(names) == set(gives) else names

    def call(tensors: Sequence[Any]) -> dict[str, Any]:
        held = dict(zip(taken, tensors, strict=True))
        given = dict(zip(given_as, model([held[name] for name in takes]).values(), strict=True))
        return {name: given[name] for name in names}

    return trace(call, model.owner, inputs, names, structure or model.structure)


def export_saved_model(source: ModelSource, folder: Path) -> None:
    """Write a model as a SavedModel, whatever form it came in.

    Its signature ``serving_default`` has the names, order, dtypes and shapes of ``source.info``; an axis that
    has a name there is of any length.

    Raises:
        ModelError: the model does not take inputs of these shapes.
    """
    write_saved_model(traced_of(source), folder)


def _open(path: Path) -> Any:
    if not path.is_dir():
        return open_keras(path)
    if not (path / "saved_model.pb").is_file():
        raise ModelError(f"{path} has no saved_model.pb, so it is no SavedModel")
    return open_saved_model(path)


def _opened(model: Any, input_shape: Any, example_inputs: Any) -> tuple[Any, tuple[TensorSpec, ...]]:
    """Return a Keras model whose file can be read anywhere, or an `Endpoint`, with what it takes."""
    if not isinstance(model, Endpoint) and hasattr(model, "signatures"):
        model = endpoint_of(model, "the model")
    if isinstance(model, Endpoint):
        return model, _endpoint_specs(model)
    if not isinstance(model, keras().Model):
        raise ModelError(
            f"the model is {type(model).__module__}.{type(model).__name__}; a Keras 3 model, what "
            "tf.saved_model.load gives, or a path of either is wanted"
        )
    if not model.built:
        raise ModelError("the model has no weights yet; call it once, or load its weights, first")
    if getattr(model, "inputs", None):
        specs = _keras_specs(model)
        if is_standard(model):
            return model, specs
        call = caller_of(model)
    else:
        specs, call = _subclassed(model, input_shape, example_inputs)
    traced = trace(call, model, specs, _output_names(model))
    names = tuple(spec.name for spec in specs)
    endpoint = Endpoint(
        function=traced.function,
        owner=model,
        inputs=names,
        outputs=tuple(spec.name for spec in traced.outputs),
        structure=traced.structure,
    )
    return endpoint, specs


def _keras_specs(model: Any) -> tuple[TensorSpec, ...]:
    # A tensor's own name is another in each process; its layer's is the model's.
    layers = [
        getattr(getattr(tensor, "_keras_history", None), "operation", tensor) for tensor in model.inputs
    ]
    names = unique([layer.name for layer in layers])
    return tuple(
        _spec(name, tensor.dtype, tuple(tensor.shape))
        for name, tensor in zip(names, model.inputs, strict=True)
    )


def _endpoint_specs(model: Endpoint) -> tuple[TensorSpec, ...]:
    taken = model.function.structured_input_signature[1]
    specs: list[TensorSpec] = []
    for key, name in zip(model.inputs, unique(model.inputs), strict=True):
        shape = taken[key].shape
        if shape.rank is None:
            raise ModelError(
                f"input {key} has no fixed number of axes; save the model with a TensorSpec that has"
            )
        specs.append(_spec(name, taken[key].dtype.name, tuple(shape.as_list())))
    return tuple(specs)


def _spec(name: str, dtype: str, shape: tuple[int | None, ...]) -> TensorSpec:
    # An edge of numpy's dtypes: bfloat16 is cast inside the compiled function.
    dtype = "float32" if dtype == "bfloat16" else dtype
    try:
        np.dtype(dtype)
    except TypeError as error:
        raise ModelError(
            f"input {name} takes {dtype}, and only numbers are taken; leave what turns text into numbers out "
            "of the model"
        ) from error
    lengths = (
        length if length is not None else "batch" if axis == 0 else f"axis_{axis}"
        for axis, length in enumerate(shape)
    )
    return TensorSpec(name=name, dtype=dtype, shape=tuple(lengths))


def _subclassed(
    model: Any, input_shape: Any, example_inputs: Any
) -> tuple[tuple[TensorSpec, ...], Callable[[Sequence[Any]], Any]]:
    """Describe a model of whose inputs Keras knows nothing, from what the caller gave."""
    if example_inputs is not None:
        examples = _arrays(example_inputs)
        keys: list[str] | None = list(examples) if isinstance(example_inputs, Mapping) else None
        dtypes = [array.dtype.name for array in examples.values()]
        shapes = [(None, *array.shape[1:]) for array in examples.values()]
    elif input_shape is not None:
        given = shapes_of(input_shape, []) or []
        keys = list(cast("Mapping[str, Any]", input_shape)) if isinstance(input_shape, Mapping) else None
        dtypes = ["float32"] * len(given)
        shapes = [tuple(n if isinstance(n, int) else None for n in shape) for shape in given]
    else:
        raise ModelError(
            f"what {type(model).__name__} takes cannot be told from the model; give input_shape or "
            "example_inputs"
        )
    names = keys or _places(len(shapes))
    specs = tuple(
        _spec(name, dtype, shape) for name, dtype, shape in zip(unique(names), dtypes, shapes, strict=True)
    )
    positional = [
        one
        for one in inspect.signature(model.call).parameters.values()
        if one.default is one.empty and one.kind is one.POSITIONAL_OR_KEYWORD
    ]
    apart = keys is None and len(specs) == len(positional)

    def call(tensors: Sequence[Any]) -> Any:
        if apart:
            return model(*tensors, training=False)
        return model(dict(zip(keys, tensors, strict=True)) if keys else list(tensors), training=False)

    return specs, call


def _with_examples(specs: tuple[TensorSpec, ...], example_inputs: Any) -> tuple[TensorSpec, ...]:
    """Fix open lengths, but for the batch, to those of examples."""
    if example_inputs is None:
        return specs
    examples = _arrays(example_inputs)
    arrays = (
        [examples.get(spec.name) for spec in specs]
        if isinstance(example_inputs, Mapping)
        else list(examples.values())
    )
    fits = len(arrays) == len(specs) and all(
        array is not None
        and array.ndim == len(spec.shape)
        and (array.dtype.kind in "iub") == spec.is_integer
        and all(isinstance(n, str) or n == array.shape[axis] for axis, n in enumerate(spec.shape))
        for array, spec in zip(arrays, specs, strict=True)
    )
    if not fits:
        given = {name: f"{array.dtype.name}{list(array.shape)}" for name, array in examples.items()}
        raise ModelInputError(f"example_inputs are {given}, and the model takes {describe(specs)}")
    return tuple(
        replace(
            spec,
            shape=tuple(
                array.shape[axis] if axis and isinstance(n, str) else n for axis, n in enumerate(spec.shape)
            ),
        )
        for spec, array in zip(specs, arrays, strict=True)
        if array is not None
    )


def _arrays(example_inputs: Any) -> dict[str, Array]:
    if isinstance(example_inputs, Mapping):
        pairs = cast("Mapping[Any, Any]", example_inputs)
        return {str(name): as_array(value) for name, value in pairs.items()}
    several = isinstance(example_inputs, (tuple, list))
    values = cast("Sequence[Any]", example_inputs if several else (example_inputs,))
    return dict(zip(_places(len(values)), map(as_array, values), strict=True))


def _examples(example_inputs: Any) -> Any:
    """Turn tensors into arrays, and leave what holds them as it is."""
    if example_inputs is None:
        return None
    arrays = _arrays(example_inputs)
    if isinstance(example_inputs, Mapping):
        return arrays
    several = isinstance(example_inputs, (tuple, list))
    return tuple(arrays.values()) if several else arrays["input"]


def _places(number: int) -> list[str]:
    """Names of inputs that have none."""
    return [f"input_{place}" if place else "input" for place in range(number)]


def _output_names(model: Any) -> list[str] | None:
    names = getattr(model, "output_names", None)
    if names is None and isinstance(model, keras().Sequential):
        names = [model.layers[-1].name]
    return unique(names) if names else None


def _name_of(model: Any) -> str:
    return str(getattr(model.owner if isinstance(model, Endpoint) else model, "name", "saved_model"))


def _looks_up(traced: Traced) -> bool:
    graph = traced.function.graph.as_graph_def()
    used = {node.op for node in graph.node}
    used.update(node.op for function in graph.library.function for node in function.node_def)
    return not used.isdisjoint(GATHERS)


def _weights(model: Any, inlined: Any) -> tuple[int, int]:
    """Count weights and their bytes: a Keras model's own, else the numbers in a frozen graph."""
    tf = tensorflow()
    if not isinstance(model, Endpoint):
        counts = [(math.prod(one.shape), tf.as_dtype(one.dtype).size) for one in model.weights]
    else:
        outputs = [op.outputs[0] for op in inlined.graph.get_operations() if op.type == "Const"]
        counts = [
            (math.prod(one.shape), one.dtype.size)
            for one in outputs
            if one.shape.rank and (one.dtype.is_floating or one.dtype in (tf.int8, tf.uint8))
        ]
    return sum(number for number, _ in counts), sum(number * size for number, size in counts)


def _try(traced: Traced, info: ModelInfo) -> None:
    """Run the model once on random inputs."""
    tf = tensorflow()
    # Where one input has a fixed number of samples, the others have to follow.
    feeds = info.draw(next((spec.batch for spec in info.inputs if spec.batch is not None), 1))
    try:
        outputs = traced.function(*[tf.constant(feeds[spec.name]) for spec in info.inputs])
    except Exception as error:
        raise ModelError(
            f"the model fails on inputs {describe(info.inputs)}: {first_line(error)}; give input_shape or "
            "example_inputs that fit"
        ) from error
    for name, tensor in outputs.items():
        if tensor.dtype.is_floating and bool(tf.reduce_any(tf.math.is_nan(tensor))):
            raise ModelError(f"the model gives NaN in {name!r}; look for weights that are NaN")
