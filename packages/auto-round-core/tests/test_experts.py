"""Products of groups of rows against torch's own, and the memory that they leave behind."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from auto_round import AutoRound
from auto_round.quantization import _experts
from auto_round.quantization._experts import FewShapes, _filled
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor


@settings(max_examples=40, deadline=None)
@given(
    counts=st.lists(st.integers(0, 90), min_size=1, max_size=5).filter(any),
    transposed=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_products_and_gradients_are_those_of_each_group_by_itself(
    counts: list[int], transposed: bool, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(sum(counts), 8, generator=generator, requires_grad=True)
    stored = torch.randn(len(counts), 8, 16, generator=generator)
    stored = stored.transpose(1, 2).contiguous() if transposed else stored
    stored.requires_grad_()
    weights = stored.transpose(1, 2) if transposed else stored
    offs = torch.tensor(counts).cumsum(0).int()
    with FewShapes():
        found = F.grouped_mm(rows, weights, offs=offs)
    parts = zip(rows.split(counts), weights, strict=True)
    expected = torch.cat([part @ weight for part, weight in parts])
    torch.testing.assert_close(found, expected)
    upstream = torch.randn(found.shape, generator=generator)
    wanted = torch.autograd.grad(expected, [rows, stored], upstream)
    gradients = torch.autograd.grad(found, [rows, stored], upstream)
    for gradient, want in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(gradient, want, rtol=1e-4, atol=1e-4)
    assert gradients[1].stride() == stored.stride()


def test_rows_beyond_the_last_group_are_nothing() -> None:
    rows, weights = torch.ones(5, 8), torch.ones(2, 8, 4)
    with FewShapes():
        found = F.grouped_mm(rows, weights, offs=torch.tensor([1, 3], dtype=torch.int32))
    assert found.tolist() == [[8.0] * 4] * 3 + [[0.0] * 4] * 2


@pytest.mark.parametrize("count", [0, 1, 63, 64, 200])
def test_a_layer_of_rows_is_what_it_is_without(count: int) -> None:
    layer = torch.nn.Linear(16, 8).bfloat16()
    rows = torch.randn(count, 16).bfloat16().requires_grad_()
    expected = layer(rows)
    wanted = torch.autograd.grad(expected.float().square().sum(), [rows, *layer.parameters()])
    with FewShapes():
        found = layer(rows)
        gradients = torch.autograd.grad(found.float().square().sum(), [rows, *layer.parameters()])
    torch.testing.assert_close(found, expected)
    for gradient, want in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(gradient, want, rtol=2e-2, atol=2e-2)


def test_the_shapes_are_few_and_not_much_larger() -> None:
    counts = {len(_filled(torch.empty(count, 1))) for count in range(1, 4097)}
    assert len(counts) < 40
    for count in range(512, 4097, 37):
        assert count <= len(_filled(torch.empty(count, 1))) <= 1.125 * count + 1


def test_experts_of_a_block_are_run_in_few_shapes(
    saved_model: Callable[[str], Path], calibration_ids: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts: set[int] = set()

    def noted(rows: Tensor) -> Tensor:
        filled = _filled(rows)
        counts.add(len(filled))
        return filled

    monkeypatch.setattr(_experts, "_filled", noted)
    fields = {"group_size": 32, "iters": 2, "nsamples": 6, "seqlen": 16, "batch_size": 4}
    folder = str(saved_model("mixtral"))
    config = {"quantization": fields}
    with AutoRound(folder, config=config, calibration=calibration_ids, progress=False) as rounder:
        rounder.quantize()
    # Of 128 or 64 rows, each to two of three experts.
    assert counts
    assert counts <= {64, 128}


_SCRIPT = """
import torch
from auto_round import AutoRound
from auto_round.quantization import _experts
from auto_round.quantization._experts import FewShapes
def rss():
    return next(int(l.split()[1]) for l in open("/proc/self/status") if l.startswith("VmRSS")) / 1024
weights = torch.randn(4, 256, 256).bfloat16().requires_grad_()
generator = torch.Generator().manual_seed(0)
with FewShapes():
    for step in range(60):
        rows = torch.randn(256, 256, generator=generator).bfloat16().requires_grad_()
        offs = torch.randint(0, 257, (4,), generator=generator).sort().values.int()
        if together:
            found = torch.nn.functional.grouped_mm(rows, weights, offs=offs)
        else:
            parts = rows.tensor_split(offs.tolist())
            found = torch.cat([torch.nn.functional.linear(*pair) for pair in zip(parts, weights)])
        found.square().sum().backward()
        weights.grad = None
        if step == 9:
            before = rss()
print(rss() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
@pytest.mark.parametrize("together", [True, False])
def test_memory_does_not_grow_with_the_batches(together: bool) -> None:
    script = f"{together = }\n{_SCRIPT}"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    # Without this it is some 200 MB.
    assert float(done.stdout) < 30
