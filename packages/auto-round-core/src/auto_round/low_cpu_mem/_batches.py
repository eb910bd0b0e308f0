"""A forward pass over a large batch as several over parts of it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from torch import Tensor

from auto_round.exceptions import ConfigurationError

# Tensors whose first dimension is not the batch.
_NOT_BATCHED = {"cache_position", "logits_to_keep", "head_mask"}
_REMEDY = "Raise memory.gpu_batch_size to the batch, or call with a smaller batch"


def run_in_parts(
    forward: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any], limit: int | None
) -> Any:
    """Call `forward` with at most `limit` samples at once, and join what it returns.

    The batch is the first dimension of the first tensor; every other argument that is a tensor with as many
    rows is split like it, but for those of transformers that are known to have no batch. A call with a cache
    of keys and values is not split, since a cache cannot be. Where a batch is split, transformers' models
    are told to return no cache.

    Args:
        forward: The function.
        args: Its positional arguments.
        kwargs: Its arguments by name.
        limit: Samples; None for no limit.

    Returns:
        What one call would return: tensors are joined along the first dimension, in tuples, lists and
        mappings too.

    Raises:
        ConfigurationError: The outputs cannot be joined, for instance a loss, which is a mean over the batch.
    """
    batch = _batch_size(args, kwargs)
    if limit is None or batch <= limit or kwargs.get("past_key_values") is not None:
        return forward(*args, **kwargs)
    options = dict(kwargs)
    if "use_cache" in inspect.signature(forward).parameters:
        options["use_cache"] = False
    parts: list[Any] = []
    for start in range(0, batch, limit):
        rows = slice(start, min(start + limit, batch))
        some = {name: _part(value, rows, batch, name) for name, value in options.items()}
        parts.append(forward(*(_part(value, rows, batch) for value in args), **some))
    return _join(parts, "output")


def _batch_size(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> int:
    named = [value for name, value in kwargs.items() if name not in _NOT_BATCHED]
    for value in (*args, *named):
        if isinstance(value, Tensor) and value.dim():
            return len(value)
    return 0


def _part(value: Any, rows: slice, batch: int, name: str = "") -> Any:
    if isinstance(value, Tensor) and value.dim() and len(value) == batch and name not in _NOT_BATCHED:
        return value[rows]
    return value


def _join(parts: list[Any], what: str) -> Any:
    first = parts[0]
    kind = cast("Any", type(first))
    if all(part is None for part in parts):
        return None
    if all(isinstance(part, Tensor) and part.dim() for part in parts):
        return torch.cat(parts)
    if isinstance(first, Mapping):
        fields = cast("Mapping[str, Any]", first)
        # transformers' outputs are mappings that are built from fields.
        return kind(**{name: _join([part[name] for part in parts], name) for name in fields})
    if isinstance(first, list | tuple):
        items = [_join(list(several), what) for several in zip(*parts, strict=True)]
        return kind(*items) if hasattr(kind, "_fields") else kind(items)
    found = "a scalar" if isinstance(first, Tensor) else f"a {kind.__name__}"
    raise ConfigurationError(
        f"{what!r} of a batch that was split cannot be joined: it is {found}. {_REMEDY}; compute a loss from "
        f"the logits."
    )
