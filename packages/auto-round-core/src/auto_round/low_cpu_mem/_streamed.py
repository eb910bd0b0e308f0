"""A parameter that stays on disk: embeddings take rows of it, linear layers take it in chunks of rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

CHUNK_BYTES = 1 << 23
"""Bytes of rows that a linear layer holds at once."""

# What is asked of a tensor without looking at its values.
_OF_THE_FORM = {
    "__repr__",
    "__len__",
    "dim",
    "ndimension",
    "size",
    "stride",
    "numel",
    "nelement",
    "element_size",
    "is_floating_point",
    "is_complex",
    "is_contiguous",
    "detach",
    "requires_grad_",
}
_TURNED = {"T", "mT", "H", "mH", "real", "imag"}


class StreamedWeight(nn.Parameter):
    """A matrix [rows, columns] that is read whenever something is computed with it, and held no longer.

    It has the form of the tensor and no values. `embedding` reads the rows of the tokens that are there, each
    once; `linear` reads `CHUNK_BYTES` of rows at a time; anything else reads the whole matrix. Results are on
    the device of the other input. Nothing flows back into the weights; a gradient flows to the input.

    Any number of threads may compute with it at once.
    """

    _read_rows: Callable[[slice | Tensor], Tensor]
    _device: torch.device

    @staticmethod
    def of(
        meta: Tensor, read_rows: Callable[[slice | Tensor], Tensor], device: torch.device
    ) -> StreamedWeight:
        """Make one.

        Args:
            meta: The form of the matrix, on the meta device.
            read_rows: Gives rows of it on the CPU or on `device`: a slice, or a tensor of their numbers.
            device: What it says of itself, so that a model counts as being where it computes.
        """
        made = Tensor._make_subclass(StreamedWeight, meta.detach(), False)
        made._read_rows = read_rows
        made._device = device
        return made

    @property
    def device(self) -> torch.device:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Where results are computed by default."""
        return self._device

    def read(self, rows: slice | Tensor, device: torch.device | None = None) -> Tensor:
        """Return some rows on a device; by default on its own."""
        return self._read_rows(rows).to(device or self._device, non_blocking=True)

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Compute with what has to be read for that."""
        del types
        kwargs = kwargs or {}
        if func is functional.embedding:
            return _embedding(*args, **kwargs)
        if func is functional.linear:
            return _linear(*args, **kwargs)
        with torch._C.DisableTorchFunctionSubclass():  # pyright: ignore[reportPrivateUsage]
            if _asks_for_the_form(func):
                return func(*args, **kwargs)
            return func(*_read_all(args), **{name: _read_all(value) for name, value in kwargs.items()})


def _asks_for_the_form(func: Callable[..., Any]) -> bool:
    name: object = getattr(func, "__name__", "")
    if name == "__get__":
        return getattr(getattr(func, "__self__", None), "__name__", "") not in _TURNED
    return name in _OF_THE_FORM


def _read_all(value: Any) -> Any:
    if isinstance(value, StreamedWeight):
        return value.read(slice(None))
    if isinstance(value, list | tuple):
        items = [_read_all(item) for item in cast("list[Any] | tuple[Any, ...]", value)]
        return items if isinstance(value, list) else tuple(items)
    return value


def _embedding(
    tokens: Tensor,
    weight: Any,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    *rest: Any,
    **options: Any,
) -> Tensor:
    # The padding row and what may follow concern gradients of the weight, of which there are none.
    del padding_idx, rest
    norm_type = options.get("norm_type", 2.0)
    if not isinstance(weight, StreamedWeight):
        return functional.embedding(_read_all(tokens), weight, max_norm=max_norm, norm_type=norm_type)
    rows, places = cast(
        "tuple[Tensor, Tensor]",
        torch.unique(tokens, return_inverse=True),  # pyright: ignore[reportUnknownMemberType]
    )
    values = weight.read(rows, tokens.device)
    return functional.embedding(places, values, max_norm=max_norm, norm_type=norm_type)


def _linear(inputs: Tensor, weight: Any, bias: Tensor | None = None) -> Tensor:
    if not isinstance(weight, StreamedWeight) or isinstance(inputs, StreamedWeight):
        return functional.linear(_read_all(inputs), _read_all(weight), _read_all(bias))
    count, width = weight.shape
    step = max(1, CHUNK_BYTES // (width * weight.element_size()))
    result: Tensor | None = None
    parts: list[Tensor] = []
    for start in range(0, count, step):
        rows = slice(start, min(start + step, count))
        part = functional.linear(
            inputs, weight.read(rows, inputs.device), None if bias is None else bias[rows]
        )
        if part.requires_grad:
            parts.append(part)
            continue
        if result is None:
            # Its type is that of a part, which autocast may have changed.
            result = part.new_empty((*part.shape[:-1], count))
        result[..., rows] = part
    return torch.cat(parts, dim=-1) if result is None else result
