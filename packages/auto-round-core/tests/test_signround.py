"""SignRound's own gradients and steps against autograd of the formulas in the paper."""

import pytest
import torch
from auto_round.config_manager import LayerSettings, QuantizationConfig
from auto_round.quantization._block_loss import sample_errors
from auto_round.quantization._float_signround import FloatSignRound
from auto_round.quantization._integers import (
    asymmetric_scale,
    group_range,
    straight_through_round,
    symmetric_scale,
)
from auto_round.quantization._pieces import Scratch
from auto_round.quantization._rtn import quantize_rtn
from auto_round.quantization._signround import IntegerSignRound
from auto_round.quantization._tuning import make_tuner
from torch import Tensor

CPU = torch.device("cpu")


def settings(bits: int, group_size: int, symmetric: bool, weight_dtype: str = "int") -> LayerSettings:
    return LayerSettings(bits=bits, group_size=group_size, symmetric=symmetric, weight_dtype=weight_dtype)


def exclusive_clamp(x: Tensor, least: float, most: float) -> Tensor:
    """Clamp with no gradient on the bounds, whatever this release of torch gives there."""
    return torch.where((x > least) & (x < most), x, x.clamp(least, most).detach())


def reference(
    w: Tensor, offset: Tensor, low_factor: Tensor, high_factor: Tensor, bits: int, symmetric: bool
) -> Tensor:
    low, high = group_range(w)
    if symmetric:
        scale = symmetric_scale(low * low_factor, high * high_factor, bits, torch.float16)
        zero = torch.full_like(scale, 2.0 ** (bits - 1))
    else:
        scale, zero = asymmetric_scale(low * low_factor, high * high_factor, bits, torch.float16)
    code = straight_through_round(w / scale[..., None] + offset) + zero[..., None]
    return ((exclusive_clamp(code, 0, 2**bits - 1) - zero[..., None]) * scale[..., None]).flatten(1)


def soft_sign(gradient: Tensor, bits: int) -> Tensor:
    """Sign, but for gradients below some of the group's mean magnitude, three quarters of it at 2 bits."""
    full = 0.375 * bits * gradient.abs().mean(-1, keepdim=True)
    return torch.where(gradient.abs() >= full, gradient.sign(), gradient / full)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group_size", [32, -1])
def test_every_step_writes_what_autograd_and_sign_sgd_lead_to(bits, symmetric, group_size):
    generator = torch.Generator().manual_seed(bits)
    w = torch.randn(24, 64, generator=generator)
    w[0].clamp_(min=0)
    w[1].clamp_(max=0)
    steps, rate = 25, 0.03
    tuner = IntegerSignRound(
        w, settings(bits, group_size, symmetric), torch.float16, Scratch(CPU), rate=rate, range_rate=2 * rate
    )
    written = torch.empty_like(w)
    tuner.write(written, keep=True)
    grouped = w.view(24, 1 if group_size == -1 else 2, -1)
    offset = torch.zeros_like(grouped, requires_grad=True)
    factors = [torch.ones(grouped.shape[:2], requires_grad=True) for _ in range(2)]
    for step in range(steps):
        for factor in factors:
            factor.data.clamp_(0, 1)
        expected = reference(grouped, offset, *factors, bits, symmetric)
        assert torch.equal(written, expected), step
        gradient = torch.randn(w.shape, generator=generator)
        gradients = torch.autograd.grad(expected, [offset, *factors], gradient)
        left = 1 - step / steps
        tuner.step(gradient, written, left, keep=False)
        offset.data.sub_(rate * left * soft_sign(gradients[0], bits)).clamp_(-0.5, 0.5)
        for factor, own in zip(factors, gradients[1:], strict=True):
            factor.data.sub_(2 * rate * left * own.sign())


