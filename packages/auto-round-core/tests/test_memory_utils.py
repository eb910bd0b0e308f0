"""auto_round.memory_utils: av-memory's own objects, and the configuration's memory area applied."""

import inspect
import subprocess
import sys
from pathlib import Path

import av_memory
import pytest
from auto_round import memory_utils
from auto_round.config_manager import config_scope
from auto_round.exceptions import ConfigurationError

SHARED = [
    "clear_memory", "MemoryTracker", "enable_memory_tracking", "get_memory_stats", "get_gpu_memory",
    "get_cpu_memory", "reset_peak_memory",
]  # fmt: skip


def python(code):
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False
    )
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("name", SHARED)
def test_the_names_are_those_of_av_memory(name):
    assert getattr(memory_utils, name) is getattr(av_memory, name)
    assert name in memory_utils.__all__
    assert inspect.getdoc(getattr(memory_utils, name))


def test_what_is_tracked_shows_under_both_names():
    with memory_utils.MemoryTracker("through auto_round"):
        pass
    assert "through auto_round" in av_memory.get_memory_stats().scopes
    memory_utils.clear_memory()


# glibc keeps freed blocks of 20 MB once it has seen larger ones freed; the tuned allocator gives them back.
HOARD = """
import ctypes
from auto_round.config_manager import configure
from auto_round.memory_utils import get_cpu_memory, optimize_memory_usage
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
libc.free.argtypes = [ctypes.c_void_p]
def touched(megabytes):
    block = libc.malloc(megabytes << 20)
    ctypes.memset(block, 1, megabytes << 20)
    return block
libc.free(touched(30))
configure(memory={"clean_weights_after_use": %s})
done = optimize_memory_usage()
before = get_cpu_memory()
blocks = [touched(20) for _ in range(5)]
for block in blocks[:-1]:
    libc.free(block)
left = get_cpu_memory() - before
assert done.allocator.applied is %s, done
assert %s, (left, done)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the allocator is glibc's")
def test_with_cleaning_what_is_let_go_leaves_the_process():
    python(HOARD % (True, True, "left < 40"))


@pytest.mark.skipif(sys.platform != "linux", reason="the allocator is glibc's")
def test_without_cleaning_the_allocator_is_left_alone():
    python(HOARD % (False, False, "left > 80 and 'clean_weights_after_use' in done.allocator.reason"))


def test_torch_is_not_loaded_and_the_scope_decides(tmp_path):
    python(f"""
import sys
from auto_round.config_manager import config_scope
from auto_round.memory_utils import optimize_memory_usage
with config_scope(memory={{"workspace_dir": {str(tmp_path / "a" / "b")!r}, "max_ram_mb": 10**6}}):
    assert optimize_memory_usage().release.rss_after_mb > 1
assert "torch" not in sys.modules
""")
    assert (tmp_path / "a" / "b").is_dir()


def test_a_workspace_that_cannot_be_used(tmp_path):
    (tmp_path / "file").touch()
    # Nobody can make a file in /proc, not even root.
    for folder in (
        tmp_path / "file",
        tmp_path / "file" / "below",
        *[Path("/proc")][: sys.platform == "linux"],
    ):
        with (
            config_scope(memory={"workspace_dir": folder, "clean_weights_after_use": False}),
            pytest.raises(ConfigurationError, match=f"workspace_dir {folder} cannot be written to"),
        ):
            memory_utils.optimize_memory_usage()


def test_a_budget_that_is_spent_names_what_would_do():
    with config_scope(memory={"max_ram_mb": 2, "clean_weights_after_use": False}) as config:
        with pytest.raises(ConfigurationError, match="max_ram_mb is 2, but this process holds") as caught:
            memory_utils.optimize_memory_usage()
        enough = int(str(caught.value).split("more than ")[1].split(",")[0])
        assert enough >= memory_utils.get_cpu_memory() * 0.8
        config.memory.max_ram_mb = enough + 500
        memory_utils.optimize_memory_usage()
