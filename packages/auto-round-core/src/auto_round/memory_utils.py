"""Watching memory and giving it back: av-memory's functions, and one that applies the configuration.

The functions of av-memory are its very own objects, so that what is tracked through either name is one
recording. Sizes in names that end in `_mb` are in MB of 2**20 bytes.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import av_memory
from av_memory import (
    AllocatorTuning,
    MemoryTracker,
    Optimization,
    clear_memory,
    enable_memory_tracking,
    get_cpu_memory,
    get_gpu_memory,
    get_memory_stats,
    reset_peak_memory,
)

from auto_round.config_manager import get_config
from auto_round.exceptions import ConfigurationError

__all__ = [
    "MemoryTracker",
    "Optimization",
    "clear_memory",
    "enable_memory_tracking",
    "get_cpu_memory",
    "get_gpu_memory",
    "get_memory_stats",
    "optimize_memory_usage",
    "reset_peak_memory",
]


def optimize_memory_usage() -> Optimization:
    """Set the process up as `get_config().memory` says, and give back what is free already.

    On a CPU: with `clean_weights_after_use`, av-memory tunes the C library's allocator so that weights that
    are let go leave the process at once (glibc only; elsewhere nothing is tuned, and the result says so). It
    holds for the rest of the process and makes allocating large blocks slower. Without
    `clean_weights_after_use` weights stay, and the allocator is left alone. Then garbage is collected, which
    takes about 0.2 s with torch, and the heap trimmed.
    On a GPU that torch is using: its cache of free blocks is emptied as well. None is ever started.

    `workspace_dir` is made if it is missing and must be writable. `max_ram_mb` must be more than the process
    holds afterwards. `use_cpu_offload` and `gpu_batch_size` concern models as they are loaded and run; there
    is nothing to do about them here.

    Returns:
        What was done to the allocator, or why nothing was, and what was freed.

    Raises:
        ConfigurationError: `workspace_dir` cannot be used, or the process holds `max_ram_mb` already; the
            message says what would do.
    """
    memory = get_config().memory
    if memory.workspace_dir is not None:
        _check_workspace(Path(memory.workspace_dir))
    if memory.clean_weights_after_use:
        done = av_memory.optimize_memory_usage()
    else:
        reason = "not applied: memory.clean_weights_after_use is False, so weights stay"
        done = Optimization(AllocatorTuning(False, reason), clear_memory(force_cuda_empty_cache=True))
    held_mb = done.release.rss_after_mb
    if memory.max_ram_mb is not None and held_mb >= memory.max_ram_mb:
        raise ConfigurationError(
            f"memory.max_ram_mb is {memory.max_ram_mb}, but this process holds {held_mb:.0f} MB already; set "
            f"it to more than {int(held_mb) + 1}, or to None for no limit."
        )
    return done


def _check_workspace(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as failure:
        raise ConfigurationError(
            f"memory.workspace_dir {folder} cannot be written to: {failure.strerror}. Name another folder, "
            "or None for a temporary one."
        ) from failure
