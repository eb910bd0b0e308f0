"""Conversion, training of what was converted, analysis and comparison."""

import copy
import math

import pytest
import torch
from bitcore.config import BitQuantConfig
from bitlayers import BitConv2d, BitEmbedding, BitLinear, SubLN
from bitlayers.utils import deploy_layers, ternary_layers
from bitmodels import BitCNN, BitCNNConfig, BitMLPConfig, BitMLPModel, BitTransformerConfig, BitTransformerLM
from bitmodels.exceptions import QuantizationError
from bitmodels.utils import (
    ConversionWarning,
    analyze_model,
    compare_models,
    convert_pytorch_model,
    finetune,
    replace_linear_layers,
)
from sklearn.datasets import load_digits
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


class Original(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(784, 256), nn.ReLU(), nn.Linear(256, 10))

    def forward(self, x):
        return self.layers(x)


def convert(model, *arguments, **given):
    with pytest.warns(ConversionWarning, match="costs accuracy"):
        return convert_pytorch_model(model, *arguments, **given)


def test_the_example_of_the_reference():
    original = Original()
    converted = convert(original, quant_config=BitQuantConfig())
    assert isinstance(converted, Original)
    assert isinstance(original.layers[0], nn.Linear)
    assert [type(part).__name__ for part in converted.layers] == ["BitLinear", "ReLU", "BitLinear"]
    assert torch.equal(converted.layers[0].weight, original.layers[0].weight)
    assert converted.layers[0].weight is not original.layers[0].weight
    analysis = analyze_model(converted)
    assert analysis["total_params"] == 784 * 256 + 256 + 256 * 10 + 10
    assert analysis["quantized_params"] == 784 * 256 + 256 * 10
    # Codes of 256 x 784 and 16 x 256 (10 rows are padded), and a scale and a bias for each of 266 rows.
    deployed = 256 * 784 // 4 + 16 * 256 // 4 + 266 * 8
    assert analysis["memory_reduction"] == pytest.approx(1 - deployed / (analysis["total_params"] * 4))
    comparison = compare_models(original, converted)
    assert comparison["memory_reduction"] == pytest.approx(analysis["memory_reduction"])
    assert 0 <= comparison["accuracy_diff"] <= 1
    assert comparison["speedup"] > 0
    assert "agreement, not accuracy" in comparison["accuracy_basis"]
    assert "drawn at random" in comparison["accuracy_basis"]


def test_layers_are_replaced_in_place_with_their_parameters():
    model = nn.Sequential(nn.Linear(6, 5), nn.Sequential(nn.Linear(5, 4, bias=False), nn.LayerNorm(4)))
    parameters = dict(model.named_parameters())
    model.eval()
    assert (
        replace_linear_layers(model, layer_class=BitLinear, quant_config=BitQuantConfig("per_channel"))
        is model
    )
    assert [type(part) for part in model.modules() if not list(part.children())] == [
        BitLinear,
        BitLinear,
        nn.LayerNorm,
    ]
    assert all(parameters[name] is parameter for name, parameter in model.named_parameters())
    assert model[0].quant_config == BitQuantConfig("per_channel")
    assert not model[0].training
    assert model[1][0].bias is None
    assert type(replace_linear_layers(nn.Linear(3, 3))) is BitLinear

    class Own(BitLinear):
        pass

    assert type(replace_linear_layers(nn.Sequential(nn.Linear(3, 3)), Own)[0]) is Own


def test_norms_convolutions_and_embeddings_when_asked_for():
    model = nn.ModuleDict(
        {
            "embedding": nn.Embedding(9, 4, padding_idx=2),
            "conv": nn.Conv2d(4, 6, (3, 1), (2, 1), (1, 0), groups=2, bias=False, padding_mode="reflect"),
            "same": nn.Conv2d(4, 6, 3, padding="same"),
            "head": nn.Linear(6, 3),
        }
    )
    plain = convert(model)
    assert [type(part) for part in plain.values()] == [nn.Embedding, nn.Conv2d, nn.Conv2d, BitLinear]
    full = convert(model, convolutions=True, embeddings=True, norm=True)
    assert [type(part) for part in full.values()] == [BitEmbedding, BitConv2d, BitConv2d, BitLinear]
    assert full["embedding"].padding_idx == 2
    assert isinstance(full["head"].norm, SubLN)
    x = torch.randn(2, 4, 8, 8)
    for name in ("conv", "same"):
        assert full[name](x).shape == model[name](x).shape
        with torch.no_grad():
            error = (full[name](x) - model[name](x)).norm() / model[name](x).norm()
        assert error < 0.9


