"""Integer weights: groups, scales, zero points, codes, and the numbers that they stand for."""

import itertools

import numpy as np
import pytest
import torch
from auto_round.config_manager import LayerSettings
from auto_round.exceptions import AutoRoundError, ConfigurationError, QuantizationError
from auto_round.quantization._grouping import grouped, row_chunks
from auto_round.quantization._integers import (
    asymmetric_scale,
    group_range,
    least_scale,
    round_to_codes,
    straight_through_round,
    symmetric_scale,
)
from auto_round.quantization._quantized import QuantizedWeight
from hypothesis import given, settings
from hypothesis import strategies as st

F16, BF16, F32 = torch.float16, torch.bfloat16, torch.float32


def quantised(weight, bits, group_size, symmetric, scale_dtype=F16, offset=None):
    w = grouped(weight, group_size)
    low, high = group_range(w)
    zero = None
    if symmetric:
        scale = symmetric_scale(low, high, bits, scale_dtype)
    else:
        scale, zero = asymmetric_scale(low, high, bits, scale_dtype)
    return QuantizedWeight(
        settings=LayerSettings(bits=bits, group_size=group_size, symmetric=symmetric, weight_dtype="int"),
        codes=round_to_codes(w, scale, zero, bits, offset).flatten(1),
        scale=scale.to(scale_dtype),
        zero=None if zero is None else zero.to(torch.uint8),
    )


def numpy_reference(weight, bits, group_size, symmetric, scale_dtype):
    """The same arithmetic one group at a time, in numpy's float32 and float16."""
    f32, half = np.float32, {F16: np.float16, F32: np.float32}[scale_dtype]
    size = weight.shape[1] if group_size == -1 else group_size
    values = np.empty(weight.shape, f32)
    codes = np.empty(weight.shape, np.int64)
    least = f32(2.0**-24 if half is np.float16 else 2.0**-126)
    for row, start in itertools.product(range(weight.shape[0]), range(0, weight.shape[1], size)):
        w = weight[row, start : start + size].astype(f32)
        low, high = min(w.min(), f32(0)), max(w.max(), f32(0))
        if symmetric:
            zero, most = 2 ** (bits - 1), 2**bits - 1
            extreme = -low if -low > high else -high
            scale = f32(half(extreme / f32(zero)))
            scale = min(scale, -least) if scale < 0 else max(scale, least)
        else:
            most = 2**bits - 1
            scale = max(f32(half((high - low) / f32(most))), least)
            zero = int(np.clip(np.rint(-low / scale), 0, most))
        q = np.clip(np.rint(w / scale) + zero, 0, most)
        codes[row, start : start + size] = q
        values[row, start : start + size] = (q - zero).astype(f32) * scale
    return codes, values


def test_two_rows_worked_out_by_hand():
    """Scales of 0.2 become 0.199951171875 in float16, which takes 0.5 units to 0.5001 and so to 1."""
    weight = torch.tensor([[0.4, -0.1, 0.2, 0.0], [-0.4, 0.1, 0.3, 0.2]])
    result = quantised(weight, 2, 4, symmetric=True)
    assert result.scale.flatten().tolist() == [-0.199951171875, 0.199951171875]
    assert (result.codes.int() - 2).tolist() == [[-2, 1, -1, 0], [-2, 1, 1, 1]]
    s = 0.199951171875
    expected = [[2 * s, -s, s, 0.0], [-2 * s, s, s, s]]
    assert result.dequantize().tolist() == torch.tensor(expected).tolist()


def test_an_asymmetric_matrix_worked_out_by_hand():
    """Row 1: range 3, scale 1, zero at 1. Row 2: range 0 to 0.75, scale 0.25, halves to the even code."""
    weight = torch.tensor([[-1.0, 0.4, 0.6, 2.0], [0.125, 0.375, 0.75, 0.25]])
    result = quantised(weight, 2, 4, symmetric=False)
    assert result.scale.tolist() == [[1.0], [0.25]]
    assert result.zero is not None
    assert result.zero.tolist() == [[1], [0]]
    assert result.codes.tolist() == [[0, 1, 2, 3], [0, 2, 3, 1]]
    assert result.dequantize().tolist() == [[-1.0, 0.0, 1.0, 2.0], [0.0, 0.5, 0.75, 0.25]]


