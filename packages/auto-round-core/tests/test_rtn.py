"""Rounding to nearest and the search of scales: noise, the measure, and that nothing gets worse."""

import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from auto_round.config_manager import LayerSettings
from auto_round.exceptions import ConfigurationError, QuantizationError
from auto_round.quantization import _rtn
from auto_round.quantization._rtn import quantize_optimized_rtn, quantize_rtn
from hypothesis import given, settings
from hypothesis import strategies as st

F16, BF16, F32 = torch.float16, torch.bfloat16, torch.float32
FLOATS = [
    LayerSettings(bits=4, group_size=32, symmetric=True, weight_dtype="mxfp4"),
    LayerSettings(bits=4, group_size=16, symmetric=True, weight_dtype="nvfp4"),
    LayerSettings(bits=8, group_size=-1, symmetric=True, weight_dtype="fp8"),
]


def integers(bits, group_size=32, symmetric=True):
    return LayerSettings(bits=bits, group_size=group_size, symmetric=symmetric, weight_dtype="int")


EVERY = [integers(bits, symmetric=symmetric) for bits in (2, 3, 4, 8) for symmetric in (True, False)] + FLOATS


def name(layer):
    return f"{layer.weight_dtype}{layer.bits}-{'sym' if layer.symmetric else 'asym'}"


def gaussian(rows=64, width=256, seed=0):
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))


def importances(width=256, seed=1):
    """Of several magnitudes, as the channels of real layers are."""
    return torch.randn(width, generator=torch.Generator().manual_seed(seed)).mul(1.5).exp()


def loss(weight, result, importance):
    error = result.dequantize().double() - weight.double()
    return float((error.square() * importance.double()).sum())


def sqnr_db(weight, result):
    noise = (result.dequantize().double() - weight.double()).square().sum()
    return float(10 * torch.log10(weight.double().square().sum() / noise))


@pytest.mark.parametrize("bits", range(3, 9))
@pytest.mark.parametrize("symmetric", [True, False])
def test_noise_is_that_of_theory(bits, symmetric):
    """Each error is uniform within a step, so its mean square is step**2 / 12.

    The step is the range over 2**bits - 1 codes (asymmetric), or the largest magnitude over 2**(bits - 1),
    where the largest weight itself is exact and the other end may lose up to a step.
    """
    weight = gaussian(512, 256)
    groups = weight.view(512, 2, 128).double()
    if symmetric:
        step = groups.abs().amax(-1) / 2 ** (bits - 1)
    else:
        step = (groups.amax(-1) - groups.amin(-1)) / (2**bits - 1)
    theory = 10 * math.log10(float(groups.square().mean() / (step.square() / 12).mean()))
    result = quantize_rtn(weight, integers(bits, 128, symmetric), F32)
    assert sqnr_db(weight, result) == pytest.approx(theory, abs=0.3 if bits == 3 else 0.15)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3])
def test_searched_scales_of_long_rows_are_the_best_of_theory(bits, symmetric):
    """The best of codes -2**(bits - 1) to 2**(bits - 1) - 1 for a Gaussian, integrated numerically.

    8.26 dB at 2 bits; rounding with the whole range leaves 4 to 6. A fit to the row itself may be a little
    better than one to the distribution.
    """
    x = np.linspace(-8, 8, 40_001)
    density = np.exp(-x * x / 2)
    half = 2 ** (bits - 1)
    steps = np.linspace(0.3, 1.6, 300)[:, None]
    noise = (density * (np.clip(np.rint(x / steps), -half, half - 1) * steps - x) ** 2).sum(-1)
    theory = -10 * math.log10(noise.min() / density.sum())
    weight = gaussian(8, 16384)
    layer = integers(bits, -1, symmetric)
    best = sqnr_db(weight, quantize_optimized_rtn(weight, layer, F32, torch.ones(16384)))
    assert best == pytest.approx(theory, abs=0.1)
    assert best > sqnr_db(weight, quantize_rtn(weight, layer, F32)) + 1.5


