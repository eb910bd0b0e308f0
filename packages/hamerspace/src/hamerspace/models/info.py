"""What is known of a model: its framework, inputs, outputs and size."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Final, Literal, cast, get_args

import numpy as np
from numpy.typing import NDArray

from hamerspace.exceptions import ConstraintError

Framework = Literal["pytorch", "tensorflow", "onnx"]
Structure = Literal["tensor", "tuple", "dict"]
Array = NDArray[Any]
Feeds = Mapping[str, Array]
"""Arrays by the name of the input, or of the output."""

_DTYPE: Final = re.compile(
    r"bool|u?int(2|4|8|16|32|64)|float(16|32|64|8_\w+|4_\w+)|bfloat16|complex(64|128)", re.ASCII
)
DEFAULT_LENGTH: Final = 64
"""Length that examples have along an axis of any length, other than the batch."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorSpec:
    """An input or output: name, dtype and shape."""

    name: str
    dtype: str
    """numpy's name of it, such as ``float32`` or ``int64``."""
    shape: tuple[int | str, ...]
    """Lengths; a name stands for an axis of any length. The first axis is the batch."""
    high: int | None = None
    """Valid values are integers below this, as below the size of a vocabulary; floats may hold them too."""
    batch_axis: int = 0
    """Of an output: the axis of its samples, which is the second of a recurrent layer's last state."""

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not _DTYPE.fullmatch(str(self.dtype)):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise ConstraintError(f"{self.name!r} has the dtype {self.dtype!r}, which is none of numbers")
        if not all(isinstance(length, str) or type(length) is int for length in self.shape):
            raise ConstraintError(f"{self.name} has the shape {list(self.shape)}, which is none")
        if self.high is not None and (type(self.high) is not int or self.high < 1):
            raise ConstraintError(f"{self.name} has values below {self.high!r}, which is no integer above 0")
        if type(self.batch_axis) is not int or self.batch_axis < 0:
            raise ConstraintError(f"{self.name} has its samples along the axis {self.batch_axis!r}")
        if any(isinstance(length, int) and length < 1 for length in self.shape):
            raise ConstraintError(f"{self.name} has the shape {list(self.shape)}; every length is 1 or more")

    @property
    def is_integer(self) -> bool:
        """Whether the dtype is one of integers or booleans."""
        return self.dtype.startswith(("int", "uint", "bool"))

    @property
    def batch(self) -> int | None:
        """The fixed number of samples, or None if any number goes (or the tensor has no axis)."""
        first = self.shape[0] if self.shape else None
        return first if isinstance(first, int) else None

    def example_shape(self, batch: int) -> tuple[int, ...]:
        """Lengths alone, the first one ``batch`` where it is free, others `DEFAULT_LENGTH`."""
        return tuple(
            length if isinstance(length, int) else batch if axis == 0 else DEFAULT_LENGTH
            for axis, length in enumerate(self.shape)
        )

    def with_batch(self, batch: int) -> TensorSpec:
        """Return the same tensor with a fixed number of samples."""
        return replace(self, shape=(batch, *self.shape[1:])) if self.shape else self


