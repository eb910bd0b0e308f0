"""BitLinear stands where nn.Linear stands: trains, evaluates, deploys, moves, and refuses what cannot be."""

import copy
import io
import pickle
import sys
import threading

import pytest
import torch
from bitcore.config import BitQuantConfig
from bitcore.exceptions import QuantizationError
from bitcore.kernels import KernelRegistry
from bitcore.ops import bitlinear, dequantize_weight, dequantize_x, quantize_weight, quantize_x
from bitlayers import BitLinear, SubLN
from bitlayers.utils import deploy_layers, evaluating
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.optim.swa_utils import AveragedModel


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def reference(layer, x, weight=None, config=None):
    """What a layer is to give, of floats that were rounded."""
    config = config or layer.quant_config
    weight = layer.weight if weight is None else weight
    rounded = dequantize_weight(*quantize_weight(weight.detach(), config.weight_granularity)).double()
    inputs = (
        dequantize_x(*quantize_x(x, config.activation_granularity)) if config.quantizes_activations else x
    )
    out = inputs.double() @ rounded.t()
    return (out if layer.bias is None else out + layer.bias.detach().double()).to(x.dtype)


@settings(deadline=None, max_examples=40)
@given(
    columns=st.integers(1, 90),
    rows=st.integers(1, 90),
    inputs=st.integers(0, 9),
    bias=st.booleans(),
    weights=st.sampled_from(["per_tensor", "per_channel"]),
    dtype=st.sampled_from(["int8", "float32"]),
    activations=st.sampled_from(["per_tensor", "per_channel", "per_token"]),
)
def test_all_forms_agree_on_any_shape(columns, rows, inputs, bias, weights, dtype, activations):
    config = BitQuantConfig(weights, dtype, activations)
    layer = BitLinear(columns, rows, bias, quant_config=config)
    x = torch.randn(inputs, columns)
    expected = reference(layer, x)
    for form in (layer, layer.eval(), copy.deepcopy(layer).deploy()):
        torch.testing.assert_close(form(x), expected, rtol=1e-4, atol=1e-5)
        with torch.no_grad():
            torch.testing.assert_close(form(x), expected, rtol=1e-4, atol=1e-5)


def test_evaluation_and_deployment_agree_to_the_bit():
    layer, x = BitLinear(100, 70).eval(), torch.randn(3, 5, 100)
    with torch.no_grad():
        evaluated = layer(x)
        assert torch.equal(layer.deploy()(x), evaluated)
    assert torch.equal(layer(x), evaluated)  # with gradients


def test_arguments_are_those_of_linear():
    layer = BitLinear(12, 8, bias=False, device="meta", dtype=torch.bfloat16)
    assert layer.bias is None
    assert (layer.weight.device.type, layer.weight.dtype) == ("meta", torch.bfloat16)
    assert repr(BitLinear(12, 8).deploy()) == "BitLinear(in_features=12, out_features=8, bias=True, deployed)"


@pytest.mark.parametrize("method", ["xavier_uniform", "kaiming_uniform"])
def test_weights_begin_as_they_are_named(method):
    layer = BitLinear(200, 100, init_method=method)
    bound = (6 / 300) ** 0.5 if method == "xavier_uniform" else (1 / 200) ** 0.5
    most = layer.weight.abs().max().item()
    assert 0.99 * bound < most <= bound
    assert layer.bias.abs().max() <= 200**-0.5


def test_a_step_of_training_follows_the_formula():
    layer, x = BitLinear(20, 6), torch.randn(4, 20, requires_grad=True)
    grad = torch.randn(4, 6)
    layer(x).backward(grad)
    config = layer.quant_config
    qx = dequantize_x(*quantize_x(x.detach(), config.activation_granularity))
    qw = dequantize_weight(*quantize_weight(layer.weight.detach()))
    torch.testing.assert_close(layer.weight.grad, grad.t() @ qx)
    torch.testing.assert_close(x.grad, grad @ qw)
    torch.testing.assert_close(layer.bias.grad, grad.sum(0))


def test_evaluation_gives_the_gradients_of_training():
    layer, x = BitLinear(20, 6), torch.randn(2, 3, 20, requires_grad=True)
    grad = torch.randn(2, 3, 6)
    found = []
    for mode in (True, False):
        layer.train(mode).zero_grad()
        x.grad = None
        layer(x).backward(grad)
        found.append((x.grad, layer.weight.grad, layer.bias.grad))
    for trained, evaluated in zip(*found, strict=True):
        torch.testing.assert_close(evaluated, trained)
    layer.deploy()
    x.grad = None
    layer(x).backward(grad)
    torch.testing.assert_close(x.grad, found[0][0])


