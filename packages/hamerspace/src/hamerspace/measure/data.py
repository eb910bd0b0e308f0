"""Validation and calibration data as users have it, read into batches of arrays by input name."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from hamerspace._arrays import as_array, is_tensor
from hamerspace.exceptions import ModelInputError
from hamerspace.models.info import Array, Feeds, ModelInfo
from hamerspace.runtimes.callable import fit

_LABELS = ("labels", "label", "targets", "target", "y")
_PART = 64
"""Samples that go through a model at once, at most, where it takes any number."""
_HELP = (
    "give an array, arrays by name, (inputs, labels), or an iterable of batches of these, such as a "
    "DataLoader"
)


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Some samples, with their labels where there are any."""

    feeds: dict[str, Array]
    labels: Array | None = None

    @property
    def samples(self) -> int:
        """How many."""
        return max((len(array) for array in self.feeds.values() if array.ndim), default=1)


def read_batches(data: Any, info: ModelInfo, *, limit: int | None = None) -> list[Batch]:
    """Read validation data.

    Args:
        data: an array, arrays by name, ``(inputs, labels)``, or an iterable of batches of these. Samples
            without the batch axis, as the items of a torch data set, are taken too.
        info: whose inputs they are.
        limit: stop after as many samples.

    Raises:
        ModelInputError: it is empty, holds NaN, or does not fit the model.
    """
    batches: list[Batch] = []
    samples = 0
    for item in _items(data, info):
        batch = _batch(item, info, len(batches))
        batches += _parts(batch)
        samples += batch.samples
        if limit is not None and samples >= limit:
            break
    if not batches:
        raise ModelInputError(f"the data is empty; {_HELP}")
    return batches


def _parts(batch: Batch) -> list[Batch]:
    """Cut a large batch up, as whole data sets are given as one."""
    rows = {name: array for name, array in batch.feeds.items() if array.ndim and len(array) == batch.samples}
    return [
        Batch(
            feeds={**batch.feeds, **{name: array[start : start + _PART] for name, array in rows.items()}},
            labels=None if batch.labels is None else batch.labels[start : start + _PART],
        )
        for start in range(0, batch.samples, _PART)
    ]


def calibration_batches(data: Any, info: ModelInfo, *, limit: int | None = None) -> list[dict[str, Array]]:
    """Read data as `read_batches` does, without labels, in batches of the model's own size."""
    batches = data if _is_batches(data) else read_batches(data, info, limit=limit)
    return cut([batch.feeds for batch in batches], info, limit=limit)


