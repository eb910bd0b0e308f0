"""What calibration data can be, from paths to token ids, made into one stream of elements."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
from torch import Tensor

from auto_round._files import shown
from auto_round.exceptions import CalibrationError
from auto_round.quantization._calibration_files import (
    Element,
    content_columns,
    file_elements,
    is_saved_dataset,
    optional,
    shuffled,
)

_ALL = "the calibration data"
_FORMS = (
    "a path of text files, a list of texts, a data set of the library datasets, or token ids [rows, length]"
)
_STRINGS = ("string", "large_string")
_BYTES = (bytes, bytearray, memoryview)


class Source(NamedTuple):
    """Calibration data, opened."""

    name: str
    """What an error calls all of it."""
    elements: Iterator[Element]
    """In random order where the data has a length, else in its own."""


def open_source(data: object, rng: random.Random) -> Source:
    """Find out what `data` is; files are opened and rows converted only as the elements are taken.

    Raises:
        CalibrationError: It is None, empty, or nothing that can be calibrated with.
    """
    if data is None:
        raise CalibrationError(
            f"There is no calibration data. Give {_FORMS}; or set quantization.calibration to 'self', to let "
            "the float model write its own, or quantization.quality to 'rtn', which needs none."
        )
    if isinstance(data, str | Path):
        return _open_path(data, rng)
    if isinstance(data, Tensor | np.ndarray):
        array = cast("Any", data)
        if array.ndim == 1 and (isinstance(data, Tensor) or array.dtype.kind not in "OUS"):
            return Source("the token ids", iter([Element(0, "the token ids", array)]))
        if array.ndim not in (1, 2):
            shape = list(array.shape)
            raise CalibrationError(f"The token ids have the shape {shape}; give [length] or [rows, length].")
        return _indexed(array, "row", _ALL, rng)
    loaded = _as_dataset(data, "the data set", rng)
    if loaded is not None:
        return loaded
    if isinstance(data, Mapping):
        return Source(_ALL, iter([Element(0, _ALL, cast("object", data))]))
    if isinstance(data, Sequence) and not isinstance(data, _BYTES):
        return _open_sequence(cast("Sequence[object]", data), rng)
    if isinstance(data, Iterable) and not isinstance(data, _BYTES):
        stream = cast("Iterable[object]", data)
        elements = (Element(at, f"item {at} of the data", item) for at, item in enumerate(stream))
        return Source(_ALL, elements)
    raise CalibrationError(f"Calibration data cannot be {shown(cast('object', data))}; give {_FORMS}.")


def _open_path(given: str | Path, rng: random.Random) -> Source:
    path = Path(given)
    if not _exists(path):
        raise CalibrationError(
            f"The calibration data {shown(str(given))} is no file and no folder. Check the path; text itself "
            "is given as a list of strings."
        )
    if not is_saved_dataset(path):
        return Source(str(path), file_elements([path], rng))
    library = optional("datasets", f"reading the data set {path}")
    try:
        loaded = library.load_from_disk(str(path))
    except (OSError, ValueError, KeyError, TypeError, library.exceptions.DatasetsError) as failure:
        raise CalibrationError(f"The data set {path} cannot be read: {failure}") from failure
    return cast("Source", _as_dataset(loaded, str(path), rng))


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):
        # Text that is too long for a name, or that holds a zero.
        return False


def _open_sequence(data: Sequence[object], rng: random.Random) -> Source:
    if not data:
        raise CalibrationError(f"The calibration data is an empty list; give {_FORMS}.")
    first = data[0]
    if isinstance(first, int | np.integer) and not isinstance(first, bool):
        return Source("the token ids", iter([Element(0, "the token ids", data)]))
    paths = [Path(item) for item in data if isinstance(item, str | Path) and _names_a_file(item)]
    if len(paths) == len(data):
        name = str(paths[0]) if len(paths) == 1 else f"the {len(paths)} files from {paths[0]} on"
        return Source(name, file_elements(paths, rng))
    if paths:
        # A text may be the name of a file by chance, but the others are then no names at all.
        named = any(isinstance(item, Path) for item in data)
        for item in data:
            if not _names_a_file(item) and (named or _looks_like_a_path(item)):
                raise CalibrationError(
                    f"Some of the calibration data are paths, such as {paths[0]}, and {shown(item)} names no "
                    "file. Give texts alone, or paths of files that exist."
                )
    return _indexed(data, "item", _ALL, rng)


def _names_a_file(item: object) -> bool:
    if isinstance(item, str):
        return 0 < len(item) < 4096 and "\n" not in item and _exists(Path(item))
    return isinstance(item, Path)


def _looks_like_a_path(item: object) -> bool:
    return isinstance(item, str) and not any(map(str.isspace, item)) and Path(item).suffix != ""


def _indexed(data: Any, what: str, name: str, rng: random.Random) -> Source:
    order = shuffled(len(data), rng)
    return Source(name, (Element(at, f"{what} {at} of {name}", data[at]) for at in order))


def _as_dataset(data: object, name: str, rng: random.Random) -> Source | None:
    # Whoever holds an object of the library has imported it.
    library: Any = sys.modules.get("datasets")
    if library is None:
        return None
    if isinstance(data, library.DatasetDict | library.IterableDatasetDict):
        splits = cast("Mapping[str, Any]", data)
        split = "train" if "train" in splits else next(iter(splits), "")
        if "train" not in splits and len(splits) != 1:
            raise CalibrationError(f"{name} has no split 'train' but {list(splits)}; give one of them.")
        return _as_dataset(splits[split], f"the split {split!r} of {name}", rng)
    if not isinstance(data, library.Dataset | library.IterableDataset):
        return None
    rows = cast("Any", data)
    if rows.features is not None:
        strings = [key for key, kind in rows.features.items() if getattr(kind, "dtype", "") in _STRINGS]
        # The others may be pictures, which would be decoded.
        rows = rows.select_columns(content_columns(list(rows.features), strings, name))
    if isinstance(data, library.Dataset):
        return _indexed(rows, "row", name, rng)
    return Source(name, (Element(at, f"row {at} of {name}", row) for at, row in enumerate(rows)))