def test_a_layer_learns():
    layer = BitLinear(16, 1, norm=True)
    target = torch.randint(-1, 2, (16,)).float()
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.02)
    losses = []
    for _ in range(150):
        x = torch.randn(64, 16)
        loss = (layer(x).squeeze(-1) - x @ target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-10:]) < 0.2 * sum(losses[:10])


def test_evaluation_packs_once_and_again_after_a_change(monkeypatch):
    packs = []
    pack = bitlinear.prepare_weights
    monkeypatch.setattr(bitlinear, "prepare_weights", lambda *a: packs.append(1) or pack(*a))
    layer, x = BitLinear(32, 16).eval(), torch.randn(4, 32)
    with torch.no_grad():
        first = layer(x)
        assert torch.equal(layer(x), first)
        assert len(packs) == 1
        layer.weight.neg_()
        without_bias = first - layer.bias
        torch.testing.assert_close(layer(x), layer.bias - without_bias)
        layer.weight.data = -layer.weight.data
        torch.testing.assert_close(layer(x), first)
        layer.load_state_dict(BitLinear(32, 16).state_dict())
        assert not torch.equal(layer(x), first)
        assert len(packs) == 4
        layer.bias.add_(1)
        half = layer(x.bfloat16())
        layer.bias.add_(1)
        assert (layer(x.bfloat16()) - half).mean() > 0.9


def test_going_back_to_training_loses_nothing():
    layer, x = BitLinear(32, 16), torch.randn(4, 32)
    before, out = copy.deepcopy(layer.state_dict()), layer(x)
    with torch.no_grad():
        layer.eval()(x)
    assert layer.qweight is not None
    layer.train()
    assert layer.qweight is None
    assert layer.state_dict().keys() == before.keys() == {"weight", "bias"}
    assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())
    assert torch.equal(layer(x), out)


def test_a_deployed_layer_holds_bytes_only():
    layer = BitLinear(1024, 512, bias=False).deploy()
    assert layer.is_deployed
    assert layer.weight is None
    assert list(layer.parameters()) == []
    state = layer.state_dict()
    assert {name: (tuple(t.shape), t.dtype) for name, t in state.items()} == {
        "qweight_scale": ((512,), torch.float32),
        "qweight": ((512, 256), torch.uint8),
    }
    assert sum(t.nbytes for t in state.values()) * 8 / (1024 * 512) <= 2.1
    assert layer.deploy() is layer
    with pytest.raises(QuantizationError, match="cannot be trained"):
        layer.train()
    with pytest.raises(QuantizationError, match="cannot be trained"):
        nn.Sequential(layer).train()
    with pytest.raises(QuantizationError, match="no float weight"):
        layer.reset_parameters()
    assert layer.eval() is layer


def test_state_dicts_of_both_forms_go_round_and_not_into_one_another():
    layer, x = BitLinear(40, 24), torch.randn(3, 40)
    other = BitLinear(40, 24)
    other.load_state_dict(layer.state_dict())
    deployed = copy.deepcopy(layer).deploy()
    with torch.no_grad():
        expected = deployed(x)
        assert torch.equal(other.eval()(x), expected)
        target = BitLinear(40, 24).deploy()
        target(x)
        target.load_state_dict(deployed.state_dict())
        assert torch.equal(target(x), expected)
        empty = BitLinear(40, 24, device="meta").deploy()
        assert not empty.load_state_dict(deployed.state_dict(), assign=True).missing_keys
        assert torch.equal(empty(x), expected)
    with pytest.raises(QuantizationError, match=r"0 is deployed.*before deploy"):
        nn.Sequential(deployed).load_state_dict(nn.Sequential(layer).state_dict())
    with pytest.raises(QuantizationError, match=r"Call deploy\(\) before"):
        layer.load_state_dict(deployed.state_dict())


