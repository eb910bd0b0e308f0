"""Tell what memory a program uses, on the processor and on GPUs, and give it back.

Sizes in names that end in ``_mb`` are in MB of 2**20 bytes. torch is used only if the program has
imported it.
"""

from av_memory.allocator import AllocatorTuning, trim_heap, tune_allocator
from av_memory.budget import MemoryBudget, MemoryBudgetExceeded, find_batch_size
from av_memory.probes import MemoryProbeError
from av_memory.recording import Recording, RecordingError, ScopeRecord, Usage
from av_memory.release import Kept, Optimization, Release, clear_memory, optimize_memory_usage
from av_memory.tracker import (
    GpuStats,
    MemoryStats,
    MemoryTracker,
    ScopeStats,
    clear_memory_stats,
    enable_memory_tracking,
    get_cpu_memory,
    get_gpu_memory,
    get_memory_stats,
    get_recording,
    reset_peak_memory,
    save_report,
    save_trace,
    to_json,
)

__version__ = "0.1.0"

__all__ = [
    "AllocatorTuning",
    "GpuStats",
    "Kept",
    "MemoryBudget",
    "MemoryBudgetExceeded",
    "MemoryProbeError",
    "MemoryStats",
    "MemoryTracker",
    "Optimization",
    "Recording",
    "RecordingError",
    "Release",
    "ScopeRecord",
    "ScopeStats",
    "Usage",
    "clear_memory",
    "clear_memory_stats",
    "enable_memory_tracking",
    "find_batch_size",
    "get_cpu_memory",
    "get_gpu_memory",
    "get_memory_stats",
    "get_recording",
    "optimize_memory_usage",
    "reset_peak_memory",
    "save_report",
    "save_trace",
    "to_json",
    "trim_heap",
    "tune_allocator",
]
