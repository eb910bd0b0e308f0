"""mxfp4, nvfp4 and fp8: the values of the formats, their scales, and training through them."""

import itertools
import math

import pytest
import torch
from auto_round.config_manager import LayerSettings
from auto_round.exceptions import ConfigurationError, QuantizationError
from auto_round.quantization._floats import fake_quantize_float, quantize_float, round_elements
from hypothesis import given, settings
from hypothesis import strategies as st

MXFP4 = LayerSettings(bits=4, group_size=32, symmetric=True, weight_dtype="mxfp4")
NVFP4 = LayerSettings(bits=4, group_size=16, symmetric=True, weight_dtype="nvfp4")
FP8 = LayerSettings(bits=8, group_size=-1, symmetric=True, weight_dtype="fp8")
FP8_GROUPS = LayerSettings(bits=8, group_size=16, symmetric=True, weight_dtype="fp8")
ALL = [MXFP4, NVFP4, FP8, FP8_GROUPS]


def name(layer):
    return f"{layer.weight_dtype}-{layer.group_size}"


def minifloat_values(exponent_bits, mantissa_bits, bias, largest):
    """(value, mantissa is even) of every non-negative number of a format, from its definition."""
    values = []
    for exponent in range(2**exponent_bits):
        for mantissa in range(2**mantissa_bits):
            if exponent == 0:
                value = mantissa * 2.0 ** (1 - bias - mantissa_bits)
            else:
                value = (1 + mantissa / 2**mantissa_bits) * 2.0 ** (exponent - bias)
            if value <= largest:
                values.append((value, mantissa % 2 == 0))
    return values


E2M1_VALUES = minifloat_values(2, 1, 1, 6.0)
E4M3_VALUES = minifloat_values(4, 3, 7, 448.0)


def nearest(x, values):
    """Brute force: the nearest value, of two as near the one with the even mantissa."""
    best = min(values, key=lambda pair: (abs(pair[0] - abs(x)), not pair[1]))[0]
    return math.copysign(best, x)


def weights(rows=6, width=64, seed=0, magnitude=1.0):
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed)) * magnitude


def test_the_sixteen_values():
    values = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
    assert [value for value, _ in E2M1_VALUES] == values
    x = torch.tensor(values + [-value for value in values])
    assert torch.equal(round_elements(x, "mxfp4"), x)
    weight = x.repeat(2)[None]
    result = quantize_float(weight, MXFP4)
    assert result.scale.tolist() == [[127]]
    assert result.codes.tolist() == [list(range(16)) * 2]
    assert torch.equal(result.dequantize(), weight)


def test_halves_go_to_the_even_mantissa():
    x = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 6.9, 100.0, -0.25, -0.75, -5.0])
    expected = [0.0, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0, 6.0, 6.0, 0.0, -1.0, -4.0]
    assert round_elements(x, "nvfp4").tolist() == expected


@settings(max_examples=300, deadline=None)
@given(x=st.floats(-600, 600, width=32))
def test_elements_are_the_nearest_by_brute_force(x):
    tensor = torch.tensor([x])
    assert round_elements(tensor, "fp8").tolist() == [nearest(x, E4M3_VALUES)]
    assert round_elements(tensor / 64, "mxfp4").tolist() == [nearest(float(tensor / 64), E2M1_VALUES)]


@pytest.mark.parametrize("kind", ["mxfp4", "fp8"])
def test_every_midpoint_and_its_neighbours(kind):
    values = E2M1_VALUES if kind == "mxfp4" else E4M3_VALUES
    middles = torch.tensor([(a + b) / 2 for (a, _), (b, _) in itertools.pairwise(values)])
    infinity = torch.tensor(float("inf"))
    x = torch.cat([middles, middles.nextafter(infinity), middles.nextafter(-infinity)])
    x = torch.cat([x, -x])
    assert round_elements(x, kind).tolist() == [nearest(value, values) for value in x.tolist()]


