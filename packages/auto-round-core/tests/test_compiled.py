"""What is compiled does what it does as it is, and where compiling fails the work goes on."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from auto_round import AutoRound
from auto_round.config_manager import LayerSettings, QuantizationConfig
from auto_round.exceptions import ConfigurationError
from auto_round.quantization import _autoround
from auto_round.quantization._block_loss import BlockLoss
from auto_round.quantization._capture import Call, Capture
from auto_round.quantization._compiled import Compiled, missing_compiler
from auto_round.quantization._pieces import Scratch
from auto_round.quantization._report import BlockReport
from auto_round.quantization._tuning import make_tuner
from torch import Tensor, nn

CPU = torch.device("cpu")
needs_compiler = pytest.mark.skipif(
    missing_compiler(CPU) is not None, reason=f"nothing can be compiled here: {missing_compiler(CPU)}"
)


def warned(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name.startswith("auto_round")]


def trained(quality: str, symmetric: bool, *, compiles: bool) -> list[Tensor]:
    """Return what comes of 12 steps, in pieces of several sizes, of a weight that is stored transposed."""
    settings = LayerSettings(bits=3, group_size=32, symmetric=symmetric, weight_dtype="int")
    config = QuantizationConfig(bits=3, group_size=32, quality=quality, iters=12)
    generator = torch.Generator().manual_seed(1)
    found: list[Tensor] = []
    for shape in ((32, 64), (4200, 96)):
        w = torch.randn(shape, generator=generator)
        tuner = make_tuner(w, settings, config, Scratch(CPU, compiles=compiles))
        written = torch.empty(shape[::-1], dtype=torch.bfloat16).t()
        with torch.no_grad():
            tuner.write(written, keep=True)
            for step in range(12):
                gradient = torch.randn(shape, generator=generator).bfloat16()
                tuner.step(gradient, written, 1 - step / 12, keep=step in (3, 7))
        result = tuner.result()
        zeros = [] if result.zero is None else [result.zero.float()]
        found += [written.clone(), result.codes.float(), result.scale.float(), *zeros]
    return found


@needs_compiler
@pytest.mark.parametrize(
    ("quality", "symmetric"),
    [
        ("signround", False),
        ("best", True),
        pytest.param("signround", True, marks=pytest.mark.slow),
        pytest.param("best", False, marks=pytest.mark.slow),
    ],
)
def test_compiled_steps_are_the_same(quality: str, symmetric: bool) -> None:
    for one, other in zip(
        trained(quality, symmetric, compiles=True), trained(quality, symmetric, compiles=False), strict=True
    ):
        # Sums of another order move a few weights that lie on the edge between two codes, and scales that
        # would be rounded to float16 in one and not in the other would move them all.
        assert float((one != other).float().mean()) < 1e-3


@needs_compiler
@pytest.mark.parametrize(
    "family",
    [
        "llama",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("gemma2", "opt", "gpt2", "phi", "bert")),
    ],
)
def test_blocks_of_one_kind_share_a_compiled_loss_and_keep_their_own_weights(
    family: str,
    random_model: Callable[..., Any],
    calibration_ids: Tensor,
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = random_model(family)
    blocks = max((m for m in model.modules() if isinstance(m, nn.ModuleList)), key=len)
    hidden, calls = Capture(model, list(blocks)).run(calibration_ids)
    target = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(3))
    compiled, plain = BlockLoss(compiles=True), BlockLoss(compiles=False)

    def gradients(loss: BlockLoss, block: nn.Module, call: Call) -> list[Tensor]:
        errors = loss(block, call, hidden, target)
        errors.sum().backward()
        found = [errors.detach(), *(p.grad for p in block.parameters() if p.grad is not None)]
        block.zero_grad(set_to_none=True)
        return found

    for block, call in zip(blocks, calls, strict=True):
        for name, parameter in block.named_parameters():
            parameter.requires_grad_(parameter.ndim == 2 and "norm" not in name)
        found: list[list[Tensor]] = []
        for loss in (compiled, plain):
            with loss.fast(block, lambda call=call: (call, hidden, target)):
                assert all(parameter.grad is None for parameter in block.parameters())
                found.append(gradients(loss, block, call))
        for one, other in zip(*found, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)
    assert not warned(caplog)


def quantized(source: Any, ids: Tensor, **settings: Any) -> list[BlockReport]:
    quantization = {"bits": 3, "group_size": 32, "iters": 8, "nsamples": 6, "seqlen": 16, "batch_size": 4}
    config = {"quantization": {**quantization, **settings}}
    with AutoRound(source, None, config, calibration=ids, progress=False) as rounder:
        rounder.quantize()
        return rounder.report.blocks


@needs_compiler
def test_a_model_is_quantised_as_well_compiled(
    saved_model: Callable[[str], Path], calibration_ids: Tensor, caplog: pytest.LogCaptureFixture
) -> None:
    compiled, plain = (
        quantized(saved_model("llama"), calibration_ids, compile=wanted, lr=0.05) for wanted in (True, False)
    )
    assert compiled[0].loss_before == plain[0].loss_before
    assert compiled[0].step_losses[0] == pytest.approx(plain[0].step_losses[0], rel=1e-2)
    for one, other in zip(compiled, plain, strict=True):
        assert one.loss_after == pytest.approx(other.loss_after, rel=0.1)
        assert one.loss_after < one.loss_before
    assert not warned(caplog)


_PEEKING = """
import torch
from auto_round import AutoRound
from auto_round.quantization._compiled import Compiled

