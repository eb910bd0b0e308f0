"""Inputs of layers, measured and rounded, against hooks and formulas written out here."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from auto_round.config_manager import LayerSettings, QuantizationConfig
from auto_round.exceptions import QuantizationError
from auto_round.quantization._inputs import InputStatistics, rounded_inputs
from auto_round.quantization._layers import Layer, find_layers
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

INT = LayerSettings(bits=4, group_size=32, symmetric=True, weight_dtype="int")
FP8 = LayerSettings(bits=8, group_size=-1, symmetric=True, weight_dtype="fp8")


def config(dynamic: bool) -> QuantizationConfig:
    return QuantizationConfig(act_bits=8, act_dynamic=dynamic)


def int8(x: Tensor, scale: Tensor) -> Tensor:
    return (x / scale).round().clamp(-127, 127) * scale


@pytest.fixture
def pair() -> nn.ModuleDict:
    torch.manual_seed(0)
    return nn.ModuleDict({"a": nn.Linear(8, 6), "b": Conv1D(4, 6)})


def run_pair(pair: nn.ModuleDict, x: Tensor) -> Tensor:
    return pair["b"](pair["a"](x).tanh())


def test_importance_is_the_mean_square_and_the_range_the_largest_magnitude(pair: nn.ModuleDict) -> None:
    layers = list(find_layers(pair, "m"))
    statistics = InputStatistics(layers)
    batches = [torch.randn(2, 5, 8), torch.randn(1, 5, 8)]
    with statistics.watching():
        for batch in batches:
            run_pair(pair, batch)
    run_pair(pair, torch.full((1, 5, 8), 1e6))  # after the `with`, so that nobody looks
    rows = torch.cat([batch.reshape(-1, 8) for batch in batches])
    inside = pair["a"](rows).tanh().detach()
    for layer, values in zip(layers, (rows, inside), strict=True):
        torch.testing.assert_close(statistics.importance(layer, 8), values.square().mean(0))
        torch.testing.assert_close(statistics.largest(layer), values.abs().max())


def test_a_layer_without_inputs_has_no_range_and_no_say(pair: nn.ModuleDict) -> None:
    layers = list(find_layers(pair, "m"))
    statistics = InputStatistics(layers)
    with statistics.watching():
        pair["a"](torch.randn(3, 8))
        pair["b"](torch.empty(0, 6))
    assert statistics.importance(layers[1], 6).tolist() == [1.0] * 6
    with pytest.raises(QuantizationError, match=r"m\.b had no inputs in calibration.*act_dynamic"):
        statistics.largest(layers[1])


@pytest.mark.parametrize("dynamic", [True, False])
def test_inputs_are_rounded_as_the_formula_says(pair: nn.ModuleDict, dynamic: bool) -> None:
    layers = list(find_layers(pair, "m"))
    x = torch.randn(3, 5, 8)
    ranges = {"m.a": torch.tensor(1.5), "m.b": torch.tensor(0.7)}
    chosen = [(layer, INT) for layer in layers]
    with rounded_inputs(chosen, config(dynamic), None if dynamic else ranges):
        found = run_pair(pair, x)

    def rounded(values: Tensor, name: str) -> Tensor:
        amax = values.abs().amax(-1, keepdim=True) if dynamic else ranges[name]
        return int8(values, amax / 127)

    inside = pair["a"](rounded(x, "m.a")).tanh()
    torch.testing.assert_close(found, pair["b"](rounded(inside, "m.b")))
    assert not torch.allclose(found, run_pair(pair, x))


def test_layers_in_fp8_get_inputs_in_fp8(pair: nn.ModuleDict) -> None:
    layers = list(find_layers(pair, "m"))
    x = torch.randn(4, 8)
    with rounded_inputs([(layers[0], FP8)], config(True)):
        found = pair["a"](x)
    scale = x.abs().amax(-1, keepdim=True) / 448
    expected = pair["a"]((x / scale).to(torch.float8_e4m3fn).float() * scale)
    torch.testing.assert_close(found, expected)
    assert not torch.equal(found, pair["a"](x))


def test_nothing_is_done_to_16_bits_or_to_other_weights(pair: nn.ModuleDict) -> None:
    layers = list(find_layers(pair, "m"))
    x = torch.randn(4, 8)
    with rounded_inputs([(layers[0], INT)], QuantizationConfig()):
        assert torch.equal(pair["a"](x), F.linear(x, pair["a"].weight, pair["a"].bias))
    other = nn.Linear(8, 6)
    weight = pair["a"].weight
    expected, float_product = other(x), x @ weight.t()
    rounded = int8(x, x.abs().amax(-1, keepdim=True) / 127)
    with rounded_inputs([(layers[0], INT)], config(True)):
        assert torch.equal(other(x), expected)
        products = F.linear(weight=weight, input=x), x @ weight.t(), torch.matmul(x, weight.t())
    for product in products:
        assert not torch.equal(product, float_product)
        torch.testing.assert_close(product, rounded @ weight.t())


def experts_of(model: Any) -> tuple[nn.Module, list[Layer]]:
    experts = model.model.layers[0].mlp.experts
    return experts, list(find_layers(experts, "experts"))


def routed(experts: nn.Module, model: Any) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    hidden = torch.randn(10, 64, generator=generator)
    chosen = torch.tensor([[0, 2], [0, 1]] * 5)
    with torch.no_grad():
        return experts(hidden, chosen, torch.full((10, 2), 0.5))


@pytest.mark.parametrize("dynamic", [True, False])
@pytest.mark.parametrize("how", ["grouped_mm", "eager"])
def test_inputs_of_experts_are_seen_however_they_multiply(
    how: str, dynamic: bool, random_model: Callable[..., Any]
) -> None:
    model = random_model("mixtral")
    experts, layers = experts_of(model)
    model.config._experts_implementation = how
    assert [layer.name for layer in layers] == ["experts.gate_up_proj", "experts.down_proj"]
    statistics = InputStatistics(layers)
    with statistics.watching():
        routed(experts, model)
    ranges = {layer.name: statistics.largest(layer) for layer in layers}
    hidden = torch.randn(10, 64, generator=torch.Generator().manual_seed(2))
    assert statistics.largest(layers[0]) == hidden.abs().max()
    # Each row went to two experts.
    torch.testing.assert_close(statistics.importance(layers[0], 64), hidden.square().mean(0))
    chosen = [(layer, INT) for layer in layers]
    with rounded_inputs(chosen, config(dynamic), None if dynamic else ranges):
        found = routed(experts, model)
    expected = torch.zeros_like(found)
    for row, picks in enumerate([[0, 2], [0, 1]] * 5):
        for expert in picks:
            x = hidden[row]
            x = int8(x, (x.abs().max() if dynamic else ranges[layers[0].name]) / 127)
            gate, up = (experts.gate_up_proj[expert] @ x).detach().chunk(2)
            inside = F.silu(gate) * up
            inside = int8(inside, (inside.abs().max() if dynamic else ranges[layers[1].name]) / 127)
            expected[row] += 0.5 * (experts.down_proj[expert] @ inside).detach()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(found, routed(experts, model), rtol=1e-4, atol=1e-5)


def test_experts_whose_inputs_cannot_be_told_are_refused(random_model: Callable[..., Any]) -> None:
    model = random_model("mixtral")
    experts, layers = experts_of(model)
    model.config._experts_implementation = "batched_mm"
    with (
        pytest.raises(QuantizationError, match=r"experts\.gate_up_proj multiplies by copies"),
        InputStatistics(layers).watching(),
    ):
        routed(experts, model)