@pytest.mark.parametrize("deployed", [False, True])
def test_copies_and_pickles_stand_alone(deployed):
    layer, x = BitLinear(40, 24).eval(), torch.randn(3, 40)
    if deployed:
        layer.deploy()
    with torch.no_grad():
        expected = layer(x)
        stored = io.BytesIO()
        torch.save(layer, stored)
        stored.seek(0)
        copies = [
            copy.deepcopy(layer),
            copy.copy(layer),
            pickle.loads(pickle.dumps(layer)),  # noqa: S301
            torch.load(stored, weights_only=False),
        ]
        for each in copies:
            assert torch.equal(each(x), expected)
        if not deployed:
            copies[0].weight.neg_()
            assert not torch.equal(copies[0](x), expected)
        assert torch.equal(layer(x), expected)


def test_a_pickle_forgets_what_was_packed_of_an_older_weight():
    layer, x = BitLinear(8, 8, bias=False).eval(), torch.randn(1, 8)
    with torch.no_grad():
        before = layer(x)
        layer.weight.neg_()
        assert torch.equal(pickle.loads(pickle.dumps(layer))(x), -before)  # noqa: S301


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_moves_keep_the_scale(dtype):
    layer, x = BitLinear(40, 24).eval(), torch.randn(3, 40)
    deployed = copy.deepcopy(layer).deploy()
    scale = deployed.qweight_scale.clone()
    with torch.no_grad():
        expected = deployed(x)
        out = deployed.to(dtype)(x.to(dtype))
        assert out.dtype == dtype
        assert deployed.qweight_scale.dtype == torch.float32
        assert torch.equal(deployed.qweight_scale, scale)
        torch.testing.assert_close(out.float(), expected, rtol=0.02, atol=0.02)
        layer(x)
        torch.testing.assert_close(layer.to(dtype)(x.to(dtype)).float(), expected, rtol=0.05, atol=0.05)
        emptied = deployed.to("meta").to_empty(device="cpu")
        assert emptied.qweight_scale.dtype == torch.float32


@pytest.mark.parametrize("form", ["train", "eval", "deployed"])
@pytest.mark.parametrize("norm", [False, True])
def test_autocast_gives_its_dtype(form, norm):
    layer, x = BitLinear(40, 24, norm=norm), torch.randn(3, 40)
    expected = layer(x).detach()
    layer = layer.deploy() if form == "deployed" else layer.train(form == "train")
    with torch.autocast("cpu", torch.bfloat16):
        out = layer(x)
        with torch.no_grad():
            assert layer(x).dtype == layer(x.bfloat16()).dtype == torch.bfloat16
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), expected, rtol=0.03, atol=0.03)
    assert layer(x).dtype == torch.float32


@pytest.mark.parametrize("form", ["train", "eval", "deployed"])
def test_compilers_and_exporters_take_every_form(form):
    layer, x = nn.Sequential(BitLinear(40, 24, norm=True), nn.ReLU(), BitLinear(24, 9)), torch.randn(3, 40)
    layer = layer.train(form == "train")
    if form == "deployed":
        layer[0].deploy()
        layer[2].deploy()
    with torch.no_grad():
        expected = layer(x)
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x), expected)
        exported = torch.export.export(layer, (x,), dynamic_shapes=({0: torch.export.Dim("n", min=2)},))
        torch.testing.assert_close(exported.module()(torch.cat([x, x]))[3:], expected)


def test_norms_come_first():
    x = torch.randn(5, 12) * 100
    for norm, own in ((True, SubLN), (nn.LayerNorm(12), nn.LayerNorm)):
        layer = BitLinear(12, 7, norm=norm)
        assert isinstance(layer.norm, own)
        plain = BitLinear(12, 7)
        plain.load_state_dict({k: v for k, v in layer.state_dict().items() if not k.startswith("norm.")})
        torch.testing.assert_close(layer(x), plain(layer.norm(x)))
        with torch.no_grad():
            assert torch.equal(layer.deploy()(x), plain.deploy()(layer.norm(x)))


def test_sub_ln_is_the_formula():
    norm, x = SubLN(6), torch.randn(3, 6)
    with torch.no_grad():
        norm.weight.copy_(torch.rand(6))
    expected = x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * norm.weight
    torch.testing.assert_close(norm(x), expected)
    half = norm(x.bfloat16())
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), expected, rtol=0.02, atol=0.02)