def test_layers_that_stay():
    class Other(nn.Linear):
        def forward(self, x):
            return -super().forward(x)

    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = nn.Embedding(7, 6)
            self.body = nn.ModuleList([nn.Linear(6, 6), Other(6, 6), nn.Linear(6, 6)])
            self.head = nn.Linear(6, 7, bias=False)
            self.head.weight = self.embedding.weight

    model = Tied()
    replace_linear_layers(model, exclude=["body.2"])
    assert [type(part) for part in model.body] == [BitLinear, Other, nn.Linear]
    assert type(model.head) is nn.Linear
    assert model.head.weight is model.embedding.weight
    with pytest.raises(QuantizationError, match=r"Other, which subclasses=True would convert"):
        convert_pytorch_model(nn.Sequential(Other(6, 6)))
    assert type(convert(nn.Sequential(Other(6, 6)), subclasses=True)[0]) is BitLinear
    with pytest.raises(QuantizationError, match=r"'heads', which fits none of body\.2"):
        replace_linear_layers(model, exclude=["heads"])
    replace_linear_layers(model, exclude="body")
    assert type(model.body[2]) is nn.Linear
    replace_linear_layers(model, exclude=["h*"])
    assert type(model.body[2]) is BitLinear


def test_hooks_go_along():
    model, seen = nn.Sequential(nn.Linear(6, 4)), []
    handle = model[0].register_forward_hook(lambda _part, _inputs, out: seen.append(out) or -out)
    replace_linear_layers(model)
    x = torch.randn(2, 6)
    assert torch.equal(model(x), -seen[0])
    handle.remove()
    assert torch.equal(model(x), seen[0])


# Torch advises against the old form of weight_norm, which many models have.
@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning")
def test_layers_that_compute_something_else_stay():
    parametrized = torch.nn.utils.parametrizations.weight_norm(nn.Linear(6, 6))
    patched = nn.Linear(6, 6)
    patched.forward = lambda x: -x
    short = nn.Embedding(9, 6, max_norm=1.0)
    weighed = nn.Embedding(9, 6, scale_grad_by_freq=True)
    model = nn.ModuleList([parametrized, patched, short, weighed, nn.Linear(6, 6)])
    kinds = [type(part) for part in model]
    converted = convert(model, embeddings=True, subclasses=True)
    assert [type(part) for part in converted][:-1] == kinds[:-1]
    assert type(converted[-1]) is BitLinear
    normed = nn.Sequential(torch.nn.utils.weight_norm(nn.Linear(6, 6)))
    with pytest.raises(QuantizationError, match="in place with replace_linear_layers"):
        convert_pytorch_model(normed)
    assert type(replace_linear_layers(normed)[0]) is nn.Linear
    torch.nn.utils.remove_weight_norm(normed[0])
    assert type(replace_linear_layers(normed)[0]) is BitLinear


def test_weights_that_are_not_finite_are_named():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    with torch.no_grad():
        model[1].weight[0, 0] = float("nan")
    with pytest.raises(QuantizationError, match="the weight of 1 holds NaN or infinity"):
        convert_pytorch_model(model)
    ternary = replace_linear_layers(copy.deepcopy(model))
    batches = [(torch.randn(2, 4), torch.tensor([0, 1]))]
    for use in (analyze_model, lambda m: compare_models(model, m), lambda m: finetune(m, batches)):
        with pytest.raises(QuantizationError, match="the weight of 1 holds NaN or infinity"):
            use(ternary)


@pytest.mark.parametrize("kind", [nn.Linear, BitConv2d, None, "BitLinear"])
def test_classes_that_are_no_ternary_layer(kind):
    model = nn.Sequential(nn.Linear(4, 4))
    with pytest.raises(QuantizationError, match="it must be BitLinear or a subclass"):
        replace_linear_layers(model, layer_class=kind)
    assert type(model[0]) is nn.Linear


def test_a_layer_in_two_places_stays_one():
    shared = nn.Linear(4, 4)
    model = nn.Sequential(shared, nn.ReLU(), shared)
    replace_linear_layers(model)
    assert type(model[0]) is BitLinear
    assert model[0] is model[2]


