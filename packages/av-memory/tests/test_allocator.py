"""The allocator's setting has the effect that it claims."""

import sys

import pytest
from av_memory import allocator

# glibc raises its threshold when a mapped block is freed; later blocks below it come from the heap and
# stay there while a smaller block above them lives.
HOARD = """
import ctypes, os
import av_memory
{tune}
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
libc.malloc.argtypes = [ctypes.c_size_t]
libc.free.argtypes = [ctypes.c_void_p]
def touched(size):
    pointer = libc.malloc(size)
    ctypes.memset(pointer, 1, size)
    return pointer
libc.free(touched(30 << 20))
before = av_memory.get_cpu_memory()
blocks = [touched(20 << 20) for _ in range(10)]
pin = touched(1 << 20)
for block in blocks:
    libc.free(block)
print(av_memory.get_cpu_memory() - before)
print(av_memory.trim_heap())
print(av_memory.get_cpu_memory() - before)
"""


def test_fixing_the_threshold_ends_the_hoarding_and_trimming_gives_back(run_fresh):
    if allocator._glibc_version() is None:
        pytest.skip("this C library is not glibc")
    hoarded, _, trimmed = run_fresh(HOARD.format(tune="")).split()
    tuned, _, _ = run_fresh(HOARD.format(tune="print(end=''); assert av_memory.tune_allocator()")).split()
    assert float(hoarded) > 190  # 200 MB freed, none given back
    assert float(trimmed) < 10
    assert float(tuned) < 10


def test_it_says_what_it_did_or_why_not(monkeypatch, run_fresh):
    done = allocator.tune_allocator(1 << 21)
    if allocator._glibc_version() is not None:
        assert done.applied
        assert done.mmap_threshold_bytes == 1 << 21
    out = run_fresh(
        "import av_memory; d = av_memory.tune_allocator(); print(bool(d), d.reason)",
        env={"MALLOC_MMAP_THRESHOLD_": "65536"},
    )
    assert out.startswith("False")
    assert "environment" in out
    monkeypatch.setattr(allocator, "_replacement", lambda: "jemalloc")
    assert "jemalloc" in allocator.tune_allocator().reason
    monkeypatch.setattr(allocator.os, "confstr", lambda name: None)
    assert "musl" in allocator.tune_allocator().reason
    assert allocator.trim_heap() is False
    monkeypatch.setattr(sys, "platform", "darwin")
    assert "macOS" in allocator.tune_allocator().reason
    monkeypatch.setattr(sys, "platform", "win32")
    assert "Windows" in allocator.tune_allocator().reason


@pytest.mark.parametrize("threshold", [0, -1, 4095, (32 << 20) + 1])
def test_a_threshold_out_of_range_is_refused(threshold: int):
    with pytest.raises(ValueError, match="4096"):
        allocator.tune_allocator(threshold)


FAULTS = """
import resource
import av_memory
{tune}
for _ in range(40):
    bytearray(16 << 20)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
print(av_memory.get_cpu_memory())
av_memory.trim_heap()
print(av_memory.get_cpu_memory())
"""


def test_a_large_trim_threshold_keeps_the_heap_until_it_is_trimmed(run_fresh):
    if allocator._glibc_version() is None:
        pytest.skip("this C library is not glibc")
    small, _, _ = run_fresh(FAULTS.format(tune="av_memory.tune_allocator()")).split()
    large, held, trimmed = run_fresh(
        FAULTS.format(tune="av_memory.tune_allocator(32 << 20, trim_threshold_bytes=1 << 30)")
    ).split()
    # 4096 pages a block: without, each of the 40 is mapped and faulted in anew.
    assert int(small) - int(large) > 30 * 4096
    assert int(large) < 20_000
    assert float(held) - float(trimmed) > 15


@pytest.mark.parametrize("threshold", [-1, 2**31])
def test_a_trim_threshold_out_of_range_is_refused(threshold):
    with pytest.raises(ValueError, match="trim_threshold_bytes"):
        allocator.tune_allocator(trim_threshold_bytes=threshold)
