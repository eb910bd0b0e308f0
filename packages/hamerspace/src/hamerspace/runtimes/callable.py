"""A loaded model as one callable, whatever the runtime: tensors of the caller's framework in and out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from hamerspace._arrays import Kind, NamedOutputs, as_array, as_kind, kind_of
from hamerspace.exceptions import ModelInputError
from hamerspace.models.info import Array, Structure, TensorSpec


class LoadedModel:
    """A model that is called with tensors by position or by name.

    Tensors of torch, TensorFlow and numpy are taken, and outputs are of the same kind as the first input (or
    of ``kind``, if given). A model with a fixed batch takes any number of samples: they go through in parts,
    and the last part is filled up.

    A call gives what the original model gives: one tensor, a tuple, or tensors by name (which can be read by
    attribute and by position too).

    Args:
        run: takes arrays by name and gives arrays by name.
        inputs: of ``run``.
        outputs: of ``run``.
        structure: ``tensor``, ``tuple`` or ``dict``.
        kind: of tensors to give; None gives what the caller gave.
        owner: what has to live as long as the model.
    """

    def __init__(
        self,
        run: Callable[[dict[str, Array]], Mapping[str, Array]],
        inputs: tuple[TensorSpec, ...],
        outputs: tuple[TensorSpec, ...],
        structure: Structure = "tensor",
        kind: Kind | None = None,
        owner: object = None,
    ) -> None:
        self._run = run
        self.inputs = inputs
        self.outputs = outputs
        self.structure: Structure = structure
        self._kind: Kind | None = kind
        self._owner = owner

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model.

        Raises:
            ModelInputError: an input is missing, unknown, or of a dtype or shape that does not fit.
        """
        feeds, kind = self._bind(args, kwargs)
        found = self.run(feeds)
        given = {name: as_kind(array, self._kind or kind) for name, array in found.items()}
        if self.structure == "tensor":
            return next(iter(given.values()))
        return tuple(given.values()) if self.structure == "tuple" else NamedOutputs(given)

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Run on arrays by name, of the dtypes in `inputs`, and return arrays by name."""
        checked = {spec.name: fit(spec, feeds[spec.name]) for spec in self.inputs}
        fixed = {spec.name: spec.batch for spec in self.inputs if spec.batch is not None}
        given = {name: len(checked[name]) for name in fixed}
        if all(given[name] == batch for name, batch in fixed.items()):
            return dict(self._run(checked))
        if len(set(given.values())) > 1 or len(set(fixed.values())) > 1:
            raise ModelInputError(f"inputs have {given} samples, and the model takes {fixed}")
        return self._in_parts(checked, fixed, next(iter(given.values())))

    def _in_parts(self, feeds: dict[str, Array], fixed: dict[str, int], total: int) -> dict[str, Array]:
        size = next(iter(fixed.values()))
        parts: list[dict[str, Array]] = []
        for start in range(0, total, size):
            part = {
                name: array[start : start + size] if name in fixed else array for name, array in feeds.items()
            }
            missing = start + size - total
            if missing > 0:
                part = {
                    name: np.concatenate([array, np.repeat(array[-1:], missing, axis=0)])
                    if name in fixed
                    else array
                    for name, array in part.items()
                }
            parts.append(dict(self._run(part)))
        if not parts:
            raise ModelInputError("inputs have no samples")
        axes = {spec.name: spec.batch_axis for spec in self.outputs}
        return {name: _joined(name, parts, axes.get(name, 0), size, total) for name in parts[0]}

    def _bind(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[dict[str, Array], Kind]:
        names = [spec.name for spec in self.inputs]
        if len(args) == 1 and isinstance(args[0], Mapping) and not kwargs:
            args, kwargs = (), {str(name): value for name, value in args[0].items()}  # pyright: ignore[reportUnknownVariableType, reportUnknownArgumentType]
        if len(args) > len(names):
            raise ModelInputError(f"{len(args)} inputs were given, and the model takes {names}")
        given = dict(zip(names, args, strict=False))
        for name, value in kwargs.items():
            if name in given:
                raise ModelInputError(f"{name} was given twice")
            given[name] = value
        unknown = [name for name in given if name not in names]
        missing = [name for name in names if name not in given]
        if unknown or missing:
            raise ModelInputError(
                f"the model takes {names}" + (f"; unknown: {unknown}" if unknown else "")
                + (f"; missing: {missing}" if missing else "")
            )  # fmt: skip
        kind = kind_of(next(iter(given.values()), None))
        return {name: as_array(given[name]) for name in names}, kind


def _joined(name: str, parts: list[dict[str, Array]], axis: int, size: int, total: int) -> Array:
    arrays = [part[name] for part in parts]
    alone = size == total
    if not alone and any(one.ndim <= axis or one.shape[axis] != size for one in arrays):
        raise ModelInputError(
            f"the model takes {size} samples a call, and its output {name} of the shape "
            f"{list(arrays[0].shape)} does not tell them apart; give it exactly {size}"
        )
    whole = arrays[0] if len(arrays) == 1 else np.concatenate(arrays, axis)
    return whole if alone or whole.shape[axis] == total else np.take(whole, range(total), axis)


def fit(spec: TensorSpec, array: Array) -> Array:
    """Return an array in an input's dtype, if nothing but precision is lost, and check its shape.

    Raises:
        ModelInputError: another kind of number, or a shape that does not fit. A number of samples that
            differs from a fixed batch is not looked at.
    """
    wanted = np.dtype(spec.dtype) if spec.dtype != "bfloat16" else np.dtype("float32")
    if array.dtype != wanted:
        same_kind = array.dtype.kind == wanted.kind or {array.dtype.kind, wanted.kind} <= set("iub")
        if not same_kind:
            raise ModelInputError(
                f"input {spec.name} has the dtype {array.dtype.name}, and the model takes {spec.dtype}; "
                f'convert it first, as by array.astype("{spec.dtype}")'
            )
        given, array = array, array.astype(wanted)
        if wanted.kind in "iub" and not np.array_equal(given, array):
            raise ModelInputError(
                f"input {spec.name} holds numbers that {spec.dtype} does not, which the model takes"
            )
    fits = array.ndim == len(spec.shape) and all(
        axis == 0 or isinstance(length, str) or length == array.shape[axis]
        for axis, length in enumerate(spec.shape)
    )
    if not fits:
        raise ModelInputError(
            f"input {spec.name} has the shape {list(array.shape)}, and the model takes {list(spec.shape)}"
        )
    return np.require(array, requirements="C")
