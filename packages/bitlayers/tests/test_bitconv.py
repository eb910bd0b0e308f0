"""BitConv2d against torch's convolution of rounded weights and images."""

import copy

import pytest
import torch
import torch.nn.functional as F
from bitcore.config import BitQuantConfig
from bitcore.exceptions import QuantizationError
from bitcore.ops import dequantize_weight, dequantize_x, quantize_weight, quantize_x
from bitlayers import BitConv2d
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning")
@settings(deadline=None, max_examples=60)
@given(
    images=st.integers(0, 3),
    channels=st.integers(1, 4),
    outputs=st.integers(1, 4),
    groups=st.integers(1, 3),
    kernel=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    stride=st.integers(1, 2),
    padding=st.sampled_from([0, 1, (2, 1), "same", "valid"]),
    mode=st.sampled_from(["zeros", "reflect", "replicate", "circular"]),
    dilation=st.integers(1, 2),
    bias=st.booleans(),
    weights=st.sampled_from(["per_tensor", "per_channel"]),
    activations=st.sampled_from(["per_tensor", "per_token"]),
    dtype=st.sampled_from(["int8", "float32"]),
    seed=st.integers(0, 9),
)
def test_all_forms_are_torchs_convolution_of_rounded_numbers(
    images,
    channels,
    outputs,
    groups,
    kernel,
    stride,
    padding,
    mode,
    dilation,
    bias,
    weights,
    activations,
    dtype,
    seed,
):
    torch.manual_seed(seed)
    stride = 1 if padding == "same" else stride
    arguments = (channels * groups, outputs * groups, kernel, stride, padding, dilation, groups, bias, mode)
    config = BitQuantConfig(weights, dtype, activations)
    layer, plain = BitConv2d(*arguments, config), nn.Conv2d(*arguments)
    x = torch.randn(images, channels * groups, 8, 9)
    rounded = x
    if dtype == "int8":
        rounded = dequantize_x(*quantize_x(x.flatten(1), activations)).view_as(x)
    plain.load_state_dict(layer.state_dict())
    with torch.no_grad():
        plain.weight.copy_(dequantize_weight(*quantize_weight(layer.weight, weights)))
        expected = plain(rounded)
    for form in (layer, layer.eval(), copy.deepcopy(layer).deploy()):
        torch.testing.assert_close(form(x), expected, rtol=1e-4, atol=1e-4)
        with torch.no_grad():
            torch.testing.assert_close(form(x), expected, rtol=1e-4, atol=1e-4)


def test_evaluation_is_exact_in_the_integers():
    layer, x = BitConv2d(3, 5, 3, bias=False).eval(), torch.randn(2, 3, 7, 7)
    x_scale, qx = quantize_x(x.flatten(1))
    scale, codes = quantize_weight(layer.weight.detach())
    product = F.conv2d(qx.view(x.shape).double(), codes.double())
    expected = product.float() * (x_scale.view(2, 1, 1, 1) * scale)
    with torch.no_grad():
        assert torch.equal(layer(x), expected)
        assert torch.equal(layer(x)[1:], layer(x[1:]))  # what an image gives does not depend on the others
        assert torch.equal(layer(x[0]), expected[0])


def test_gradients_pass_straight():
    layer, x = BitConv2d(2, 3, 3, padding=1), torch.randn(2, 2, 5, 5, requires_grad=True)
    grad = torch.randn(2, 3, 5, 5)
    layer(x).backward(grad)
    qx = dequantize_x(*quantize_x(x.detach().flatten(1))).view_as(x).requires_grad_()
    qw = dequantize_weight(*quantize_weight(layer.weight.detach())).requires_grad_()
    F.conv2d(qx, qw, layer.bias.detach(), padding=1).backward(grad)
    torch.testing.assert_close(x.grad, qx.grad)
    torch.testing.assert_close(layer.weight.grad, qw.grad)
    x.grad = None
    layer.deploy()(x).backward(grad)
    torch.testing.assert_close(x.grad, qx.grad)