def cut(feeds: Sequence[Feeds], info: ModelInfo, *, limit: int | None = None) -> list[dict[str, Array]]:
    """Put samples into batches of the model's fixed size; the last one is filled up with its last sample.

    Batches of a model that takes any number stay as they are, but for those past ``limit``.
    """
    fixed = {spec.name: spec.batch for spec in info.inputs if spec.batch is not None}
    if not fixed or len(set(fixed.values())) > 1:
        taken: list[dict[str, Array]] = []
        samples = 0
        for batch in feeds:
            if limit is not None and samples >= limit:
                break
            taken.append(dict(batch))
            samples += Batch(feeds=dict(batch)).samples
        return taken
    size = next(iter(fixed.values()))
    # Only batches that agree in all other lengths can be put together.
    groups: dict[tuple[Any, ...], list[Feeds]] = {}
    for batch in feeds:
        key = tuple(batch[spec.name].shape[1:] for spec in info.inputs)
        groups.setdefault(key, []).append(batch)
    found: list[dict[str, Array]] = []
    for members in groups.values():
        # What is no tensor of samples, such as a number, is the first batch's.
        alone = {name: array for name, array in members[0].items() if not array.ndim}
        joined = {
            name: np.concatenate([batch[name] for batch in members])[:limit]
            for name in members[0]
            if name not in alone
        }
        total = len(next(iter(joined.values())))
        for start in range(0, total, size):
            part = {name: array[start : start + size] for name, array in joined.items()}
            short = size - len(next(iter(part.values())))
            if short:
                part = {
                    name: np.concatenate([a, np.repeat(a[-1:], short, axis=0)]) for name, a in part.items()
                }
            part = {spec.name: {**part, **alone}[spec.name] for spec in info.inputs}
            found.append(part)
    return found if limit is None else found[: max(1, -(-limit // size))]


def _is_batches(data: Any) -> bool:
    whole: Any = data
    return isinstance(data, list) and bool(whole) and all(isinstance(one, Batch) for one in whole)


def _items(data: Any, info: ModelInfo) -> Iterable[Any]:
    whole: Any = data
    if isinstance(data, (str, bytes)):
        raise ModelInputError(f"the data is text; turn it into tensors first. {_HELP.capitalize()}")
    if is_tensor(data) or isinstance(data, Mapping):
        return [data]
    if isinstance(data, tuple) and _is_one_batch(whole, info):
        return [tuple(as_array(one) if _is_numbers(one) else one for one in whole)]
    if isinstance(data, Iterable):
        return whole
    if hasattr(data, "__getitem__") and hasattr(data, "__len__"):
        return (data[place] for place in range(len(data)))
    raise ModelInputError(f"the data is {type(data).__name__}; {_HELP}")


def _is_one_batch(data: tuple[Any, ...], info: ModelInfo) -> bool:
    """Whether a tuple is inputs with labels, or one tensor an input, and not batches."""
    if len(data) == 2 and isinstance(data[0], Mapping):
        return True
    ranks = [len(spec.shape) for spec in info.inputs]
    # Labels may well be a list of numbers.
    tensors = all(is_tensor(one) or _is_numbers(one) for one in data)
    if not tensors or len(data) not in (len(ranks), len(ranks) + 1):
        return False
    return all(as_array(one).ndim == rank for one, rank in zip(data, ranks, strict=False))


def _batch(item: Any, info: ModelInfo, place: int) -> Batch:
    names = [spec.name for spec in info.inputs]
    labels: Any = None
    given: dict[str, Any]
    parts: Any = item
    if isinstance(item, Mapping):
        given = {str(key): value for key, value in parts.items()}
        labels = next((given[key] for key in _LABELS if key in given and key not in names), None)
    elif isinstance(item, (tuple, list)) and not _is_numbers(item):
        if len(parts) == 2 and isinstance(parts[0], (Mapping, tuple, list)) and not _is_numbers(parts[0]):
            inner = _batch(parts[0], info, place)
            return Batch(feeds=inner.feeds, labels=_labels(parts[1], inner.feeds, place))
        if len(parts) == len(names) + 1:
            labels = parts[-1]
        elif len(parts) != len(names):
            raise ModelInputError(
                f"batch {place} has {len(parts)} parts, and the model takes {names}; {_HELP}"
            )
        given = dict(zip(names, parts, strict=False))
    else:
        if len(names) != 1:
            raise ModelInputError(f"batch {place} is one array, and the model takes {names}; {_HELP}")
        given = {names[0]: item}
    missing = [name for name in names if name not in given]
    if missing:
        raise ModelInputError(f"batch {place} lacks {missing}; the model takes {names}")
    feeds: dict[str, Array] = {}
    single = False
    for spec in info.inputs:
        array = as_array(given[spec.name])
        if array.dtype.kind not in "fiub":
            raise ModelInputError(
                f"batch {place}: {spec.name} has the dtype {array.dtype}; numbers are wanted"
            )
        if array.ndim == len(spec.shape) - 1:
            array, single = array[None], True
        array = fit(spec, array)
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            raise ModelInputError(f"batch {place}: {spec.name} holds NaN or infinity")
        if spec.high is not None and array.size and not 0 <= array.min() <= array.max() < spec.high:
            raise ModelInputError(
                f"batch {place}: {spec.name} holds {array.min()} to {array.max()}, and the model knows 0 to "
                f"{spec.high - 1}; is it tokenised for another model?"
            )
        feeds[spec.name] = array
    counts = {spec.name: len(feeds[spec.name]) for spec in info.inputs if spec.shape and spec.batch is None}
    if len(set(counts.values())) > 1:
        raise ModelInputError(f"batch {place} has inputs of different numbers of samples: {counts}")
    found = as_array(labels)[None] if single and labels is not None else labels
    return Batch(feeds=feeds, labels=_labels(found, feeds, place))


def _is_numbers(value: Any) -> bool:
    """Whether nested lists are an array written out."""
    inner: Any = value
    while isinstance(inner, (tuple, list)) and inner:
        inner = inner[0]  # pyright: ignore[reportUnknownVariableType]
    return isinstance(inner, (int, float))


def _labels(value: Any, feeds: Mapping[str, Array], place: int) -> Array | None:
    if value is None:
        return None
    labels, samples = as_array(value), Batch(feeds=dict(feeds)).samples
    given = len(labels) if labels.ndim else 1
    if given != samples:
        raise ModelInputError(
            f"batch {place} has {samples} samples and {given} labels; each sample wants one"
        )
    return labels