def test_rows_of_zeros_are_left_alone():
    w = torch.zeros(4, 32)
    for symmetric in (True, False):
        chosen = settings(4, 32, symmetric)
        tuner = IntegerSignRound(w, chosen, torch.float16, Scratch(CPU), rate=0.01, range_rate=0.01)
        written = torch.full_like(w, 7)
        tuner.write(written, keep=True)
        tuner.step(torch.zeros(4, 32), written, 1.0, keep=True)
        assert torch.equal(written, w)
        assert torch.equal(tuner.result().dequantize(), w)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("quality", ["signround", "best"])
def test_what_was_kept_is_what_was_written_to_the_last_bit(symmetric, quality):
    generator = torch.Generator().manual_seed(3)
    w = torch.randn(40, 128, generator=generator)
    config = QuantizationConfig(bits=3, group_size=32, symmetric=symmetric, quality=quality, iters=10)
    tuner = make_tuner(w.clone(), settings(3, 32, symmetric), config, Scratch(CPU))
    written = torch.empty_like(w)
    tuner.write(written, keep=True)
    for step in range(10):
        before = written.clone()
        tuner.step(torch.randn(w.shape, generator=generator), written, 1 - step / 10, keep=step == 6)
        if step == 6:
            kept = before
    result = tuner.result()
    assert torch.equal(result.dequantize(), kept)
    assert not torch.equal(written, kept)
    assert int(result.codes.max()) <= 7


def test_before_any_step_it_is_round_to_nearest():
    w = torch.randn(16, 256, generator=torch.Generator().manual_seed(0))
    for symmetric in (True, False):
        chosen = settings(4, 128, symmetric)
        tuner = IntegerSignRound(w, chosen, torch.float16, Scratch(CPU), rate=0.1, range_rate=0.1)
        written = torch.empty_like(w)
        tuner.write(written, keep=True)
        assert torch.equal(written, quantize_rtn(w, chosen, torch.float16).dequantize())


def test_pieces_do_not_change_the_result():
    # More values than one piece of the scratch memory holds, in rows that do not divide it.
    w = torch.randn(700, 320, generator=torch.Generator().manual_seed(1))
    gradient = torch.randn(w.shape, generator=torch.Generator().manual_seed(2))
    written, parts = torch.empty_like(w), []

    def stepped(part: Tensor, by: Tensor, target: Tensor) -> Tensor:
        tuner = IntegerSignRound(
            part, settings(2, 64, True), torch.float16, Scratch(CPU), rate=0.1, range_rate=0.1
        )
        tuner.step(by, target, 1.0, keep=False)
        return target

    stepped(w, gradient, written)
    for start in range(0, 700, 100):
        rows = slice(start, start + 100)
        parts.append(stepped(w[rows], gradient[rows], torch.empty(100, 320)))
    assert torch.equal(written, torch.cat(parts))


def test_gradients_of_a_smaller_type_and_another_layout_are_taken():
    w = torch.randn(32, 64, generator=torch.Generator().manual_seed(1))
    gradient = torch.randn(64, 32, generator=torch.Generator().manual_seed(2)).bfloat16()
    results = []
    for given in (gradient.t(), gradient.t().float().contiguous()):
        tuner = IntegerSignRound(
            w, settings(2, 32, True), torch.float16, Scratch(CPU), rate=0.1, range_rate=0.1
        )
        target = torch.empty(64, 32, dtype=torch.bfloat16).t()
        tuner.step(given, target, 1.0, keep=False)
        results.append(target.clone())
    assert torch.equal(*results)


@pytest.mark.parametrize("weight_dtype", ["mxfp4", "nvfp4", "fp8"])
def test_float_formats_learn_offsets_and_clipping(weight_dtype):
    usual = {"mxfp4": (4, 32), "nvfp4": (4, 16), "fp8": (8, -1)}[weight_dtype]
    chosen = settings(*usual, True, weight_dtype)
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(32, 64, generator=generator)
    # Inputs of few dimensions leave room: errors of one weight can make up for those of another.
    x = torch.randn(256, 8, generator=generator) @ torch.randn(8, 64, generator=generator)
    tuner = FloatSignRound(w, chosen, rate=1 / 60, range_rate=1 / 60)
    written = torch.empty_like(w)
    tuner.write(written, keep=True)
    assert torch.equal(written, quantize_rtn(w, chosen, torch.float16).dequantize())
    target = x @ w.t()
    before = best = float((x @ written.t() - target).square().mean())
    for step in range(60):
        error = x @ written.t() - target
        loss = float(error.square().mean())
        keep, best = loss < best, min(loss, best)
        tuner.step(error.t() @ x, written, 1 - step / 60, keep=keep)
    result = tuner.result().dequantize()
    assert float((x @ result.t() - target).square().mean()) == pytest.approx(best, rel=1e-5)
    assert best < 0.7 * before


