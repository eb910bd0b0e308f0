"""Writing tensors."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file  # pyright: ignore[reportUnknownVariableType]
from torch import Tensor


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> None:
    """Write a safetensors file.

    Raises:
        OSError: It cannot be written; safetensors has an exception of its own for that.
    """
    try:
        save_file(dict(tensors), path, metadata=metadata)
    except SafetensorError as error:
        # It has no number, so whether the disk is full is seen from the disk.
        needed = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        full = shutil.disk_usage(path.parent).free < needed
        number = errno.ENOSPC if full else errno.EIO
        raise OSError(number, f"Tensors cannot be written ({error})", str(path)) from error