@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True")
@pytest.mark.parametrize("deployed", [False, True])
def test_torchs_own_transformers_are_converted_too(deployed):
    """Their short cut in evaluation would take the float weights of the layers past their forward."""
    layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True, dropout=0.0)
    model = nn.TransformerEncoder(layer, 2)
    converted = convert(model)
    x = torch.randn(2, 5, 16)
    rounded = converted(x).detach()
    assert type(converted.layers[0].self_attn.out_proj) is not BitLinear
    converted.eval()
    if deployed:
        deploy_layers(converted)
    with torch.no_grad():
        torch.testing.assert_close(converted(x), rounded, rtol=1e-4, atol=1e-4)
        assert not torch.allclose(model.eval()(x), rounded, atol=1e-2)


def test_there_must_be_something_to_convert():
    with pytest.raises(QuantizationError, match=r"no torch\.nn\.Linear"):
        convert_pytorch_model(nn.Sequential(nn.ReLU()))


def test_analysis_counts_what_is_there():
    model = BitMLPModel(BitMLPConfig(2, 32, 16, 8, norm=True))
    with torch.no_grad():
        model.layers[1].weight.zero_()
    before = analyze_model(model)
    assert before["total_params"] == sum(p.numel() for p in model.parameters())
    assert before["quantized_share"] == before["quantized_params"] / before["total_params"]
    assert [layer["name"] for layer in before["layers"]] == ["layers.0", "layers.1"]
    codes = model.layers[0].ternary_weight()[1]
    assert before["layers"][0]["zeros"] == pytest.approx((codes == 0).float().mean().item())
    assert before["layers"][1]["zeros"] == 1
    assert not before["is_deployed"]
    after = analyze_model(model.deploy())
    assert after["is_deployed"]
    assert after["total_bytes"] == after["deployed_bytes"] == before["deployed_bytes"]
    assert after["total_params"] == before["total_params"]
    plain = analyze_model(nn.Linear(3, 3))
    assert (plain["quantized_params"], plain["memory_reduction"], plain["layers"]) == (0, 0, [])
    with torch.device("meta"):
        assert analyze_model(BitMLPModel(BitMLPConfig()))["layers"][0]["zeros"] is None


class Fixed(nn.Module):
    """Gives the outputs it was made with."""

    def __init__(self, outputs):
        super().__init__()
        self.outputs = nn.Parameter(torch.as_tensor(outputs))

    def forward(self, x):
        return self.outputs[x]


def test_accuracy_by_hand():
    first = Fixed([[9.0, 0, 0], [0, 9, 0], [0, 0, 9], [9, 0, 0]])
    second = Fixed([[9.0, 0, 0], [9, 0, 0], [9, 0, 0], [0, 9, 0]])
    x = torch.arange(4)
    labels = torch.tensor([0, 1, 2, 1])
    found = compare_models(first, second, [(x[:3], labels[:3]), (x[3:], labels[3:])], rounds=1)
    assert (found["accuracy_original"], found["accuracy_quantized"]) == (3 / 4, 2 / 4)
    assert found["accuracy_diff"] == 1 / 4
    assert found["accuracy_basis"] == "accuracy on 4 labels"
    assert found["agreement"] == 1 / 4
    some = torch.tensor([0, -100, 2, -100])
    found = compare_models(first, second, [{"x": x, "labels": some}], rounds=1)
    assert (found["accuracy_original"], found["accuracy_quantized"]) == (1, 1 / 2)
    found = compare_models(first, second, x, rounds=1)
    assert found["accuracy_diff"] == 3 / 4
    assert found["accuracy_original"] is None
    assert "the inputs given, which have no labels" in found["accuracy_basis"]


def test_numbers_and_signs_by_hand():
    first, second = Fixed([[1.0], [2.0], [3.0], [4.0]]), Fixed([[2.0], [2.0], [-1.0], [4.0]])
    x, targets = torch.arange(4), torch.tensor([[1.0], [2.0], [3.0], [5.0]])
    found = compare_models(first, second, [(x, targets)], rounds=1)
    # The targets' variance is 8.75 in all; the errors are 1, and 1 + 16 + 1.
    assert found["accuracy_original"] == pytest.approx(1 - 1 / 8.75)
    assert found["accuracy_diff"] == pytest.approx(17 / 8.75)
    assert found["accuracy_basis"].startswith("coefficient of determination of 4")
    found = compare_models(first, second, [x], rounds=1)
    assert found["accuracy_diff"] == 1 / 4
    assert "whose sign differs" in found["accuracy_basis"]


