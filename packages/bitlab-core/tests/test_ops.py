"""Quantisation by hand, straight-through gradients by their formula, and the operator under torch's tools."""

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from bitcore.config import BitQuantConfig
from bitcore.exceptions import QuantizationError
from bitcore.ops import (
    bitlinear,
    compute_weight_scale,
    compute_x_scale,
    dequantize_weight,
    dequantize_x,
    quantize_weight,
    quantize_x,
)
from hypothesis import given
from hypothesis import strategies as st
from transformers.integrations import bitnet

GRANULARITIES = ["per_tensor", "per_channel", "per_token"]


def test_a_weight_by_hand():
    weight = torch.tensor([[1.0, -0.2, 0.6], [-3.0, 0.0, 0.0]])
    scale, codes = quantize_weight(weight)
    # 4.8 / 6 = 0.8, and 0.6 / 0.8 rounds to 1
    torch.testing.assert_close(scale, torch.tensor([0.8]))
    assert codes.tolist() == [[1, 0, 1], [-1, 0, 0]]
    assert codes.dtype == torch.int8
    scale, codes = quantize_weight(weight, "per_channel")
    torch.testing.assert_close(scale, torch.tensor([[0.6], [1.0]]))
    assert codes.tolist() == [[1, 0, 1], [-1, 0, 0]]
    assert torch.equal(compute_weight_scale(weight, "per_channel"), scale)
    torch.testing.assert_close(dequantize_weight(scale, codes)[0], torch.tensor([0.6, 0.0, 0.6]))
    given_scale = quantize_weight(weight, scale=torch.tensor([4.0]))[1]
    assert given_scale.tolist() == [[0, 0, 0], [-1, 0, 0]]


def test_activations_by_hand():
    x = torch.tensor([[0.5, -2.0, 1.0], [0.0, 0.0, 0.0]])
    scale, codes = quantize_x(x)
    torch.testing.assert_close(scale, torch.tensor([[2 / 127], [1e-5 / 127]]))
    # 0.5 * 127 / 2 = 31.75 and 1 * 127 / 2 = 63.5, half to even
    assert codes.tolist() == [[32, -127, 64], [0, 0, 0]]
    torch.testing.assert_close(dequantize_x(scale, codes)[0, 1], torch.tensor(-2.0))
    assert torch.equal(compute_x_scale(x, "per_channel"), scale)
    one, codes = quantize_x(x, "per_tensor")
    torch.testing.assert_close(one, torch.tensor([2 / 127]))
    assert codes.tolist() == [[32, -127, 64], [0, 0, 0]]
    assert quantize_x(x[:0])[1].shape == (0, 3)
    assert quantize_x(x[:0], "per_tensor")[0].shape == (1,)


def test_codes_are_those_of_transformers():
    torch.manual_seed(0)
    weight, x = torch.randn(64, 96), torch.randn(20, 96)
    scale = 1.0 / weight.abs().mean().clamp_(min=1e-5)
    assert torch.equal(quantize_weight(weight)[1].float(), (weight * scale).round().clamp_(-1, 1))
    layer = bitnet.BitLinear(96, 64, bias=False)
    codes, factor = layer.activation_quant(x)
    assert torch.equal(quantize_x(x)[1], codes)
    torch.testing.assert_close(quantize_x(x)[0], 1 / factor)


def test_zeros_give_zeros():
    for granularity in ("per_tensor", "per_channel"):
        scale, packed = bitlinear.prepare_weights(
            torch.zeros(5, 7), BitQuantConfig(weight_granularity=granularity)
        )
        out = bitlinear.forward(torch.randn(3, 7), qweight=packed, qweight_scale=scale, training=False)
        assert torch.equal(out, torch.zeros(3, 5))
    assert torch.equal(bitlinear.forward(torch.zeros(3, 7), weight=torch.randn(5, 7)), torch.zeros(3, 5))


@pytest.mark.parametrize("activations", ["int8", "float32"])
@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("weights", ["per_tensor", "per_channel"])
def test_gradients_pass_straight_through(activations, granularity, weights):
    torch.manual_seed(0)
    config = BitQuantConfig(
        weight_granularity=weights, activation_dtype=activations, activation_granularity=granularity
    )
    x, weight, bias = (torch.randn(*shape, requires_grad=True) for shape in ((4, 6), (3, 6), (3,)))
    out = bitlinear.forward(x, weight=weight, bias=bias, quant_config=config)
    upstream = torch.randn(4, 3)
    out.backward(upstream)
    with torch.no_grad():
        w = dequantize_weight(*quantize_weight(weight, weights))
        rounded = x if activations == "float32" else dequantize_x(*quantize_x(x, granularity))
        torch.testing.assert_close(out, rounded @ w.t() + bias)
        torch.testing.assert_close(x.grad, upstream @ w)
        torch.testing.assert_close(weight.grad, upstream.t() @ rounded)
        torch.testing.assert_close(bias.grad, upstream.sum(0))


