"""Bytes by hand, and differences that are known."""

import pytest
import torch
from bitcore.exceptions import QuantizationError
from bitcore.ops import quantize_weight
from bitlayers import BitConv2d, BitEmbedding, BitLinear
from bitlayers.utils import (
    compare_layers,
    deploy_layers,
    estimate_memory_usage,
    evaluating,
    median_times_ms,
    ternary_layers,
)
from torch import nn


def stored(module):
    return sum(t.nbytes for t in module.state_dict().values())


def test_bytes_by_hand():
    layer = BitLinear(64, 32)
    # 64 x 32 codes of 2 bits, 32 scales and 32 biases of 4 bytes
    assert estimate_memory_usage(layer) == {
        "total_bytes": 64 * 32 * 4 + 32 * 4,
        "float32_bytes": 64 * 32 * 4 + 32 * 4,
        "deployed_bytes": 512 + 128 + 128,
        "ternary_weights": 2048,
        "bits_per_ternary_weight": (512 + 128) * 8 / 2048,
        "reduction": 1 - 768 / 8320,
    }


def test_an_estimate_is_what_deployment_leaves():
    shared = nn.Linear(8, 8)
    model = nn.Sequential(
        BitEmbedding(50, 33),
        BitLinear(33, 21, norm=True),
        nn.BatchNorm1d(21),
        shared,
        shared,
        BitConv2d(2, 3, 3),
    )
    before = estimate_memory_usage(model)
    with torch.no_grad():
        model[1].eval()(torch.randn(1, 33))  # what evaluation keeps does not count
    assert estimate_memory_usage(model) == before
    deploy_layers(model)
    after = estimate_memory_usage(model)
    own = stored(model) - sum(t.nbytes for t in shared.state_dict().values())
    assert after["total_bytes"] == after["deployed_bytes"] == before["deployed_bytes"] == own
    assert after["float32_bytes"] == before["float32_bytes"]
    assert not model.training
    assert list(ternary_layers(model)) == ["0", "1", "5"]
    assert estimate_memory_usage(BitLinear(64, 32, device="meta"))["total_bytes"] == 8320
    assert estimate_memory_usage(nn.ReLU()) == dict.fromkeys(after, 0)


def test_a_weight_that_is_shared_counts_once():
    model = nn.Sequential(BitLinear(64, 64, bias=False), BitLinear(64, 64, bias=False))
    model[1].weight = model[0].weight
    assert estimate_memory_usage(model)["total_bytes"] == 64 * 64 * 4
    assert estimate_memory_usage(model)["ternary_weights"] == 64 * 64
    deploy_layers(model)
    assert estimate_memory_usage(model)["total_bytes"] == stored(model)


def test_either_all_are_deployed_or_none():
    model = nn.Sequential(BitLinear(4, 4), nn.Sequential(BitLinear(4, 4)))
    with torch.no_grad():
        model[1][0].weight[0, 0] = torch.inf
    with pytest.raises(QuantizationError, match=r"weight of 1\.0 holds NaN"):
        deploy_layers(model)
    assert not model[0].is_deployed


def test_what_layers_differ_by():
    torch.manual_seed(0)
    linear, x = nn.Linear(64, 48), torch.randn(16, 64)
    same = compare_layers(linear, linear, x, rounds=1)
    assert (same["max_abs_error"], same["relative_error"]) == (0, 0)
    assert same["cosine_similarity"] == pytest.approx(1)
    layer = BitLinear(64, 48)
    layer.load_state_dict(linear.state_dict())
    found = compare_layers(linear, layer.deploy(), x, rounds=2)
    difference = layer(x) - linear(x)
    assert found["max_abs_error"] == pytest.approx(difference.abs().max().item())
    assert found["relative_error"] == pytest.approx((difference.norm() / linear(x).norm()).item(), rel=1e-4)
    assert 0.2 < found["relative_error"] < 0.8
    assert found["layer_bytes"] == 64 * 48 // 4 + 48 * 8
    assert found["memory_reduction"] == pytest.approx(1 - found["layer_bytes"] / ((64 * 48 + 48) * 4))
    assert found["speedup"] == pytest.approx(found["reference_ms"] / found["layer_ms"])
    with pytest.raises(QuantizationError, match="shapes"):
        compare_layers(linear, nn.Linear(64, 40), x)


def test_modules_are_left_as_they_were():
    model = nn.Sequential(nn.Dropout(), nn.Sequential(nn.Dropout(), BitLinear(4, 4)))
    model[1][0].eval()
    before = [part.training for part in model.modules()]

    def fails():
        with evaluating(model):
            assert not any(part.training for part in model.modules())
            raise KeyError

    with pytest.raises(KeyError):
        fails()
    assert [part.training for part in model.modules()] == before


def test_times_are_medians_of_turns(monkeypatch):
    now, calls = [0.0], []
    monkeypatch.setattr("time.process_time", lambda: now[0])
    lasts = {"quick": iter([1, 1, *[9] * 20, *[2] * 20, *[3] * 20]), "slow": iter([50, 50, 70, 40, 60])}

    def call(name):
        def run():
            calls.append(name)
            now[0] += next(lasts[name]) / 1000

        return run

    assert median_times_ms([call("quick"), call("slow")], rounds=3) == pytest.approx([3, 60])
    assert calls[4:] == ([*["quick"] * 20, "slow"] * 3)
    with pytest.raises(QuantizationError, match="rounds is 0"):
        median_times_ms([call("quick")], rounds=0)


@pytest.mark.parametrize(
    "layer",
    [BitLinear(33, 21), BitConv2d(4, 6, (3, 2), groups=2), BitEmbedding(9, 7)],
    ids=lambda x: type(x).__name__,
)
def test_codes_are_those_of_the_float_weight_in_every_form(layer):
    expected = quantize_weight(layer.weight.detach())
    for form in (layer, layer.eval(), layer.deploy()):
        scale, codes = form.ternary_weight()
        assert torch.equal(codes, expected[1])
        assert torch.equal(scale.unique(), expected[0])


def test_strength_is_for_training_alone():
    linear, layer = nn.Linear(8, 4), BitLinear(8, 4)
    layer.load_state_dict(linear.state_dict())
    x, full = torch.randn(5, 8), layer.ternary_weight()[1] * layer.packed()[0][:, None]
    layer.strength = 0.25
    x_scale = x.abs().amax(-1, keepdim=True) / 127
    near = x + 0.25 * ((x / x_scale).round() * x_scale - x)
    weight = linear.weight + 0.25 * (full - linear.weight)
    torch.testing.assert_close(layer(x), near @ weight.t() + linear.bias, rtol=1e-4, atol=1e-5)
    assert torch.equal(layer.eval()(x), layer.deploy()(x))