@dataclass(frozen=True, kw_only=True)
class ModelInfo:
    """What is known of a model before it is optimised."""

    framework: Framework
    name: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...] = ()
    structure: Structure = "tensor"
    """What a call of the model gives: one tensor, a tuple, or tensors by name."""
    parameters: int = 0
    size_bytes: int = 0
    """Of the stored weights."""
    form: str = "module"
    """Of what the model is: module, torchscript, exported, transformers, keras, saved_model or onnx."""
    path: str | None = None
    """The file or folder that it was read from."""
    needs_module: bool = False
    """Whether that holds weights alone, for a module that the caller gives."""

    @property
    def size_mb(self) -> float:
        """Size of the stored weights in MB of 2**20 bytes."""
        return self.size_bytes / 2**20

    @property
    def dynamic_axes(self) -> dict[str, dict[int, str]]:
        """Axes of any length by input, as ``{"ids": {0: "batch"}}``."""
        return {
            spec.name: {axis: length for axis, length in enumerate(spec.shape) if isinstance(length, str)}
            for spec in self.inputs
            if any(isinstance(length, str) for length in spec.shape)
        }

    def with_batch(self, batch: int) -> ModelInfo:
        """Return the same model, taking a fixed number of samples wherever any number goes."""
        inputs = tuple(spec if spec.batch is not None else spec.with_batch(batch) for spec in self.inputs)
        return replace(self, inputs=inputs)

    def draw(self, batch: int, seed: int = 0) -> dict[str, Array]:
        """Random inputs of the model's shapes: normal floats, uniform integers below ``high``, masks of 1."""
        generator = np.random.default_rng(seed)
        return {spec.name: _draw(spec, batch, generator) for spec in self.inputs}

    def to_dict(self) -> dict[str, Any]:
        """Return plain data, which `from_dict` reads."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> ModelInfo:
        """Read what `to_dict` gave.

        Raises:
            ConstraintError: an entry is none that `to_dict` gives.
        """
        read: dict[str, Any] = dict(data)
        for key in ("inputs", "outputs"):
            read[key] = tuple(spec_from_dict(one) for one in data[key])
        for key, kind in (("framework", Framework), ("structure", Structure)):
            if read[key] not in get_args(kind):
                raise ConstraintError(f"{key} is {read[key]!r}; it may be {', '.join(get_args(kind))}")
        return cls(**read)


def spec_from_dict(data: Mapping[str, Any]) -> TensorSpec:
    """Read a `TensorSpec` from plain data."""
    read: dict[str, Any] = {**data, "shape": tuple(data["shape"])}
    return TensorSpec(**read)


def spec_of(name: str, array: Array) -> TensorSpec:
    """Describe an array."""
    return TensorSpec(name=name, dtype=array.dtype.name, shape=tuple(max(1, n) for n in array.shape))


def shapes_of(input_shape: Any, names: Sequence[str]) -> list[tuple[int | str, ...]] | None:
    """Read ``input_shape`` as users give it: one shape, a list of shapes, or shapes by name.

    A length of None, -1 or a name is an axis of any length.

    Raises:
        ConstraintError: it is none of these, or an input is missing.
    """
    if input_shape is None:
        return None
    given: Any = input_shape
    if isinstance(input_shape, Mapping):
        missing = [name for name in names if name not in given]
        if names and (missing or len(given) != len(names)):
            raise ConstraintError(f"input_shape names {list(given)}, and the model takes {list(names)}")
        return [_shape(given[name], given) for name in names or list(given)]
    if isinstance(input_shape, str) or not isinstance(input_shape, Sequence):
        raise ConstraintError(f"input_shape is {given!r}; give lengths such as [1, 3, 224, 224]")
    if any(isinstance(one, Sequence) and not isinstance(one, str) for one in given):
        return [_shape(one, given) for one in given]
    return [_shape(given, given)]


def fitted(specs: Sequence[TensorSpec], input_shape: Any) -> tuple[TensorSpec, ...]:
    """Return inputs of a model with lengths for axes that it leaves free; others have to be the model's own.

    Raises:
        ConstraintError: there are more or fewer shapes than inputs, or one does not fit.
    """
    shapes = shapes_of(input_shape, [spec.name for spec in specs])
    if shapes is None:
        return tuple(specs)
    fits = len(shapes) == len(specs) and all(
        len(shape) == len(spec.shape)
        and all(
            isinstance(a, str) or isinstance(b, str) or a == b for a, b in zip(shape, spec.shape, strict=True)
        )
        for shape, spec in zip(shapes, specs, strict=True)
    )
    if not fits:
        taken = ", ".join(f"{spec.name}: {spec.dtype}{list(spec.shape)}" for spec in specs)
        raise ConstraintError(f"input_shape is {input_shape!r}, and the model takes {taken}")
    return tuple(
        replace(
            spec,
            shape=tuple(
                a if isinstance(a, int) and isinstance(b, str) else b
                for a, b in zip(shape, spec.shape, strict=True)
            ),
        )
        for shape, spec in zip(shapes, specs, strict=True)
    )


def _shape(given: Any, whole: Any) -> tuple[int | str, ...]:
    if not isinstance(given, Sequence) or isinstance(given, str):
        raise ConstraintError(f"input_shape is {whole!r}; give lengths such as [1, 3, 224, 224]")
    lengths = cast("Any", given)
    return tuple(_length(length, axis, whole) for axis, length in enumerate(lengths))


def _length(length: Any, axis: int, whole: Any) -> int | str:
    if length is None or (isinstance(length, int) and length == -1):
        return "batch" if axis == 0 else f"axis_{axis}"
    if isinstance(length, str):
        return length
    if isinstance(length, (int, np.integer)) and not isinstance(length, bool) and length > 0:
        return int(cast("Any", length))
    raise ConstraintError(f"input_shape is {whole!r}; a length is an integer above 0, or None for any length")


def _draw(spec: TensorSpec, batch: int, generator: np.random.Generator) -> Array:
    shape = spec.example_shape(batch)
    if spec.dtype == "bool":
        return np.ones(shape, bool)
    if spec.is_integer or spec.high is not None:
        if "mask" in spec.name or (spec.high is not None and spec.high <= 1):
            return np.full(shape, 0 if spec.high == 1 else 1, spec.dtype)
        high = spec.high or 2
        most = np.iinfo(spec.dtype).max if spec.is_integer else high
        return generator.integers(0, min(high, most), shape).astype(spec.dtype)
    return generator.standard_normal(shape).astype(spec.dtype)
