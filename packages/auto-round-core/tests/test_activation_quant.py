"""Activations of 8 bits: values, scales and gradients."""

import numpy as np
import pytest
import torch
from auto_round.exceptions import QuantizationError
from auto_round.quantization._activations_quant import (
    amax_to_scale,
    fake_quantize_static,
    fake_quantize_tokens,
)
from hypothesis import given, settings
from hypothesis import strategies as st


def activations(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@settings(max_examples=40, deadline=None)
@given(
    tokens=st.integers(1, 6),
    channels=st.integers(1, 40),
    magnitude=st.integers(-40, 40),
    seed=st.integers(0, 2**31),
)
def test_tokens_have_the_values_that_numpy_gives(tokens, channels, magnitude, seed):
    x = activations(2, tokens, channels, seed=seed) * 2.0**magnitude
    a = x.numpy()
    scale = (np.abs(a).max(-1, keepdims=True) / np.float32(127)).astype(np.float32)
    q = np.rint(a / scale)
    assert np.abs(q).max() == 127
    assert torch.equal(fake_quantize_tokens(x), torch.from_numpy(q * scale))
    whole = np.float32(np.abs(a).max() / 2) / np.float32(127)
    clipped = np.clip(np.rint(a / whole), -127, 127) * whole
    assert torch.equal(fake_quantize_static(x, torch.tensor(whole)), torch.from_numpy(clipped))


def test_a_token_worked_out_by_hand():
    """Scales of 1 and of 0.5: halves go to the even neighbour, and each token has its own steps."""
    x = torch.tensor([[127.0, 2.5, -3.5, 0.4], [-63.5, 1.25, 0.7, 0.0]])
    expected = [[127.0, 2.0, -4.0, 0.0], [-63.5, 1.0, 0.5, 0.0]]
    assert fake_quantize_tokens(x).tolist() == expected
    assert amax_to_scale(torch.tensor([127.0, 0.0])).tolist() == [1.0, 2.0**-126]
    assert amax_to_scale(torch.tensor(896.0), "e4m3").tolist() == 2.0


def test_e4m3_has_the_values_of_the_format():
    """A token whose largest is 448 has a scale of 1, and becomes what torch casts it to."""
    x = torch.cat([activations(4, 100) * 30, torch.full((4, 1), 448.0)], -1)
    assert torch.equal(fake_quantize_tokens(x, "e4m3"), x.to(torch.float8_e4m3fn).float())
    scale = torch.tensor(0.25)
    expected = (x / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float() * scale
    assert torch.equal(fake_quantize_static(x, scale, "e4m3"), expected)


@pytest.mark.parametrize(("kind", "least_db"), [("int8", 38), ("e4m3", 29)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtype_and_noise(kind, least_db, dtype):
    x = activations(64, 256, dtype=dtype)
    result = fake_quantize_tokens(x, kind)
    assert result.dtype is dtype
    noise = (result.double() - x.double()).square().sum()
    assert float(10 * torch.log10(x.double().square().sum() / noise)) > least_db
    # Arithmetic in the activations' own 8 or 11 digits would give other values.
    assert torch.equal(result, fake_quantize_tokens(x.float(), kind).to(dtype))


@pytest.mark.parametrize("kind", ["int8", "e4m3"])
def test_gradients(kind):
    x = activations(3, 8).requires_grad_()
    weights = activations(3, 8, seed=1)
    (fake_quantize_tokens(x, kind) * weights).sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, weights)
    most = 127 if kind == "int8" else 448
    scale = torch.tensor(0.01 if kind == "int8" else 0.003).requires_grad_()
    x.grad = None
    (fake_quantize_static(x, scale, kind) * weights).sum().backward()
    inside = (x.detach() / scale.detach()).abs() <= most
    assert 0 < int(inside.sum()) < 24
    assert torch.equal(x.grad, weights * inside)
    assert scale.grad is None


def test_the_argument_is_left_alone():
    x = activations(4, 8)
    before = x.clone()
    fake_quantize_tokens(x)
    fake_quantize_tokens(x, "e4m3")
    fake_quantize_static(x, torch.tensor(0.1))
    assert torch.equal(x, before)


@pytest.mark.parametrize("kind", ["int8", "e4m3"])
def test_zeros_and_what_is_not_finite(kind):
    x = torch.zeros(4, 4)
    x[1, 2] = float("nan")
    x[2, 0] = float("inf")
    x[3] = 1.0
    result = fake_quantize_tokens(x, kind)
    assert result[0].tolist() == [0.0] * 4
    assert bool(result[1].isnan().any())
    assert bool(result[2].isnan().any())
    torch.testing.assert_close(result[3], x[3])
    assert bool(fake_quantize_static(x, torch.tensor(1.0), kind)[1].isnan().any())


@pytest.mark.parametrize("scale", [[0.0], [-1.0], [float("nan")], [float("inf")], [1.0, 2.0]])
def test_a_static_scale_that_is_none(scale):
    with pytest.raises(QuantizationError, match="one finite number above 0"):
        fake_quantize_static(torch.zeros(2, 2), torch.tensor(scale))