def test_rates_follow_the_recipe():
    w = torch.randn(8, 32, generator=torch.Generator().manual_seed(0))

    def moved(bits: int, symmetric: bool = True, **config: object) -> tuple[float, float]:
        made = QuantizationConfig(bits=bits, group_size=32, **config)
        tuner = make_tuner(w.clone(), settings(bits, 32, symmetric), made, Scratch(CPU))
        gradient = torch.ones_like(w)
        gradient[:, ::8] = 100
        tuner.step(gradient, torch.empty_like(w), 1.0, keep=False)
        return float(tuner._all.offset_NK.abs().max()), float((1 - tuner._all.high_factor_N).abs().max())

    assert moved(4, iters=200) == pytest.approx((2 / 200, 0.7 / 200), rel=1e-4)
    assert moved(4, symmetric=False, iters=200) == pytest.approx((2 / 200, 1.4 / 200), rel=1e-4)
    assert moved(3, iters=200) == pytest.approx((2 / 200, 0.7 / 200), rel=1e-4)
    assert moved(3, iters=1000) == pytest.approx((2 / 1000, 1.4 / 1000), rel=1e-4)
    assert moved(4, iters=1000) == pytest.approx((2 / 1000, 0.7 / 1000), rel=1e-4)
    assert moved(2, iters=1000, lr=0.25) == pytest.approx((0.25, 0.25))
    assert moved(2, iters=1000, lr=0.25, minmax_lr=0.125) == pytest.approx((0.25, 0.125))


@pytest.mark.parametrize("symmetric", [True, False])
def test_a_weight_of_which_only_rows_are_read_is_trained_the_same(symmetric: bool) -> None:
    generator = torch.Generator().manual_seed(3)
    w = torch.randn(1100, 128, generator=generator)
    asked: list[int] = []

    class Rows:
        shape = (1100, 128)

        def __getitem__(self, rows: slice, /) -> Tensor:
            asked.append(len(w[rows]))
            return w[rows].clone()

    results: list[tuple[Tensor, Tensor]] = []
    gradients = torch.randn(4, *w.shape, generator=generator)
    for weight in (w, Rows()):
        tuner = IntegerSignRound(
            weight, settings(3, 64, symmetric), torch.float16, Scratch(CPU), rate=0.2, range_rate=0.1
        )
        written = torch.empty_like(w)
        tuner.write(written, keep=True)
        for step, gradient in enumerate(gradients):
            tuner.step(gradient, written, 1.0, keep=step == 2)
        results.append((written, tuner.result().dequantize()))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])
    assert not torch.equal(results[0][0], results[0][1])
    # Never the whole, and in a step each row once.
    assert max(asked) < 1100
    assert sum(asked) == 1100 * (1 + 1 + 4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_loss_of_each_sample_and_its_gradient_are_those_of_the_plain_formula(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(5)
    output, target = (torch.randn(3, 7, 8, generator=generator).to(dtype) for _ in range(2))
    shares = torch.tensor([0.5, 2.0, 0.0])
    found: list[tuple[Tensor, Tensor]] = []
    for errors in (sample_errors, lambda x, y: (x.float() - y.float()).square().flatten(1).mean(1)):
        x = output.clone().requires_grad_()
        loss = errors(x, target)
        found.append((loss.detach(), torch.autograd.grad((loss * shares).sum(), x)[0]))
    assert found[0][1].dtype == dtype
    for left, right in zip(*found, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-6 if dtype == torch.float32 else 8e-3, atol=1e-8)