def test_models_of_every_kind_are_compared_without_data():
    config = BitTransformerConfig(
        vocab_size=20, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2
    )
    for model in (BitCNN(BitCNNConfig(3)), BitTransformerLM(config)):
        twin = copy.deepcopy(model).deploy()
        model.train()
        found = compare_models(model.eval(), twin, rounds=1)
        assert found["accuracy_diff"] < 0.05
        assert found["quantized_bytes"] == analyze_model(twin)["total_bytes"]


def test_what_cannot_be_compared():
    model = nn.Sequential(nn.Linear(4, 3))
    with pytest.raises(QuantizationError, match="no batches"):
        compare_models(model, model, [])
    with pytest.raises(QuantizationError, match="shapes"):
        compare_models(model, nn.Linear(4, 2), torch.randn(2, 4))
    with pytest.raises(QuantizationError, match="give data"):
        compare_models(nn.ReLU(), nn.ReLU())
    with pytest.raises(QuantizationError, match="give data"):
        compare_models(nn.Bilinear(2, 2, 2), nn.Sequential(nn.Linear(5, 2), nn.Linear(3, 1)))
    with pytest.raises(QuantizationError, match="name no classes"):
        compare_models(model, model, [(torch.randn(2, 4), torch.zeros(3, dtype=torch.int64))])
    with pytest.raises(QuantizationError, match="do not fit"):
        compare_models(model, model, [(torch.randn(2, 4), torch.zeros(2, 4))])
    with pytest.raises(QuantizationError, match="a batch is"):
        compare_models(model, model, ["text"])


@pytest.fixture(scope="module")
def digits():
    found = load_digits()
    x = torch.tensor(found.data, dtype=torch.float32) / 16
    y = torch.tensor(found.target)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    return x[order[:1400]], y[order[:1400]], x[order[1400:]], y[order[1400:]]


def batches(x, y, size=64):
    return list(zip(x.split(size), y.split(size), strict=True))


def accuracy(model, x, y):
    with torch.no_grad():
        return (model.eval()(x).argmax(-1) == y).float().mean().item()


def test_finetuning_makes_up_for_conversion(digits):
    x, y, held_x, held_y = digits
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    for _ in range(20):
        for some, labels in batches(x, y):
            loss = nn.functional.cross_entropy(model(some), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    floats = accuracy(model, held_x, held_y)
    assert floats > 0.95
    converted = convert(model, BitQuantConfig("per_channel"))
    rounded = accuracy(converted, held_x, held_y)
    assert rounded < floats - 0.03
    history = finetune(
        converted, batches(x, y), epochs=15, learning_rate=3e-3, teacher=model, show_progress=False
    )
    trained = accuracy(converted, held_x, held_y)
    assert trained > floats - 0.02
    assert len(history["loss"]) == 15 * 22
    assert history["strength"][0] == 0
    assert history["strength"][165] == 1
    assert all(a <= b for a, b in zip(history["strength"], history["strength"][1:], strict=False))
    assert all(layer.strength == 1 for layer in ternary_layers(converted).values())
    assert accuracy(deploy_layers(converted), held_x, held_y) == trained
    found = compare_models(model, converted, [(held_x, held_y)], rounds=1)
    assert found["accuracy_diff"] == pytest.approx(floats - trained, abs=1e-6)


def test_the_teachers_part_by_hand():
    model, teacher = BitMLPModel(BitMLPConfig(1, 6, 6, 3)), nn.Linear(6, 3)
    x = torch.randn(4, 6)
    # A step with no learning rate: the loss is that of the models as they are.
    history = finetune(
        model, [x], teacher=teacher, temperature=3.0, warmup=0, learning_rate=0.0, show_progress=False
    )
    wanted, found = (teacher(x) / 3).softmax(-1), (model(x) / 3).log_softmax(-1)
    expected = 9 * (wanted * (wanted.log() - found)).sum(-1).mean()
    assert history["loss"] == [pytest.approx(expected.item(), rel=1e-4)]
    assert history["strength"] == [1]
    assert not teacher.weight.grad


def test_the_schedule_and_the_users_optimizer():
    model = BitMLPModel(BitMLPConfig(1, 4, 4, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    history = finetune(
        model, [(torch.randn(3, 4), torch.randn(3, 2))], steps=100, optimizer=optimizer, show_progress=False
    )
    rates = history["learning_rate"]
    assert len(rates) == 100
    assert rates[0] == pytest.approx(0.1)
    assert max(rates) == pytest.approx(0.5)
    assert rates[-1] == pytest.approx(0.05, abs=0.001)
    assert optimizer.param_groups[0]["lr"] == 0.5
    assert history["loss"][-1] < history["loss"][0]


def test_interruption_leaves_full_rounding():
    model = BitMLPModel(BitMLPConfig(1, 4, 4, 2))

    def data():
        yield torch.randn(3, 4), torch.randint(2, (3,))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        finetune(model, data(), steps=10, show_progress=False)
    assert model.layers[0].strength == 1


def test_loaders_without_a_length_and_some_parameters_alone():
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            for _ in range(4):
                yield torch.randn(4), torch.tensor(1)

    model = nn.Sequential(BitLinear(4, 4), BitLinear(4, 2))
    loader = torch.utils.data.DataLoader(Stream(), batch_size=2)
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.SGD(model[1].parameters(), 0.1)
    history = finetune(model, loader, steps=3, optimizer=optimizer, max_grad_norm=1e9, show_progress=False)
    assert len(history["loss"]) == 3
    assert torch.equal(model[0].weight, before["0.weight"])
    assert not torch.equal(model[1].weight, before["1.weight"])
    assert model[0].weight.grad is None


def test_labels_that_a_model_shifts_are_read_as_it_reads_them():
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=16, num_key_value_heads=1, **sizes))

    def batch():
        ids = (torch.randint(16, (8, 1)) + torch.arange(10)) % 16
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}

    data = [batch() for _ in range(20)]
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    for some in data * 4:
        optimizer.zero_grad()
        model(**some).loss.backward()
        optimizer.step()
    converted = convert(model, exclude=["lm_head"])
    finetune(converted, data, epochs=4, learning_rate=5e-3, teacher=model, show_progress=False)
    found = compare_models(model, converted, data, rounds=1)
    assert found["accuracy_original"] > 0.99
    assert found["accuracy_quantized"] > 0.95