@pytest.mark.parametrize("config", [BitQuantConfig(), BitQuantConfig(activation_dtype="float32")])
def test_training_and_packed_weights_give_the_same(config):
    torch.manual_seed(0)
    x, weight, bias = torch.randn(2, 5, 70), torch.randn(33, 70), torch.randn(33)
    trained = bitlinear.forward(x, weight=weight, bias=bias, quant_config=config)
    scale, packed = bitlinear.prepare_weights(weight, config)
    common = {"bias": bias, "quant_config": config, "training": False}
    deployed = bitlinear.forward(x, qweight=packed, qweight_scale=scale, **common)
    torch.testing.assert_close(deployed, trained)
    assert torch.equal(bitlinear.forward(x, weight=weight, **common), deployed)


# Torch's check looks at the gradients of tensors that are no leaves.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize("activations", ["int8_per_token", "int8_per_tensor", "float32"])
@pytest.mark.parametrize("has_bias", [False, True])
def test_the_operator_under_torchs_own_checks(activations, has_bias):
    torch.manual_seed(0)
    scale, packed = bitlinear.prepare_weights(torch.randn(10, 20))
    x = torch.randn(3, 20, requires_grad=True)
    bias = torch.randn(10, requires_grad=True) if has_bias else None
    torch.library.opcheck(torch.ops.bitcore.linear, (x, scale, packed, bias, activations))


def test_packed_layers_pass_gradients_on():
    torch.manual_seed(0)
    weight = torch.randn(10, 20)
    scale, packed = bitlinear.prepare_weights(weight)
    x, bias = torch.randn(2, 3, 20, requires_grad=True), torch.randn(10, requires_grad=True)
    upstream = torch.randn(2, 3, 10)
    bitlinear.forward(x, qweight=packed, qweight_scale=scale, bias=bias, training=False).backward(upstream)
    torch.testing.assert_close(x.grad, upstream @ dequantize_weight(*quantize_weight(weight)))
    torch.testing.assert_close(bias.grad, upstream.sum((0, 1)))


# Torch's rules of differentiation forwards are scripts of its own.
@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")
@pytest.mark.parametrize("form", ["training", "float weight", "packed"])
@pytest.mark.parametrize("has_bias", [False, True])
def test_functions_of_torch_func_and_differentiation_forwards(form, has_bias):
    """Straight through: the derivative is the rounded weight, whichever way it is computed."""
    torch.manual_seed(0)
    weight, x, direction = torch.randn(10, 20), torch.randn(4, 20), torch.randn(4, 20)
    bias = torch.randn(10) if has_bias else None
    scale, packed = bitlinear.prepare_weights(weight)
    arguments = {
        "training": {"weight": weight},
        "float weight": {"weight": weight, "training": False},
        "packed": {"qweight": packed, "qweight_scale": scale, "training": False},
    }[form]

    def function(x):
        return bitlinear.forward(x, bias=bias, **arguments)

    w, expected = dequantize_weight(*quantize_weight(weight)), function(x)
    out, forwards = torch.func.jvp(function, (x,), (direction,))
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(forwards, direction @ w.t())
    with forward_ad.dual_level():
        dual = function(forward_ad.make_dual(x, direction))
        torch.testing.assert_close(forward_ad.unpack_dual(dual).tangent, direction @ w.t())
    torch.testing.assert_close(torch.func.jacrev(function)(x[0]), w)
    torch.testing.assert_close(torch.func.jacfwd(function)(x[0]), w)
    squares = torch.func.hessian(lambda x: function(x).square().sum())(x[0])
    torch.testing.assert_close(squares, 2 * w.t() @ w)
    torch.testing.assert_close(torch.vmap(function)(x), expected)


class Layer(torch.nn.Module):
    def __init__(self):
        super().__init__()
        scale, packed = bitlinear.prepare_weights(torch.randn(10, 20))
        self.register_buffer("scale", scale)
        self.register_buffer("packed", packed)

    def forward(self, x):
        return bitlinear.forward(
            torch.relu(x), qweight=self.packed, qweight_scale=self.scale, training=False
        ).sin()


