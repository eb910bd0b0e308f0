"""What has to be written to disk before a checkpoint can be read in parts."""

from __future__ import annotations

import os
import shutil
import tempfile
import weakref
from os import PathLike
from pathlib import Path

from auto_round._files import shown
from auto_round.config_manager import get_config
from auto_round.exceptions import ConfigurationError
from auto_round.low_cpu_mem._checkpoint import CheckpointReader, kind_of
from auto_round.low_cpu_mem._sources import FileSource
from auto_round.low_cpu_mem._tensor_utils import read_tensors_by_name, write_safetensors


def open_in_parts(path: Path, save_path: str | PathLike[str] | None) -> CheckpointReader:
    """Open a checkpoint so that no file of it is held in memory as a whole.

    Files of torch before 1.6 can only be loaded whole. They are written as safetensors into a new folder
    within the workspace, one after the other, which takes as much memory as the largest; the folder goes
    with the reader, or at the end of the process. Any other checkpoint is read where it is, and nothing is
    written.

    Args:
        path: Folder of the checkpoint.
        save_path: The workspace; by default `memory.workspace_dir`, or else the system's folder of temporary
            files.

    Raises:
        CheckpointError: As for `CheckpointReader`.
        ConfigurationError: The workspace cannot be written to.
    """
    workspace = get_config().memory.workspace_dir if save_path is None else os.fspath(save_path)
    files = [] if any(path.glob("*.safetensors")) else sorted(path.glob("pytorch_model*.bin"))
    if not any(_is_legacy(file) for file in files):
        return CheckpointReader(path)
    try:
        if workspace is not None:
            Path(workspace).mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix="auto-round-", dir=workspace))
    except OSError as error:
        raise ConfigurationError(
            f"the workspace {shown(workspace)} cannot be written to: {error.strerror}. Files of torch "
            f"before 1.6 must be converted there; name another folder."
        ) from error
    try:
        for number, file in enumerate(files, 1):
            name = f"model-{number:05}-of-{len(files):05}.safetensors"
            write_safetensors(read_tensors_by_name(file), folder / name)
        reader = CheckpointReader(folder)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    weakref.finalize(reader, shutil.rmtree, folder, ignore_errors=True)
    return reader


def _is_legacy(file: Path) -> bool:
    source = FileSource(file)
    try:
        return kind_of(source) == "legacy"
    finally:
        source.close()