@pytest.mark.parametrize("layer", EVERY, ids=name)
@pytest.mark.parametrize("kind", ["gaussian", "outliers", "one-sided", "one channel"])
def test_the_search_is_never_worse_and_mostly_better(layer, kind):
    weight, importance = gaussian(), importances()
    if kind == "outliers":
        weight[:, ::50] *= 8
    if kind == "one-sided":
        weight = weight.abs() + 0.5
    if kind == "one channel":
        importance = torch.zeros(256)
        importance[[3, 40, 77, 250]] = torch.tensor([1.0, 2.0, 3.0, 1e-9])
    plain = loss(weight, quantize_rtn(weight, layer, F16), importance)
    searched = loss(weight, quantize_optimized_rtn(weight, layer, F16, importance), importance)
    assert searched <= plain * 1.000001
    if kind == "gaussian":
        assert searched < plain * {"mxfp4": 0.95, "nvfp4": 0.68, "fp8": 0.95, "int": 0.72}[layer.weight_dtype]


def test_both_ends_of_an_asymmetric_range_are_searched():
    """Log-normal weights, whose high end is what costs: searching all but that end left 0.83 of the loss."""
    weight, importance = gaussian().exp() - 0.5, importances()
    for mirrored in (weight, -weight):
        layer = integers(8, symmetric=False)
        plain = loss(mirrored, quantize_rtn(mirrored, layer, F16), importance)
        found = loss(mirrored, quantize_optimized_rtn(mirrored, layer, F16, importance), importance)
        assert found < 0.79 * plain


@settings(max_examples=60, deadline=None)
@given(
    layer=st.sampled_from(EVERY),
    scale_dtype=st.sampled_from([F16, BF16, F32]),
    rows=st.integers(1, 5),
    magnitude=st.integers(-40, 12),
    shift=st.sampled_from([0.0, 2.0, -0.5]),
    seed=st.integers(0, 2**31),
)
def test_each_group_is_never_worse(layer, scale_dtype, rows, magnitude, shift, seed):
    weight = (gaussian(rows, 64, seed) + shift) * 2.0**magnitude
    importance = importances(64, seed)
    size = 64 if layer.group_size == -1 else layer.group_size
    errors = []
    for result in (
        quantize_rtn(weight, layer, scale_dtype),
        quantize_optimized_rtn(weight, layer, scale_dtype, importance),
    ):
        error = (result.dequantize().double() - weight.double()).square() * importance.double()
        errors.append(error.view(rows, -1, size).sum(-1))
        assert result.codes.dtype is torch.uint8
        assert result.codes.shape == weight.shape
        if layer.weight_dtype == "int":
            assert result.scale.dtype is scale_dtype
            assert int(result.codes.max()) < 2**layer.bits
    assert bool((errors[1] <= errors[0] * 1.00001 + 1e-37).all())


@pytest.mark.parametrize("symmetric", [True, False])
def test_the_search_finds_nearly_what_a_fine_grid_finds(symmetric):
    """Groups of 16 at 2 bits: all zero points and 4,000 scales, of either sign for symmetric codes."""
    weight, importance = gaussian(40, 16), importances(16)
    layer = integers(2, 16, symmetric)
    found = loss(weight, quantize_optimized_rtn(weight, layer, F32, importance), importance)
    scales = torch.linspace(-3, 3, 8_000) if symmetric else torch.linspace(0.001, 3, 4_000)
    best = 0.0
    for row in weight:
        errors = []
        for zero in [2] if symmetric else range(4):
            codes = (row / scales[:, None]).round().clamp(-zero, 3 - zero)
            errors.append(((codes * scales[:, None] - row).square() * importance).sum(-1).min())
        best += float(torch.stack(errors).min())
    plain = loss(weight, quantize_rtn(weight, layer, F32), importance)
    assert best * 0.999 <= found <= best * 1.1
    assert plain > best * 1.5


def test_importance_decides_what_is_kept():
    """A channel that alone matters becomes exact but for its scale's rounding; with none, plain stays."""
    weight = gaussian(32, 32)
    weight[:, 5] += weight[:, 5].sign()
    importance = torch.zeros(32)
    importance[5] = 1.0
    result = quantize_optimized_rtn(weight, integers(3), F32, importance)
    torch.testing.assert_close(result.dequantize()[:, 5], weight[:, 5], rtol=1e-6, atol=0)
    nothing = quantize_optimized_rtn(weight, integers(3), F32, torch.zeros(32))
    assert torch.equal(nothing.codes, quantize_rtn(weight, integers(3), F32).codes)