def test_the_sign_of_a_symmetric_scale():
    low = torch.tensor([-1.0, -2.0, -2.0, 0.0, -4.0, 0.0])
    high = torch.tensor([2.0, 1.0, 2.0, 4.0, 0.0, 0.0])
    scale = symmetric_scale(low, high, 3, F16)
    assert scale.tolist() == [-0.5, 0.5, -0.5, -1.0, 1.0, 2.0**-24]
    assert scale.dtype is F32


@settings(max_examples=60, deadline=None)
@given(
    bits=st.integers(2, 8),
    rows=st.integers(1, 4),
    groups=st.integers(1, 4),
    size=st.sampled_from([1, 4, 8, 32]),
    symmetric=st.booleans(),
    scale_dtype=st.sampled_from([F16, F32]),
    magnitude=st.integers(-30, 12),
    shift=st.sampled_from([0.0, 1.0, -5.0]),
    whole=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_codes_and_numbers_are_those_of_numpy(
    bits, rows, groups, size, symmetric, scale_dtype, magnitude, shift, whole, seed
):
    generator = torch.Generator().manual_seed(seed)
    weight = (torch.randn(rows, groups * size, generator=generator) + shift) * 2.0**magnitude
    group_size = -1 if whole else size
    result = quantised(weight, bits, group_size, symmetric, scale_dtype)
    codes, values = numpy_reference(weight.numpy(), bits, group_size, symmetric, scale_dtype)
    assert torch.equal(result.codes.long(), torch.from_numpy(codes))
    assert torch.equal(result.dequantize(), torch.from_numpy(values))


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("symmetric", [True, False])
def test_no_weight_is_further_than_half_a_step_from_its_number(bits, symmetric):
    generator = torch.Generator().manual_seed(bits)
    weight = torch.randn(16, 64, generator=generator)
    result = quantised(weight, bits, 32, symmetric, F32)
    error = (result.dequantize() - weight).abs().view(16, 2, 32)
    step = result.effective_scale().abs().unsqueeze(-1)
    # At an end more than half is possible: a whole zero point cuts off up to half a step, and the smaller
    # end of a symmetric range is up to one step beyond the last code.
    assert bool((error <= step * 1.001).all())
    inner = (result.codes > 0) & (result.codes < 2**bits - 1)
    assert bool((error.flatten(1)[inner] <= (step * 0.5001).expand_as(error).flatten(1)[inner]).all())


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_groups_of_one_value_are_exact_or_nearly(bits, symmetric):
    """A group of zeros stays zero; one of a single value lands on an end of the range."""
    weight = torch.tensor([[0.0] * 8, [0.7] * 8, [-3.0] * 8])
    values = quantised(weight, bits, 8, symmetric).dequantize()
    assert values[0].tolist() == [0.0] * 8
    torch.testing.assert_close(values, weight, rtol=2.0**-11, atol=0)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("scale_dtype", "largest"), [(F16, 1e-4), (F16, 4e-6), (BF16, 1e-30), (F32, 1e-35)])