def test_steps_beyond_one_pass_go_through_data_again():
    model, seen = BitMLPModel(BitMLPConfig(1, 4, 4, 2)), []

    class Data:
        def __iter__(self):
            seen.append(0)
            yield torch.randn(3, 4), torch.randint(2, (3,))

    assert len(finetune(model, Data(), steps=3, show_progress=False)["loss"]) == 3
    assert len(seen) == 3


@pytest.mark.parametrize(
    ("data", "given", "message"),
    [
        ([], {}, "no batches"),
        (iter([]), {}, "say how many steps"),
        (iter([]), {"steps": 3}, "no batches"),
        (iter([(torch.randn(2, 4), torch.zeros(2, 2))]), {"steps": 3}, "data ended after 1 of 3 steps"),
        ([1], {"epochs": 0}, "epochs is 0"),
        ([1], {"steps": 0}, "steps is 0"),
        ([1], {"warmup": 1.5}, "warmup is 1.5"),
        ([1], {"distillation": -1}, "distillation is -1"),
        ([1], {"learning_rate": math.nan}, "learning_rate is nan"),
        ([1], {"learning_rate": -1e-3}, "learning_rate is -0.001"),
        ([1], {"temperature": 0}, "temperature is 0"),
        ([1], {"max_grad_norm": 0}, "max_grad_norm is 0"),
        ([1], {}, "a batch is"),
        ([torch.randn(2, 4)], {}, "give a teacher"),
        ([(torch.randn(2, 4), torch.zeros(3, dtype=torch.int64))], {}, "classes"),
        ([(torch.randn(2, 4), torch.zeros(3, 2))], {}, "do not fit"),
        (
            [(torch.full((2, 4), math.nan), torch.zeros(2, dtype=torch.int64))],
            {},
            "the loss is nan at step 0",
        ),
        ([torch.randn(2, 4)], {"teacher": nn.Linear(4, 3)}, "teacher's outputs"),
    ],
)
def test_what_finetuning_refuses(data, given, message):
    model = BitMLPModel(BitMLPConfig(1, 4, 4, 2))
    with pytest.raises(QuantizationError, match=message):
        finetune(model, data, show_progress=False, **given)


def test_only_layers_with_float_weights_are_trained():
    batch = [(torch.randn(2, 4), torch.zeros(2, dtype=torch.int64))]
    with pytest.raises(QuantizationError, match="none"):
        finetune(nn.Linear(4, 2), batch)
    with pytest.raises(QuantizationError, match="deployed"):
        finetune(BitMLPModel(BitMLPConfig(1, 4, 4, 2)).deploy(), batch)