def test_elements_and_scales_are_those_of_ml_dtypes():
    ml_dtypes = pytest.importorskip("ml_dtypes")
    x = torch.cat([torch.linspace(-7, 7, 20_001), weights(100, 100).flatten()])
    fours = x.numpy().astype(ml_dtypes.float4_e2m1fn)
    assert torch.equal(round_elements(x, "mxfp4"), torch.from_numpy(fours.astype("float32")))
    x = x * 60
    eights = x.numpy().astype(ml_dtypes.float8_e4m3fn)
    assert torch.equal(round_elements(x, "fp8"), torch.from_numpy(eights.astype("float32")))
    scale = quantize_float(weights(magnitude=1e-3), MXFP4)
    powers = scale.scale.numpy().view(ml_dtypes.float8_e8m0fnu).astype("float32")
    assert torch.equal(scale.effective_scale(), torch.from_numpy(powers))
    codes = quantize_float(weights(), NVFP4)
    elements = codes.codes.numpy().view("uint8").astype("uint8")
    table = torch.arange(16, dtype=torch.uint8).numpy()
    values = table.view(ml_dtypes.float4_e2m1fn).astype("float32")
    by_hand = torch.from_numpy(values[elements]).view(6, 4, 16) * codes.effective_scale()[..., None]
    assert torch.equal(codes.dequantize(), by_hand.flatten(1))