def test_small_weights_are_not_wiped_out(symmetric, scale_dtype, largest):
    """A fixed floor of 1e-5 for scales, which other packages have, would make zeros of all of these."""
    generator = torch.Generator().manual_seed(3)
    weight = (torch.rand(4, 32, generator=generator) * 2 - 1) * largest
    weight = weight.double()
    error = quantised(weight, 4, 32, symmetric, scale_dtype).dequantize() - weight
    assert float(error.norm() / weight.norm()) < 0.25


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("scale_dtype", [F16, BF16, F32])
def test_weights_below_the_least_scale_stay_finite(symmetric, scale_dtype):
    weight = torch.tensor([[1e-45, -1e-40, 3e-39, 0.0], [1e-10, -1e-12, 0.0, 1e-45]])
    result = quantised(weight, 8, 4, symmetric, scale_dtype)
    assert bool(result.dequantize().isfinite().all())
    assert float(result.scale.float().abs().min()) >= least_scale(scale_dtype)
    assert float((result.dequantize() - weight).abs().max()) < 1.01e-10


def test_the_zero_point_fits_its_bits_where_float16_has_few_digits():
    """Range 255 * 1.49 * 2**-24: the scale becomes 2**-24, and the zero point asked for is 380."""
    weight = torch.tensor([[-255 * 1.49 * 2.0**-24, 0.0, -1e-6, 0.0]])
    scale, zero = asymmetric_scale(*group_range(grouped(weight, 4)), 8, F16)
    assert scale.tolist() == [[2.0**-24]]
    assert zero.tolist() == [[255.0]]