def test_of_importance_only_the_proportions_count():
    """Also where its products with squares of weights are beyond float32."""
    weight, importance = gaussian(32, 32) * 1e4, importances(32)
    expected = quantize_optimized_rtn(weight, integers(3), F32, importance)
    assert not torch.equal(expected.codes, quantize_rtn(weight, integers(3), F32).codes)
    for power in (-100, 100):
        result = quantize_optimized_rtn(weight, integers(3), F32, importance * 2.0**power)
        assert torch.equal(result.codes, expected.codes)


@pytest.mark.parametrize("layer", EVERY, ids=name)
def test_pieces_give_what_the_whole_gives(layer, monkeypatch):
    weight, importance = gaussian(13, 64), importances(64)
    before = weight.clone()
    plain, searched = quantize_rtn(weight, layer, F16), quantize_optimized_rtn(weight, layer, F16, importance)
    monkeypatch.setattr(_rtn, "_SEARCH_CHUNK", 200)
    again = quantize_optimized_rtn(weight, layer, F16, importance)
    assert torch.equal(again.codes, searched.codes)
    assert torch.equal(again.dequantize(), searched.dequantize())
    assert torch.equal(weight, before)
    assert torch.equal(
        quantize_rtn(weight.bfloat16(), layer, F16).codes,
        quantize_rtn(weight.bfloat16().float(), layer, F16).codes,
    )
    assert not plain.codes.requires_grad


def test_weights_that_a_parameter_holds():
    weight = torch.nn.Parameter(gaussian(4, 64))
    for layer in EVERY:
        for result in (
            quantize_rtn(weight, layer, F16),
            quantize_optimized_rtn(weight, layer, F16, importances(64)),
        ):
            assert not result.scale.requires_grad
            assert not result.dequantize().requires_grad


def test_faults():
    weight = gaussian(4, 64)
    with pytest.raises(QuantizationError, match=r"importance has shape \[32\]; rows of 64"):
        quantize_optimized_rtn(weight, integers(4), F16, torch.ones(32))
    for bad in (-1.0, float("nan"), float("inf")):
        importance = torch.ones(64)
        importance[7] = bad
        with pytest.raises(QuantizationError, match="importance reaches"):
            quantize_optimized_rtn(weight, integers(4), F16, importance)
    with pytest.raises(ConfigurationError, match="group_size 48"):
        quantize_rtn(weight, integers(4, 48), F16)
    weight[0, 0] = float("nan")
    for layer in EVERY:
        with pytest.raises(QuantizationError, match="1 of 256 weights are NaN"):
            quantize_rtn(weight, layer, F16)
        with pytest.raises(QuantizationError, match="1 of 256 weights are NaN"):
            quantize_optimized_rtn(weight, layer, F16, torch.ones(64))
    weight[0, 0] = 1e7
    with pytest.raises(QuantizationError, match="set scale_dtype to"):
        quantize_rtn(weight, integers(4), F16)


MEMORY = """
import resource, torch
torch.set_num_threads(1)
from auto_round.config_manager import LayerSettings
from auto_round.quantization._rtn import quantize_optimized_rtn, quantize_rtn
layers = [
    LayerSettings(bits=4, group_size=128, symmetric=False, weight_dtype="int"),
    LayerSettings(bits=4, group_size=32, symmetric=True, weight_dtype="mxfp4"),
]
ones = torch.ones(2048)
for layer in layers:
    quantize_optimized_rtn(torch.rand(64, 2048), layer, torch.float16, ones).dequantize()
weight = torch.ones(8192, 2048).mul_(0.5)
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for layer in layers:
    quantize_rtn(weight, layer, torch.float16)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak) / 1024)
quantize_optimized_rtn(weight[:1024], layers[0], torch.float16, ones)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak) / 1024)
"""


def test_memory_is_that_of_the_result_and_a_piece():
    """The matrix has 64 MiB and its codes have 16: a temporary of its size would show."""
    command = [sys.executable, "-c", MEMORY]
    run = subprocess.run(command, capture_output=True, text=True, check=True, timeout=100)
    assert max(float(line) for line in run.stdout.split()) < 16 + 32