def test_compilers_and_exporters_see_one_operator():
    torch.manual_seed(0)
    layer, x = Layer(), torch.randn(3, 20)
    expected = layer(x)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), expected)
    exported = torch.export.export(layer, (x,), dynamic_shapes={"x": {0: torch.export.Dim("n", min=2)}})
    assert "bitcore.linear" in str(exported.graph)
    more = torch.randn(7, 20)
    assert torch.equal(exported.module()(more), layer(more))


def test_training_compiles():
    torch.manual_seed(0)
    x, weight = torch.randn(3, 20), torch.randn(10, 20, requires_grad=True)
    compiled = torch.compile(bitlinear.forward, fullgraph=True, backend="aot_eager")
    out = compiled(x, weight=weight)
    out.sum().backward()
    by_compiled, weight.grad = weight.grad, None
    plain = bitlinear.forward(x, weight=weight)
    plain.sum().backward()
    torch.testing.assert_close(out, plain)
    torch.testing.assert_close(by_compiled, weight.grad)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "training=True needs the float weight"),
        ({"training": False}, "needs qweight and qweight_scale"),
        ({"weight": torch.ones(3, 5)}, r"\[2, 4\] do not fit a weight"),
        ({"weight": torch.ones(3, 5), "training": False}, "do not fit"),
        ({"x": torch.ones(2, 4, dtype=torch.int64), "weight": torch.ones(3, 4)}, "floating inputs"),
        ({"x": torch.ones(2, 4, dtype=torch.int64), "packed": True}, "floating inputs"),
        ({"x": torch.ones(2, 40), "packed": True}, r"3 rows need a packed weight of shape \(16, 12\)"),
        ({"packed": True, "qweight_scale": torch.ones(3, 1)}, "one for each"),
        ({"packed": True, "bias": torch.ones(4)}, r"the bias is \[3\]"),
    ],
)
def test_what_does_not_fit_is_refused(arguments, message):
    x = arguments.pop("x", torch.ones(2, 4))
    if arguments.pop("packed", False):
        scale, packed = bitlinear.prepare_weights(torch.ones(3, 4))
        arguments = {"qweight": packed, "qweight_scale": scale, "training": False, **arguments}
    with pytest.raises(QuantizationError, match=message):
        bitlinear.forward(x, **arguments)


CONFIGS = st.builds(
    BitQuantConfig,
    weight_granularity=st.sampled_from(["per_tensor", "per_channel"]),
    activation_dtype=st.sampled_from(["int8", "float32"]),
    activation_granularity=st.sampled_from(GRANULARITIES),
)


@given(CONFIGS)
def test_a_configuration_comes_back(config):
    assert BitQuantConfig.from_dict(config.to_dict()) == config
    assert hash(config) == hash(BitQuantConfig(**config.to_dict()))


def test_configurations_of_what_is_given():
    given = BitQuantConfig("per_channel")
    assert BitQuantConfig.of(given) is given
    assert BitQuantConfig.of(given.to_dict()) == given
    assert BitQuantConfig.of(None) == BitQuantConfig()
    with pytest.raises(QuantizationError, match="a BitQuantConfig or a dictionary, not 'int8'"):
        BitQuantConfig.of("int8")
    weight = torch.randn(4, 8)
    by_dictionary = bitlinear.prepare_weights(weight, {"weight_granularity": "per_channel"})
    assert torch.equal(by_dictionary[0], bitlinear.prepare_weights(weight, given)[0])


def test_granularities_that_are_none():
    for function in (quantize_weight, compute_weight_scale):
        with pytest.raises(QuantizationError, match="'per_token'; it must be one of per_tensor, per_channel"):
            function(torch.ones(2, 2), "per_token")
    for function in (quantize_x, compute_x_scale):
        with pytest.raises(QuantizationError, match=r"'per_row'; it must be one of .*per_token"):
            function(torch.ones(2, 2), "per_row")


def test_configurations_that_are_none():
    with pytest.raises(
        QuantizationError, match="weight_granularity is 'per_row'; it must be one of per_tensor"
    ):
        BitQuantConfig(weight_granularity="per_row")
    with pytest.raises(
        QuantizationError, match=r"'activation_type' is none of .*did you mean activation_dtype"
    ):
        BitQuantConfig.from_dict({"activation_type": "int8"})
    with pytest.raises(AttributeError):
        BitQuantConfig().activation_dtype = "float32"
