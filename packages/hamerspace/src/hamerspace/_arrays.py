"""Tensors of any framework as numpy arrays, and back."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any, Literal, cast

import numpy as np

from hamerspace._imports import need
from hamerspace.models.info import Array

Kind = Literal["numpy", "torch", "tensorflow"]


def kind_of(value: Any) -> Kind:
    """Say whose tensor it is; what is no tensor counts as numpy's."""
    torch, tensorflow = sys.modules.get("torch"), sys.modules.get("tensorflow")
    if torch is not None and isinstance(value, torch.Tensor):
        return "torch"
    if tensorflow is not None and isinstance(value, (tensorflow.Tensor, tensorflow.Variable)):
        return "tensorflow"
    return "numpy"


def is_tensor(value: Any) -> bool:
    """Whether it is an array or a tensor of a framework."""
    return isinstance(value, np.ndarray) or kind_of(value) != "numpy"


def as_array(value: Any) -> Array:
    """Return a tensor of any framework, or nested lists of numbers, as an array; bfloat16 becomes float32."""
    if kind_of(value) == "torch":
        value = value.detach().cpu()
        if value.dtype == sys.modules["torch"].bfloat16:
            value = value.float()
        return value.numpy()
    if kind_of(value) == "tensorflow" and value.dtype.name == "bfloat16":
        value = sys.modules["tensorflow"].cast(value, "float32")
    return np.asarray(value)


def as_kind(array: Array, kind: Kind) -> Any:
    """Return an array as a tensor of a framework."""
    if kind == "numpy":
        return array
    if kind == "torch":
        import torch

        return torch.from_numpy(np.require(array, requirements=["C", "W"]))  # pyright: ignore[reportUnknownMemberType]
    # A worker that runs another runtime has not loaded it yet.
    return need("tensorflow").convert_to_tensor(array)


class NamedOutputs(dict[str, Any]):
    """Outputs by name, by attribute, and by position, in the way of transformers' outputs."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"no output is called {name!r}; there are {list(self)}") from None

    def __getitem__(self, key: Any) -> Any:
        if isinstance(key, (int, slice)):
            return tuple(self.values())[key]
        return super().__getitem__(key)

    def __reduce__(self) -> tuple[Any, ...]:
        return NamedOutputs, (dict(self),)


def flatten_outputs(value: Any) -> tuple[str, dict[str, Any]]:
    """Return the structure that a model gave (tensor, tuple or dict) and its tensors by name.

    A tuple's tensors are called ``output_0``, ``output_1`` and so on, and a single one ``output``. Tuples of
    tensors in a tuple become part of it, as the states of a recurrent layer: ``(y, (h, c))`` is ``(y, h,
    c)``. Other members that are no tensors, as the caches of language models, are left out.

    Raises:
        TypeError: it holds no tensor.
    """
    if is_tensor(value):
        return "tensor", {"output": value}
    members: Any = value
    if isinstance(value, Mapping):
        found = {str(name): one for name, one in members.items() if is_tensor(one)}
        if found:
            return "dict", found
    if isinstance(value, (tuple, list)):
        flat: list[Any] = []
        for one in members:
            inner: list[Any] = list(cast("Any", one)) if isinstance(one, (tuple, list)) else [one]
            flat += inner if all(map(is_tensor, inner)) else [None]
        found = {f"output_{place}": one for place, one in enumerate(flat) if one is not None}
        if found:
            return "tuple", found
    raise TypeError(f"the model gave {type(members).__name__}, which holds no tensor")
