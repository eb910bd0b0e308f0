"""Which layers and blocks are found in models, and weights as matrices."""

import pytest
import torch
from auto_round.exceptions import QuantizationError
from auto_round.quantization._layers import Layer, find_blocks, find_layers
from torch import nn
from transformers.pytorch_utils import Conv1D


class TinyExperts(nn.Module):
    def __init__(self, transposed: bool) -> None:
        super().__init__()
        self.is_transposed = transposed
        self.up = nn.Parameter(torch.randn(3, 4, 6))
        self.bias = nn.Parameter(torch.randn(3, 4))


class Router(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 6))


def block() -> nn.Module:
    parts: dict[str, nn.Module] = {
        "q": nn.Linear(6, 4),
        "c": Conv1D(4, 6),
        "router": Router(),
        "experts": TinyExperts(True),
        "norm": nn.LayerNorm(6),
        "table": nn.Embedding(5, 6),
    }
    return nn.ModuleDict(parts)


def test_linear_conv1d_and_experts_are_layers_and_nothing_else_is():
    layers = list(find_layers(block(), "model.blocks.0"))
    assert [(layer.name, layer.parameter_name, layer.transposed) for layer in layers] == [
        ("model.blocks.0.q", "model.blocks.0.q.weight", False),
        ("model.blocks.0.c", "model.blocks.0.c.weight", True),
        ("model.blocks.0.experts.up", "model.blocks.0.experts.up", True),
    ]


@pytest.mark.parametrize("transposed", [True, False])
def test_a_matrix_has_the_inputs_of_one_output_in_each_row(transposed):
    experts = TinyExperts(transposed)
    layer = next(find_layers(experts, "experts"))
    matrix = layer.matrix(experts.up)
    wanted = [expert.t() if transposed else expert for expert in experts.up]
    assert torch.equal(matrix, torch.cat(wanted))
    conv = Conv1D(4, 6)
    x = torch.randn(2, 6)
    (found,) = find_layers(nn.ModuleDict({"c": conv}))
    torch.testing.assert_close(x @ found.matrix(conv.weight).t() + conv.bias, conv(x))


@pytest.mark.parametrize("kind", ["linear", "conv1d", "experts", "transposed experts"])
def test_what_is_written_to_an_open_weight_stays(kind):
    if kind == "linear":
        layer = Layer(name="a", module=nn.Linear(6, 4), attribute="weight", transposed=False)
    elif kind == "conv1d":
        layer = Layer(name="a", module=Conv1D(4, 6), attribute="weight", transposed=True)
    else:
        transposed = kind == "transposed experts"
        layer = Layer(name="a.up", module=TinyExperts(transposed), attribute="up", transposed=transposed)
    before = layer.matrix(layer.weight.data).clone()
    with layer.open(layer.weight.data) as matrix:
        assert torch.equal(matrix, before)
        matrix.copy_(2 * before + 1)
    assert torch.equal(layer.matrix(layer.weight.data), 2 * before + 1)


def test_the_outermost_list_that_holds_most_is_the_one_of_the_blocks():
    def list_of(count: int, width: int) -> nn.ModuleList:
        return nn.ModuleList(nn.Sequential(nn.Linear(width, width)) for _ in range(count))

    class Inner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.heads = list_of(5, 8)
            self.own = nn.Linear(8, 8)

    model = nn.Module()
    model.small = list_of(3, 2)
    model.mixed = nn.ModuleList([nn.Linear(64, 64), nn.Sequential(nn.Linear(64, 64))])
    model.norms = nn.ModuleList(nn.LayerNorm(4096) for _ in range(4))
    model.large = nn.ModuleList(Inner() for _ in range(2))
    name, blocks = find_blocks(nn.ModuleDict({"net": model}))
    assert name == "net.large"
    assert blocks is model.large


@pytest.mark.parametrize(
    "model",
    [
        nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)),
        nn.ModuleDict({"a": nn.ModuleList([])}),
        nn.ModuleDict({"a": nn.ModuleList([nn.LayerNorm(2)])}),
    ],
)
def test_a_model_without_repeated_blocks_is_named(model):
    with pytest.raises(QuantizationError, match=f"{type(model).__name__} has no list of repeated blocks"):
        find_blocks(model)
