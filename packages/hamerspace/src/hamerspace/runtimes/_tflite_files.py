"""TFLite's files, looked at before its interpreter reads them, which trusts every offset that they hold."""

from __future__ import annotations

import mmap
from pathlib import Path
from typing import Any

from hamerspace._imports import need
from hamerspace.exceptions import ArtifactError


def check_whole(model: Path | bytes, where: str) -> None:
    """Raise unless all that a model refers to lies within it.

    Every table is read by TensorFlow's own description of the format; weights are pointed at, not copied.

    Raises:
        ArtifactError: it is no model of TFLite, or is cut short.
    """
    if isinstance(model, bytes):
        _read(model, where)
        return
    try:
        with model.open("rb") as file:
            content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError) as error:  # ValueError: the file is empty
        raise ArtifactError(f"{where} cannot be opened by TFLite: {error}") from error
    # Arrays of the description may still point into it: it is closed with the last of them.
    _read(content, where)


def _read(content: Any, where: str) -> None:
    if content[4:8] != b"TFL3":
        raise ArtifactError(f"{where} is no model of TFLite")
    try:
        found = need("tensorflow.lite.python.schema_py_generated").ModelT.InitFromPackedBuf(content)
        ends = [one.offset + one.size for one in found.buffers]
    except Exception as error:
        raise ArtifactError(f"{where} is damaged: {error}") from error
    if max(ends, default=0) > len(content):
        raise ArtifactError(f"{where} is cut short: its weights do not lie within it")