def test_parametrized_weights_are_packed_as_they_are():
    layer, x = BitLinear(16, 8).eval(), torch.randn(2, 16)
    torch.nn.utils.parametrize.register_parametrization(layer, "weight", _Negative())
    assert not layer.is_deployed
    with torch.no_grad():
        out = layer(x)
        layer.parametrizations.weight.original.neg_()
        torch.testing.assert_close(layer(x) - layer.bias, layer.bias - out)


class _Negative(nn.Module):
    def forward(self, weight):
        return -weight


@pytest.mark.parametrize("deployed", [False, True])
def test_what_inference_mode_packed_serves_gradients_too(deployed):
    layer, x = BitLinear(16, 8).eval(), torch.randn(2, 16)
    with torch.inference_mode():
        if deployed:
            layer.deploy()
        expected = layer(x)
    x.requires_grad_()
    out = layer(x)
    assert torch.equal(out, expected)
    out.sum().backward()
    assert x.grad.any()


def test_weights_of_inference_mode():
    with torch.inference_mode():
        layer = BitLinear(16, 8).eval()
        x = torch.randn(2, 16)
        torch.testing.assert_close(layer(x), reference(layer, x))


@pytest.mark.parametrize("form", ["train", "eval", "deployed"])
def test_what_a_layer_cannot_take(form):
    layer = BitLinear(16, 8)
    layer = layer.deploy() if form == "deployed" else layer.train(form == "train")
    for gradients in (True, False):
        with torch.set_grad_enabled(gradients):
            for bad in (torch.randn(2, 15), torch.randn(2, 17), torch.tensor(1.0), torch.ones(2, 16).int()):
                with pytest.raises(QuantizationError):
                    layer(bad)
            assert layer(torch.randn(0, 16)).shape == (0, 8)
            assert layer(torch.randn(2, 0, 16)).shape == (2, 0, 8)
            assert layer(torch.full((1, 16), torch.nan)).isnan().all()


def test_weights_that_cannot_be_packed():
    layer = BitLinear(16, 8)
    with torch.no_grad():
        layer.weight[3, 4] = torch.nan
    layer.eval()
    with pytest.raises(QuantizationError, match="1 of 128 weights are NaN or infinite"):
        layer(torch.randn(1, 16))
    with pytest.raises(QuantizationError, match="NaN"):
        layer.deploy()
    assert not layer.is_deployed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"in_features": 0}, "in_features is 0"),
        ({"out_features": -1}, "out_features is -1"),
        ({"in_features": 2.0}, "in_features is 2.0"),
        ({"init_method": "xavier"}, "xavier_uniform, kaiming_uniform"),
    ],
)
def test_arguments_that_are_refused(arguments, message):
    with pytest.raises(QuantizationError, match=message):
        BitLinear(**{"in_features": 4, "out_features": 4} | arguments)


