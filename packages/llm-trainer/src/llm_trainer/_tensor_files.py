"""Writing tensors."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file  # pyright: ignore[reportUnknownVariableType]
from torch import Tensor


def save_tensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str], *, target: Path | None = None
) -> None:
    """Write a safetensors file.

    Args:
        path: Where.
        tensors: Its content.
        metadata: Text that goes with it.
        target: What an error names, if `path` is but a temporary one.

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
        raise OSError(number, f"Tensors cannot be written ({error})", str(target or path)) from error
