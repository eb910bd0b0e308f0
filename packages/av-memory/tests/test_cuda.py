"""GPU figures against torch's own counters, on a real device."""

import av_memory
import pytest
import torch
from av_memory import MemoryTracker, clear_memory

pytestmark = pytest.mark.cuda

MB = 2**20


@pytest.fixture(autouse=True)
def _clean_device():
    torch.cuda.init()
    torch.cuda.empty_cache()
    yield
    torch.cuda.empty_cache()


def test_usage_is_the_allocators():
    before = av_memory.get_gpu_memory(0)
    tensor = torch.ones(100 * 2**18, device="cuda:0")
    assert av_memory.get_gpu_memory(0) - before == pytest.approx(100, abs=1)
    assert av_memory.get_gpu_memory() * MB == sum(
        torch.cuda.memory_allocated(index) for index in range(torch.cuda.device_count())
    )
    assert av_memory.get_memory_stats().gpus[0].current_mb == av_memory.get_gpu_memory(0)
    del tensor
    with pytest.raises(ValueError, match="no CUDA device"):
        av_memory.get_gpu_memory(torch.cuda.device_count())


def test_a_scope_reports_peak_and_net_of_each_device():
    torch.cuda.reset_peak_memory_stats()
    kept = []
    with MemoryTracker("gpu") as tracker:
        burst = torch.ones(200 * 2**18, device="cuda:0")
        del burst
        kept.append(torch.ones(50 * 2**18, device="cuda:0"))
    usage = tracker.result.gpus[0]
    assert usage.peak_mb - usage.start_mb == pytest.approx(200, abs=1)
    assert usage.peak_exact
    assert usage.net_mb == pytest.approx(50, abs=1)
    assert usage.peak_mb * MB == torch.cuda.max_memory_allocated(0)


def test_tracking_leaves_torchs_own_peak_alone_and_high_water_is_exact_below_it():
    big = torch.ones(300 * 2**18, device="cuda:0")
    del big
    peak = torch.cuda.max_memory_allocated(0)
    with MemoryTracker("plain"):
        pass
    assert torch.cuda.max_memory_allocated(0) == peak
    with MemoryTracker("exact", high_water=True) as tracker:
        small = torch.ones(20 * 2**18, device="cuda:0")
        del small
    usage = tracker.result.gpus[0]
    assert usage.peak_mb - usage.start_mb == pytest.approx(20, abs=1)
    assert usage.peak_exact
    assert av_memory.get_memory_stats().peak_gpu_mb * MB >= peak


def test_overlapping_scopes_keep_their_peaks_through_a_reset():
    with MemoryTracker("outer") as outer:
        burst = torch.ones(150 * 2**18, device="cuda:0")
        del burst
        av_memory.reset_peak_memory()
    assert outer.result.gpus[0].peak_mb - outer.result.gpus[0].start_mb == pytest.approx(150, abs=1)


def test_clear_memory_frees_a_named_tensor_and_the_cache():
    tensor = torch.ones(64 * 2**18, device="cuda:0")
    reserved = torch.cuda.memory_reserved(0)
    release = clear_memory(tensor)
    assert release.freed_bytes == 64 * MB
    assert release.cuda_cache_freed_bytes >= 64 * MB
    assert torch.cuda.memory_reserved(0) <= reserved - 64 * MB
    with pytest.raises(RuntimeError, match="freed by clear_memory"):
        tensor.sum()


def test_views_on_the_device_are_left():
    dataset = torch.ones(8, 2**18, device="cuda:0")
    batch = dataset[:2]
    assert clear_memory([batch]).freed_bytes == 0
    assert dataset.sum().item() == 8 * 2**18


def test_the_search_goes_by_torchs_out_of_memory_error():
    free, _ = torch.cuda.mem_get_info(0)
    unit = free // 10

    def step(size: int) -> None:
        block = torch.empty(size * unit, dtype=torch.uint8, device="cuda:0")
        block[::4096] = 1

    assert 5 <= av_memory.find_batch_size(step, 64, steps=4) <= 10