@pytest.mark.parametrize("deployed", [False, True])
def test_calls_from_several_threads_while_nothing_is_packed(deployed):
    def together(model, x):
        barrier, found = threading.Barrier(4), []

        def call():
            barrier.wait()
            with torch.no_grad():
                found.append(model(x))

        threads = [threading.Thread(target=call) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        with torch.no_grad():
            expected = copy.deepcopy(model)(x)
        assert len(found) == 4
        assert all(torch.equal(out, expected) for out in found)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for _ in range(100):
            model = nn.Sequential(*(BitLinear(64, 64) for _ in range(4))).eval()
            if deployed:
                deploy_layers(model)
            x = torch.randn(1, 64)
            together(model, x)
            if not deployed:
                with torch.no_grad():
                    for layer in model:
                        layer.weight.add_(torch.randn_like(layer.weight))
                together(model, x)
    finally:
        sys.setswitchinterval(interval)


def test_fused_optimizers_and_eval_are_seen():
    layer, x = BitLinear(32, 4).eval(), torch.randn(8, 32)
    optimizer = torch.optim.AdamW(layer.parameters(), 0.1, fused=True)
    for _ in range(3):
        layer(x).square().sum().backward()
        optimizer.step()
        with torch.no_grad():
            assert torch.equal(layer(x), copy.deepcopy(layer)(x))
    with torch.no_grad():
        layer.weight.data.neg_()
        assert torch.equal(layer.eval()(x), copy.deepcopy(layer)(x))
    with evaluating(layer.train()):
        layer(x)
    assert layer.qweight is None


def test_buffers_that_are_swapped_are_used():
    first, second = (BitLinear(32, 16, bias=False).deploy() for _ in range(2))
    x = torch.randn(5, 32)
    expected = second(x)
    assert not torch.equal(first(x), expected)
    assert torch.equal(torch.func.functional_call(first, dict(second.named_buffers()), (x,)), expected)
    first.qweight, first.qweight_scale = second.qweight, second.qweight_scale
    assert torch.equal(first(x), expected)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_what_only_stands_for_memory_is_not_read():
    layer, x = BitLinear(32, 16, bias=False).deploy(), torch.randn(5, 32)
    with torch.no_grad():
        expected = layer(x)
        assert torch.equal(layer(torch._neg_view(-x)), expected)
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            assert layer(mode.from_tensor(x)).shape == (5, 16)
        assert torch.equal(make_fx(layer)(x)(x), expected)
        assert torch.equal(layer(x.as_subclass(_Own)), expected)


class _Own(torch.Tensor):
    pass


@pytest.mark.parametrize("form", ["train", "eval", "deployed"])
def test_gradients_of_one_input_and_of_functions(form):
    layer, x = BitLinear(32, 16), torch.randn(32, requires_grad=True)
    layer(x).sum().backward()
    expected, x.grad = x.grad, None
    layer = layer.deploy() if form == "deployed" else layer.train(form == "train")
    layer(x).sum().backward()
    torch.testing.assert_close(x.grad, expected)
    if form == "train":
        by_function = torch.func.grad(lambda x: layer(x).sum())(x.detach())
        torch.testing.assert_close(by_function, expected)


# Torch's rules of differentiation forwards are scripts of its own.
@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")
@pytest.mark.parametrize("form", ["train", "eval", "deployed"])
@pytest.mark.parametrize("bias", [False, True])
def test_functions_of_torch_func_in_every_form(form, bias):
    layer, x = BitLinear(32, 16, bias), torch.randn(5, 32)
    scale, codes = layer.ternary_weight()
    weight = codes * scale.unsqueeze(-1)
    layer = layer.deploy() if form == "deployed" else layer.train(form == "train")
    expected = layer(x).detach()
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            torch.testing.assert_close(torch.vmap(layer)(x), expected)
            torch.testing.assert_close(torch.func.jvp(layer, (x,), (x,))[1], x @ weight.t())
    torch.testing.assert_close(torch.func.jacrev(layer)(x[0]), weight)
    if form != "deployed":

        def loss(parameters, x):
            return torch.func.functional_call(layer, parameters, (x,)).sum()

        each = torch.vmap(torch.func.grad(loss), (None, 0))(dict(layer.named_parameters()), x)
        layer(x).sum().backward()
        torch.testing.assert_close(each["weight"].sum(0), layer.weight.grad)


def test_averages_of_models_see_no_packed_weights():
    layer, x = BitLinear(8, 4), torch.randn(1, 8)
    average = AveragedModel(layer).eval()
    with torch.no_grad():
        average(x)
    assert not list(average.module.buffers())
    average.update_parameters(layer)
    with torch.no_grad():
        assert torch.equal(average(x), layer.eval()(x))


def test_autocast_rounds_the_bias_as_linear_does():
    layer, x = BitLinear(64, 256).deploy(), torch.randn(64, 64).bfloat16()
    config = layer.quant_config
    with torch.no_grad():
        layer.bias.normal_()
        out = layer(x)
        reference = KernelRegistry.get_kernel_by_name("torch")
        assert torch.equal(out, reference(x, layer.qweight_scale, layer.qweight, layer.bias, config))


def test_configurations_as_dictionaries():
    config = BitQuantConfig("per_channel")
    assert BitLinear(8, 4, quant_config=config.to_dict()).quant_config == config
    with pytest.raises(QuantizationError, match="not 'int8'"):
        BitLinear(8, 4, quant_config="int8")


def test_a_norm_refuses_whole_numbers_as_a_layer_does():
    for layer in (BitLinear(8, 4, norm=True), BitLinear(8, 4, norm=True).deploy()):
        with pytest.raises(QuantizationError, match=r"floating inputs, but was given torch\.int64"):
            layer(torch.ones(2, 8, dtype=torch.int64))


def test_parametrized_layers_are_not_deployed():
    layer = BitLinear(16, 8)
    torch.nn.utils.parametrize.register_parametrization(layer, "weight", _Negative())
    with pytest.raises(QuantizationError, match="remove_parametrizations"):
        layer.deploy()