def test_a_deployed_layer_holds_bytes_only():
    layer = BitConv2d(64, 128, 3, bias=False).deploy()
    state = layer.state_dict()
    assert {name: tuple(t.shape) for name, t in state.items()} == {
        "qweight_scale": (128,),
        "qweight": (128, 144),
    }
    assert sum(t.nbytes for t in state.values()) * 8 / (64 * 128 * 9) <= 2.1
    other = BitConv2d(64, 128, 3, bias=False, device="meta").deploy()
    other.load_state_dict(state, assign=True)
    x = torch.randn(1, 64, 5, 5)
    assert torch.equal(other(x), layer(x))
    with pytest.raises(QuantizationError, match="cannot be trained"):
        layer.train()
    with pytest.raises(QuantizationError, match="no float weight"):
        layer.reset_parameters()


@pytest.mark.parametrize("form", ["train", "eval", "deployed"])
def test_compiled_and_under_autocast(form):
    layer, x = BitConv2d(3, 4, 3, padding=1), torch.randn(2, 3, 6, 6)
    layer = layer.deploy() if form == "deployed" else layer.train(form == "train")
    with torch.no_grad():
        expected = layer(x)
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x), expected)
        with torch.autocast("cpu", torch.bfloat16):
            out = layer(x)
        assert out.dtype == torch.bfloat16
        torch.testing.assert_close(out.float(), expected, rtol=0.05, atol=0.05)
        assert layer.to(torch.bfloat16)(x.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"groups": 2}, "2 groups"),
        ({"kernel_size": 0}, "kernel_size is 0"),
        ({"kernel_size": (1, 2, 3)}, "one or two"),
        ({"stride": -1}, "stride is -1"),
        ({"padding": "full"}, "same or valid"),
        ({"padding": "same", "stride": 2}, "stride of 1"),
        ({"padding_mode": "zero"}, "zeros, reflect"),
        ({"in_channels": 0}, "in_channels is 0"),
    ],
)
def test_arguments_that_are_refused(arguments, message):
    with pytest.raises(QuantizationError, match=message):
        BitConv2d(**{"in_channels": 3, "out_channels": 4, "kernel_size": 3} | arguments)


@pytest.mark.parametrize("form", ["train", "eval", "deployed"])
def test_inputs_that_are_refused(form):
    layer = BitConv2d(3, 4, 1)
    layer = layer.deploy() if form == "deployed" else layer.train(form == "train")
    for bad in (torch.randn(1, 2, 4, 4), torch.randn(3, 4), torch.ones(1, 3, 4, 4).int()):
        with torch.no_grad(), pytest.raises(QuantizationError):
            layer(bad)


# Torch's rules of differentiation forwards are scripts of its own.
@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")
@pytest.mark.parametrize("form", ["train", "eval", "deployed"])
def test_functions_of_torch_func_in_every_form(form):
    layer, x = BitConv2d(3, 4, 3, bias=False), torch.randn(2, 3, 5, 5)
    scale, codes = layer.ternary_weight()
    weight = codes * scale.view(-1, 1, 1, 1)
    layer = layer.deploy() if form == "deployed" else layer.train(form == "train")
    with torch.no_grad():
        expected = layer(x)
        torch.testing.assert_close(torch.vmap(layer)(x), expected)
        torch.testing.assert_close(torch.func.jvp(layer, (x,), (x,))[1], F.conv2d(x, weight))


def test_weights_that_are_not_finite_are_refused_with_and_without_gradients():
    layer = BitConv2d(3, 4, 3).eval()
    with torch.no_grad():
        layer.weight[0, 0, 0, 0] = float("nan")
    for grad in (False, True):
        with torch.set_grad_enabled(grad), pytest.raises(QuantizationError, match="1 of 108 weights are NaN"):
            layer(torch.randn(1, 3, 5, 5))


def test_hooks_run_once_for_an_image_without_a_batch():
    layer, calls = BitConv2d(3, 4, 3), []
    layer.register_forward_hook(lambda *_: calls.append(1))
    assert layer(torch.randn(3, 5, 5)).shape == (4, 3, 3)
    assert calls == [1]