@settings(max_examples=60, deadline=None)
@given(exponent=st.integers(-120, 126), mantissa=st.floats(1, 1.984375, width=32), seed=st.integers(0, 2**31))
def test_mxfp4_shares_the_power_of_the_largest_less_two(exponent, mantissa, seed):
    """By the specification, in Python's exact arithmetic."""
    weight = torch.rand(1, 32, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    weight[0, 7] = -mantissa
    weight *= 2.0**exponent
    result = quantize_float(weight, MXFP4)
    power = max(-127, math.floor(math.log2(mantissa)) + exponent - 2)
    assert result.scale.tolist() == [[power + 127]]
    expected = [nearest(value / 2.0**power, E2M1_VALUES) * 2.0**power for value in weight[0].tolist()]
    assert result.dequantize().tolist() == [expected]


def test_nvfp4_scales_by_the_formula():
    weight = weights(8, 64, seed=2, magnitude=0.02)
    weight[3, 16:32] = 0
    weight[4] *= 1e-6
    result = quantize_float(weight, NVFP4)
    assert result.global_scale is not None
    whole = 448 * 6 / float(weight.abs().max())
    assert float(result.global_scale) == pytest.approx(whole, rel=1e-6)
    assert float(result.scale.float().max()) == 448
    for row in range(8):
        for group in range(4):
            values = weight[row, 16 * group : 16 * group + 16]
            wanted = float(values.abs().max()) / 6 * whole
            expected = max(nearest(wanted, E4M3_VALUES), 2.0**-9)
            stored = float(result.scale[row, group].float())
            assert stored == expected
            numbers = result.dequantize()[row, 16 * group : 16 * group + 16] / (stored / whole)
            by_force = [nearest(value / (stored / whole), E2M1_VALUES) for value in values.tolist()]
            assert numbers.tolist() == pytest.approx(by_force)


@pytest.mark.parametrize("layer", [FP8, FP8_GROUPS], ids=name)
def test_fp8_is_torchs_cast_of_the_scaled_weights(layer):
    weight = weights(5, 48, magnitude=3.0)
    size = 48 if layer.group_size == -1 else 16
    scale = weight.view(5, -1, size).abs().amax(-1) / 448
    result = quantize_float(weight, layer)
    assert torch.equal(result.scale, scale)
    cast = (weight.view(5, -1, size) / scale[..., None]).clamp(-448, 448).to(torch.float8_e4m3fn)
    assert torch.equal(result.codes, cast.view(torch.uint8).flatten(1))
    assert torch.equal(result.dequantize(), (cast.float() * scale[..., None]).flatten(1))


@pytest.mark.parametrize("layer", ALL, ids=name)
@pytest.mark.parametrize("kind", ["zeros", "constant", "tiny", "subnormal", "huge", "mixed"])
def test_hostile_weights_stay_finite(layer, kind):
    weight = {
        "zeros": torch.zeros(2, 64),
        "constant": torch.full((2, 64), -0.37),
        "tiny": weights(2, 64, magnitude=1e-36),
        "subnormal": weights(2, 64, magnitude=1e-40),
        "huge": (weights(2, 64) * 1e38).clamp(-3.4e38, 3.4e38),
        "mixed": weights(2, 64) * torch.tensor([1e-30, 1e20]).repeat_interleave(64).view(2, 64),
    }[kind]
    values = quantize_float(weight, layer).dequantize()
    assert bool(values.isfinite().all())
    assert float((values.double() - weight).norm()) <= float(weight.double().norm())
    if kind == "zeros":
        assert not bool(values.any())
    if kind == "tiny":
        assert float((values.double() - weight).norm()) < 0.2 * float(weight.double().norm())
    if layer is MXFP4 and kind in ("zeros", "subnormal"):
        assert not bool(quantize_float(weight, layer).scale.any())
    if kind in ("constant", "huge"):
        torch.testing.assert_close(values, weight, rtol=0.26, atol=2e37 if kind == "huge" else 0)
    assert torch.equal(fake_quantize_float(weight, layer), values)


@pytest.mark.parametrize("layer", ALL, ids=name)
def test_the_trained_numbers_are_the_stored_ones(layer):
    generator = torch.Generator().manual_seed(5)
    weight = weights(7, 64, seed=3, magnitude=0.05)
    groups = 64 // (64 if layer.group_size == -1 else layer.group_size)
    offset = torch.rand(7, groups, 64 // groups, generator=generator) - 0.5
    max_scale = 0.5 + torch.rand(7, groups, generator=generator) / 2
    for o, m in ((None, None), (offset, None), (None, max_scale), (offset, max_scale)):
        tracked = [None if each is None else each.clone().requires_grad_() for each in (o, m)]
        trained = fake_quantize_float(weight, layer, *tracked)
        stored = quantize_float(weight, layer, offset=o, max_scale=m)
        assert torch.equal(trained.detach(), stored.dequantize())
        assert stored.codes.dtype is torch.uint8
        if layer.weight_dtype != "fp8":
            assert int(stored.codes.max()) < 16
    assert not torch.equal(
        quantize_float(weight, layer, offset=offset).codes, quantize_float(weight, layer).codes
    )


@pytest.mark.parametrize("layer", ALL, ids=name)
def test_gradients_by_the_formula(layer):
    """With s proportional to m: d/dV is s where inside, d/dm is (s/m) * (q - u where inside)."""
    generator = torch.Generator().manual_seed(6)
    weight = weights(3, 64, seed=4).requires_grad_()
    groups = 64 // (64 if layer.group_size == -1 else layer.group_size)
    offset = (torch.rand(3, groups, 64 // groups, generator=generator) - 0.5).requires_grad_()
    max_scale = (0.6 + 0.2 * torch.rand(3, groups, generator=generator)).requires_grad_()
    upstream = weights(3, 64, seed=7)
    (fake_quantize_float(weight, layer, offset, max_scale) * upstream).sum().backward()
    stored = quantize_float(weight.detach(), layer, offset=offset.detach(), max_scale=max_scale.detach())
    s = stored.effective_scale()[..., None].double()
    elements = stored.dequantize().view(3, groups, -1) / s
    u = weight.detach().view(3, groups, -1) / s
    most = 448 if layer.weight_dtype == "fp8" else 6
    inside = (u + offset.detach()).abs() <= most
    assert bool(inside.any())
    assert not bool(inside.all())
    g = upstream.view(3, groups, -1).double()
    close = {"rtol": 1e-4, "atol": 1e-4, "check_dtype": False}
    torch.testing.assert_close(offset.grad, g * s * inside, **close)
    torch.testing.assert_close(weight.grad, (g * inside).flatten(1), **close)
    per_scale = (g * (elements - u * inside)).sum(-1) * s[..., 0] / max_scale.detach()
    torch.testing.assert_close(max_scale.grad, per_scale, **close)


@pytest.mark.parametrize("layer", ALL, ids=name)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(layer, bad):
    weight = weights()
    weight[2, 2] = bad
    with pytest.raises(QuantizationError, match="1 of 384 weights are NaN or infinite"):
        quantize_float(weight, layer)
    with pytest.raises(QuantizationError, match="NaN or infinite"):
        fake_quantize_float(weight, layer)


def test_groups_that_a_format_does_not_have():
    wrong = LayerSettings(bits=4, group_size=64, symmetric=True, weight_dtype="mxfp4")
    with pytest.raises(ConfigurationError, match="group_size is 64; mxfp4 has groups of 32"):
        quantize_float(weights(), wrong)
    with pytest.raises(ConfigurationError, match="does not divide rows of 40"):
        quantize_float(weights(2, 40), NVFP4)


@pytest.mark.parametrize("layer", ALL, ids=name)
def test_half_precision_weights_and_many_rows(layer, monkeypatch):
    weight = weights(9, 64).bfloat16()
    whole = quantize_float(weight, layer)
    assert torch.equal(whole.codes, quantize_float(weight.float(), layer).codes)
    monkeypatch.setattr("auto_round.quantization._floats.row_chunks", lambda *_: [slice(0, 4), slice(4, 9)])
    assert torch.equal(quantize_float(weight, layer).codes, whole.codes)