@pytest.mark.parametrize("scale_dtype", [F16, F32])
def test_huge_weights(scale_dtype):
    weight = torch.tensor([[1e6, -3e6, 2e6, 0.0]])
    if scale_dtype is F16:
        with pytest.raises(QuantizationError, match=r"3e\+06 need a scale of 1\.5e\+06.*6\.55e\+04"):
            quantised(weight, 2, 4, symmetric=True)
        with pytest.raises(QuantizationError, match="bfloat16 or float32"):
            quantised(weight, 2, 4, symmetric=False)
    else:
        values = quantised(weight, 8, 4, symmetric=True, scale_dtype=F32).dequantize()
        torch.testing.assert_close(values, weight, rtol=0.01, atol=0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite_are_refused(bad):
    weight = torch.zeros(2, 8)
    weight[1, 3] = bad
    with pytest.raises(QuantizationError, match="1 of 16 weights are NaN or infinite"):
        group_range(grouped(weight, 4))
    with pytest.raises(AutoRoundError, match="floating-point"):
        group_range(grouped(torch.zeros(2, 8, dtype=torch.int8), 4))


def test_the_range_spans_zero_and_the_largest_floats():
    low, high = group_range(torch.tensor([[[1.0, 2.0], [-1.0, -2.0], [3e38, -3e38]]]))
    assert low.tolist() == [[0.0, -2.0, torch.tensor(-3e38).item()]]
    assert high.tolist() == [[2.0, 0.0, torch.tensor(3e38).item()]]


def test_weights_are_divided_by_their_scales():
    """Half a step is exactly half, and goes to the even code; times the reciprocal it often would not."""
    scale = torch.linspace(0.001, 0.3, 997).half().float()[:, None]
    weight = (2.5 * scale)[:, :, None]
    assert bool((round_to_codes(weight, scale, None, 4) == 8 + 2).all())
    assert bool((weight * (1 / scale[:, :, None]) > 2.5).any())


def test_an_offset_decides_how_weights_are_rounded():
    weight = torch.tensor([[[-4.0, 1.4, 1.6, 0.0]]])
    scale = torch.tensor([[1.0]])
    offset = torch.tensor([0.4, 0.2, -0.2, 0.5])
    assert round_to_codes(weight, scale, None, 3).tolist() == [[[0, 5, 6, 4]]]
    # 1.4 + 0.2 goes up, 1.6 - 0.2 goes down, and 0 + 0.5 to the even 0.
    assert round_to_codes(weight, scale, None, 3, offset).tolist() == [[[0, 6, 5, 4]]]
    assert round_to_codes(weight, scale, torch.tensor([[7.0]]), 3, offset).tolist() == [[[3, 7, 7, 7]]]


def test_gradients_pass_the_rounding_and_the_cast():
    """d scale / d high is -1/4 for the end that decides, and d zero / d low is that of -low / scale."""
    low, high = torch.tensor([-0.3]), torch.tensor([0.7], requires_grad=True)
    symmetric_scale(low, high, 3, F16).sum().backward()
    assert high.grad is not None
    assert high.grad.tolist() == [-0.25]
    low = torch.tensor([-0.3], requires_grad=True)
    high = torch.tensor([0.7])
    scale, zero = asymmetric_scale(low, high, 3, F16)
    zero.sum().backward()
    s = float(scale.detach())
    assert low.grad is not None
    assert float(low.grad) == pytest.approx(-1 / s + 0.3 / s**2 / 7, rel=1e-5)
    assert float(zero.detach()) == 2.0


def test_straight_through_rounding_is_exact():
    x = torch.cat([torch.linspace(-300, 300, 10_001), torch.tensor([0.5, 1.5, -2.5, 1e-30, 0.49999997])])
    result = straight_through_round(x.clone().requires_grad_())
    assert torch.equal(result.detach(), x.round())
    assert result.requires_grad


def test_groups_that_do_not_divide_name_what_would():
    weight = torch.zeros(4, 96)
    assert grouped(weight, 32).shape == (4, 3, 32)
    assert grouped(weight, -1).shape == (4, 1, 96)
    assert grouped(weight, 32).data_ptr() == weight.data_ptr()
    assert grouped(weight.t().contiguous().t(), 48)[1, 1].shape == (48,)
    with pytest.raises(ConfigurationError, match=r"group_size 64 .* rows of 96 .* 16, 32, -1"):
        grouped(weight, 64)
    with pytest.raises(ConfigurationError, match="group_size 128"):
        grouped(weight, 128)
    for size in (0, -2):
        with pytest.raises(ConfigurationError):
            grouped(weight, size)
    for shape in ((96,), (2, 4, 96), (4, 0)):
        with pytest.raises(QuantizationError, match="matrix"):
            grouped(torch.zeros(shape), 32)


@settings(max_examples=40, deadline=None)
@given(rows=st.integers(0, 50), width=st.integers(1, 50), most=st.integers(1, 200))
def test_row_chunks_cover_every_row_once(rows, width, most):
    chunks = list(row_chunks(rows, width, most))
    assert [row for chunk in chunks for row in range(rows)[chunk]] == list(range(rows))
    assert all(
        chunk.stop - chunk.start == 1 or (chunk.stop - chunk.start) * width <= most for chunk in chunks
    )


def test_dequantize_casts_once_and_does_not_change_the_codes(monkeypatch):
    weight = torch.randn(64, 32, generator=torch.Generator().manual_seed(0))
    result = quantised(weight, 5, 16, symmetric=False)
    before = result.codes.clone()
    whole = result.dequantize()
    assert torch.equal(result.dequantize(BF16), whole.to(BF16))
    assert torch.equal(result.codes, before)
    monkeypatch.setattr(
        "auto_round.quantization._quantized.row_chunks", lambda *_: [slice(0, 5), slice(5, 64)]
    )
    assert torch.equal(result.dequantize(), whole)


@pytest.mark.parametrize("scale_dtype", [F16, BF16, F32])
def test_scales_that_gradients_pass_are_the_stored_ones_and_small_gradients_survive(scale_dtype):
    high = torch.logspace(-12, 4, 2_001)
    low = -high.flip(0) * 1e-3
    for function in (symmetric_scale, lambda *rest: asymmetric_scale(*rest)[0]):
        tracked = high.clone().requires_grad_()
        scale = function(low, tracked, 4, scale_dtype)
        assert torch.equal(scale.detach(), function(low, high, 4, scale_dtype))
        assert torch.equal(scale.detach(), scale.detach().to(scale_dtype).float())
        (scale[-1] * 1e-20).backward()
        assert tracked.grad is not None
        assert 1e-22 < float(tracked.grad[-1].abs()) < 1e-20