class Peeking(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.up = torch.nn.Linear(32, 32)

    def forward(self, x):
        # No compiler knows this value.
        return x + self.up(x) if float(x.abs().max()) > 0 else x

class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = torch.nn.Embedding(16, 32)
        self.blocks = torch.nn.ModuleList([Peeking(), Peeking()])

    def forward(self, ids):
        x = self.embedding(ids)
        for block in self.blocks:
            x = block(x)
        return x

calls = []

def function(x, rate):
    torch._dynamo.graph_break()
    calls.append(1)
    return x * rate
"""
# Where compiling failed, torch leaves the interpreter in another state, so that is done in a process apart.


@pytest.mark.parametrize(
    "script",
    [
        pytest.param(
            """
quantization = {"bits": 2, "group_size": 32, "iters": 40, "nsamples": 6, "seqlen": 16, "compile": True}
torch.manual_seed(0)
ids = torch.randint(0, 16, (6, 16))
with AutoRound(Model(), config={"quantization": quantization}, calibration=ids) as rounder:
    rounder.quantize()
    assert all(block.loss_after < block.loss_before for block in rounder.report.blocks)
""",
            marks=needs_compiler,
            id="block",
        ),
        pytest.param(
            """
compiled = Compiled(function, dynamic=True, precise=True)
for _ in range(2):
    assert torch.equal(compiled(torch.ones(3), 0.5), torch.full((3,), 0.5))
assert (len(calls), compiled.works) == (2, False)
""",
            id="function",
        ),
    ],
)
def test_what_cannot_be_compiled_is_run_as_it_is_and_said_once(script: str) -> None:
    run = subprocess.run(
        [sys.executable, "-c", _PEEKING + script], check=False, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    assert run.stderr.count("torch.compile failed") == 1, run.stderr


@needs_compiler
def test_a_folder_for_compiled_code_that_cannot_be_made_is_said(tmp_path: Path) -> None:
    script = """
from auto_round.quantization._compiled import Compiled
import torch
assert Compiled(lambda x: x + 1, dynamic=False, precise=True)(torch.ones(1)).item() == 2
"""
    (tmp_path / "file").touch()
    run = subprocess.run(
        [sys.executable, "-c", script],
        check=False,
        capture_output=True,
        text=True,
        env={**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "file" / "x")},
    )
    assert run.returncode == 0, run.stderr
    assert run.stderr.count("torch.compile failed") == 1, run.stderr


@pytest.mark.slow
@needs_compiler
def test_many_kinds_are_compiled_in_one_process() -> None:
    compiled = Compiled(lambda x: x + 1, dynamic=False, precise=True)
    for size in range(2, 13):
        assert compiled(torch.ones(size)).sum() == 2 * size
    assert compiled.works


def test_compiling_is_refused_where_there_is_no_compiler(
    saved_model: Callable[[str], Path], calibration_ids: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(ConfigurationError, match=r"no C\+\+ compiler no-such-compiler.*None"):
        quantized(saved_model("llama"), calibration_ids, compile=True)
    monkeypatch.setattr(_autoround, "_WORTH_COMPILING", 0)
    assert quantized(saved_model("llama"), calibration_ids)


@pytest.mark.parametrize(
    ("worth", "settings", "limit", "expected"),
    [
        (1, {}, None, True),
        (10**9, {}, None, False),
        (10**9, {"compile": True}, None, True),
        (1, {"compile": False}, None, False),
        (1, {}, 100_000, False),
        (1, {"compile": True}, 100_000, True),
        (1, {"compile": True, "quality": "rtn"}, None, False),
    ],
)
@needs_compiler
def test_what_is_long_is_compiled_where_memory_is_not_limited(
    worth: int,
    settings: dict[str, Any],
    limit: int | None,
    expected: bool,
    saved_model: Callable[[str], Path],
    calibration_ids: Tensor,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Planned(Exception):
        pass

    def planned(*given: Any) -> None:
        means = next(one for one in given if isinstance(one, _autoround.Means))
        raise Planned(means.compiles)

    monkeypatch.setattr(_autoround, "_WORTH_COMPILING", worth)
    monkeypatch.setattr(_autoround, "Walk", planned)
    config = {
        "memory": {"max_ram_mb": limit},
        "quantization": {"group_size": 32, "nsamples": 6, "seqlen": 16, **settings},
    }
    with (
        AutoRound(saved_model("llama"), None, config, calibration=calibration_ids, progress=False) as rounder,
        pytest.raises(Planned) as found,
    ):
        rounder.quantize()
    assert found.value.args == (expected,)
