"""The contract's names, the models' shapes, and checkpoints that go round."""

import json
import os
from dataclasses import dataclass

import pytest
import torch
from bitcore.config import BitQuantConfig
from bitcore.exceptions import BitLabError
from bitlayers import BitLinear
from bitmodels import (
    MODEL_REGISTRY,
    AutoBitModel,
    BitCNN,
    BitCNNConfig,
    BitMLP,
    BitModelBase,
    BitTransformerConfig,
    ModelConfig,
    register_model,
)
from bitmodels.exceptions import CheckpointError, ModelNotFoundError, QuantizationError
from bitmodels.formats import native
from bitmodels.mlp import BitMLPConfig, BitMLPModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

SMALL_LM = BitTransformerConfig(
    vocab_size=50,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
)
MODELS = {
    "mlp": (BitMLPConfig(3, 20, 16, 5, 0.1), lambda: torch.randn(4, 20), (4, 5)),
    "cnn": (BitCNNConfig(2, 7, (8, 12)), lambda: torch.randn(3, 2, 9, 8), (3, 7)),
    "lm": (SMALL_LM, lambda: torch.randint(50, (2, 11)), (2, 11, 50)),
}


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@dataclass(frozen=True)
class OwnConfig(ModelConfig):
    size: int = 6


@pytest.fixture
def own_model():
    @register_model("OwnModel")
    class OwnModel(BitModelBase):
        config_class = OwnConfig

        def __init__(self, config, quant_config=None):
            super().__init__(config, quant_config)
            self.first = BitLinear(config.size, config.size, quant_config=self.quant_config)
            self.second = self.first
            self.register_buffer("steps", torch.arange(config.size), persistent=False)
            self.scale = nn.Parameter(torch.ones(1))

        def forward(self, x):
            return self.second(self.first(x)) * self.scale + self.steps

    yield OwnModel
    del MODEL_REGISTRY["OwnModel"]


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("deployed", [False, True])
def test_models_go_through_their_checkpoints(kind, deployed, tmp_path):
    config, inputs, shape = MODELS[kind]
    x = inputs()
    model = AutoBitModel.from_config(config).eval()
    assert model.get_config() is config
    assert model.get_quant_config() is None
    if deployed:
        assert model.deploy() is model
    with torch.no_grad():
        expected = model(x)
        assert expected.shape == shape
        model.save_pretrained(tmp_path / "a" / "b")
        for loaded in (
            AutoBitModel.from_pretrained(tmp_path / "a" / "b"),
            type(model).from_pretrained(str(tmp_path / "a" / "b")),
        ):
            assert type(loaded) is type(model)
            assert loaded.config == config
            assert (loaded.is_deployed, loaded.training) == (deployed, False)
            assert torch.equal(loaded(x), expected)
    assert sorted(path.name for path in (tmp_path / "a" / "b").iterdir()) == [
        "config.json",
        "model.safetensors",
    ]


@pytest.mark.parametrize("kind", MODELS)
def test_models_train_and_deployment_changes_little(kind):
    config, inputs, shape = MODELS[kind]
    x, targets = inputs(), torch.randint(shape[-1], shape[:-1])
    model = AutoBitModel.from_config(config)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    losses = []
    for _ in range(60):
        loss = nn.functional.cross_entropy(model(x).flatten(0, -2), targets.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.6 * losses[0]
    with torch.no_grad():
        before = model.eval()(x)
        torch.testing.assert_close(model.deploy()(x), before)


def test_the_example_of_the_reference():
    config = BitMLPConfig(n_layers=3, in_channels=256, hidden_dim=128, out_channels=10, dropout=0.1)
    quant_config = BitQuantConfig(
        activation_dtype="int8", activation_granularity="per_tensor", weight_granularity="per_tensor"
    )
    model = BitMLPModel(config, quant_config)
    assert model(torch.randn(32, 256)).shape == (32, 10)
    assert model.get_quant_config() == quant_config.to_dict()
    assert all(layer.quant_config == quant_config for layer in model.layers)
    assert BitMLP is BitMLPModel is MODEL_REGISTRY["BitMLPModel"]
    assert [tuple(layer.weight.shape) for layer in model.layers] == [(128, 256), (128, 128), (10, 128)]
    assert BitMLPConfig(n_layers=3, hidden_dim=128, dropout=0.1).out_channels == 10
    assert len(BitMLPModel(BitMLPConfig(n_layers=1)).layers) == 1
    model = BitMLPModel(config, {"weight_granularity": "per_channel"})
    assert model.quant_config == BitQuantConfig("per_channel")
    assert model.get_quant_config()["weight_granularity"] == "per_channel"


def test_a_deployed_model_that_is_asked_to_train_stays_as_it_was():
    model = BitMLPModel(BitMLPConfig(2, 8, 8, 4, dropout=0.5)).deploy()
    with pytest.raises(QuantizationError, match="is deployed"):
        model.train()
    assert not any(part.training for part in model.modules())
    assert model.eval() is model


@pytest.mark.parametrize("kind", MODELS)
def test_batches_of_nothing(kind):
    config, inputs, shape = MODELS[kind]
    model, x = AutoBitModel.from_config(config).eval(), inputs()[:0]
    for form in (model, model.deploy()):
        assert form(x).shape == (0, *shape[1:])


def test_inputs_and_configurations_of_the_wrong_kind():
    with pytest.raises(QuantizationError, match=r"floating inputs, but was given torch\.int64"):
        BitMLPModel(BitMLPConfig(2, 8, 8, 4))(torch.ones(2, 8, dtype=torch.int64))
    with pytest.raises(QuantizationError, match="not 'int8'"):
        BitMLPModel(BitMLPConfig(2, 8, 8, 4), "int8")


def test_the_base_asks_for_forward():
    class Half(BitModelBase):
        pass

    with pytest.raises(TypeError, match="forward"):
        Half({})


def test_own_models_with_shared_layers_and_other_buffers(own_model, tmp_path):
    model = AutoBitModel.from_config(OwnConfig(4), BitQuantConfig("per_channel")).eval()
    assert type(model) is own_model
    x = torch.randn(2, 4)
    for form in (model, model.deploy()):
        with torch.no_grad():
            form.save_pretrained(tmp_path)
            loaded = AutoBitModel.from_pretrained(tmp_path)
            assert torch.equal(loaded(x), model(x))
            assert loaded.first is loaded.second
    assert loaded.get_quant_config() == model.get_quant_config()


def test_names_that_are_unknown():
    with pytest.raises(ModelNotFoundError, match=r"no model 'BitMLPmodel'.*did you mean BitMLPModel\?"):
        MODEL_REGISTRY["BitMLPmodel"]
    with pytest.raises(BitLabError, match=r"takes a dict; there are .*BitMLPConfig \(BitMLPModel\)"):
        AutoBitModel.from_config({})
    with pytest.raises(TypeError, match="is no BitModelBase"):
        register_model("Linear")(nn.Linear)
    with pytest.raises(TypeError, match="from_config"):
        AutoBitModel()
    with pytest.raises(QuantizationError, match=r"no 'hiden_dim'.*did you mean hidden_dim\?"):
        BitMLPConfig.from_dict({"hiden_dim": 3})
    with pytest.raises(QuantizationError, match="vocab_size"):
        BitTransformerConfig.from_dict({})


@pytest.mark.parametrize(
    ("config", "values", "message"),
    [
        (BitMLPConfig, {"n_layers": 0}, "n_layers is 0"),
        (BitMLPConfig, {"dropout": 1.0}, "dropout is 1.0"),
        (BitMLPConfig, {"in_channels": 2.5}, "in_channels is 2.5"),
        (BitCNNConfig, {"channels": ()}, "channels"),
        (BitCNNConfig, {"channels": (3, 0)}, "channels"),
        (BitCNNConfig, {"kernel_size": 4}, "must be odd"),
        (BitTransformerConfig, {"vocab_size": 0}, "vocab_size is 0"),
        (BitTransformerConfig, {"vocab_size": 9, "num_attention_heads": 7}, "7 heads do not divide"),
        (BitTransformerConfig, {"vocab_size": 9, "head_dim": 3}, "3 dimensions"),
        (BitTransformerConfig, {"vocab_size": 9, "num_key_value_heads": 3}, "must divide"),
        (BitTransformerConfig, {"vocab_size": 9, "hidden_act": "gelu"}, "relu2, silu"),
        (BitTransformerConfig, {"vocab_size": 9, "rope_theta": 0.0}, "rope_theta is 0.0"),
    ],
)
def test_configurations_that_are_refused(config, values, message):
    with pytest.raises(QuantizationError, match=message):
        config(**values)


def test_what_cannot_be_saved(tmp_path):
    class Unregistered(BitMLPModel):
        pass

    with pytest.raises(CheckpointError, match="register_model"):
        Unregistered(BitMLPConfig()).save_pretrained(tmp_path)
    model = BitMLPModel(BitMLPConfig())
    model.layers[0].deploy()
    with pytest.raises(CheckpointError, match="some layers are deployed"):
        model.save_pretrained(tmp_path)
    model.config = {"n_layers": 3}
    with pytest.raises(CheckpointError, match="is a dict"):
        model.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())


def damage(folder, name, change):
    path = folder / name
    if name == "config.json":
        values = json.loads(path.read_text())
        change(values)
        path.write_text(json.dumps(values))
        return
    tensors = load_file(path)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    change(tensors)
    save_file(tensors, path, metadata)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("config.json", lambda v: v.update(format="other"), "not of a bitmodels checkpoint"),
        ("config.json", lambda v: v.update(format_version=2), "format version 2"),
        ("config.json", lambda v: v.update(model="Nothing"), "no model 'Nothing'"),
        ("config.json", lambda v: v.update(model="BitCNN"), "not of one checkpoint|config"),
        ("config.json", lambda v: v["config"].update(hidden_dim=0), "hidden_dim is 0"),
        ("config.json", lambda v: v.update(config=[1]), "config.json"),
        ("config.json", lambda v: v.update(quant_config={"a": 1}), "'a'"),
        ("config.json", lambda v: v["config"].update(hidden_dim=32), "not of one checkpoint"),
        ("model.safetensors", lambda t: t.pop("layers.0.weight"), r"does not fit.*layers\.0\.weight"),
        ("model.safetensors", lambda t: t.update(extra=torch.ones(1)), "does not fit.*extra"),
        ("model.safetensors", lambda t: t.update({"layers.0.weight": torch.ones(2, 2)}), r"shape \[2, 2\]"),
    ],
)
def test_damaged_checkpoints_are_named(name, change, message, tmp_path):
    BitMLPModel(BitMLPConfig(2, 8, 8, 4)).save_pretrained(tmp_path)
    damage(tmp_path, name, change)
    with pytest.raises(BitLabError, match=message):
        AutoBitModel.from_pretrained(tmp_path)


def test_files_that_are_missing_cut_or_hostile(tmp_path):
    with pytest.raises(CheckpointError, match=r"config\.json does not exist"):
        AutoBitModel.from_pretrained(tmp_path)
    BitMLPModel(BitMLPConfig(2, 8, 8, 4)).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="holds a BitMLPModel, not a BitCNN"):
        BitCNN.from_pretrained(tmp_path)
    weights = (tmp_path / "model.safetensors").read_bytes()
    for bad in (weights[:-5], weights[:20], b"", b"\xff" * 64):
        (tmp_path / "model.safetensors").write_bytes(bad)
        with pytest.raises(CheckpointError, match=r"model\.safetensors is damaged"):
            AutoBitModel.from_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="does not exist"):
        AutoBitModel.from_pretrained(tmp_path)
    for bad in ("", "[]", "[" * 100000, "{", "nul"):
        (tmp_path / "config.json").write_text(bad)
        with pytest.raises(CheckpointError):
            AutoBitModel.from_pretrained(tmp_path)


def test_a_checkpoint_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    old = BitMLPModel(BitMLPConfig(2, 8, 8, 4)).eval()
    old.save_pretrained(tmp_path)
    real = native.write_json

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pathlib.Path.replace", full)
    with pytest.raises(OSError, match="No space"):
        BitMLPModel(BitMLPConfig(2, 8, 8, 4)).save_pretrained(tmp_path)
    monkeypatch.undo()
    x = torch.randn(1, 8)
    assert torch.equal(AutoBitModel.from_pretrained(tmp_path)(x), old(x))
    assert len(list(tmp_path.iterdir())) == 2
    # Between its two files: what is left is not taken for a checkpoint.
    monkeypatch.setattr(native, "write_json", full)
    with pytest.raises(OSError, match="No space"):
        BitMLPModel(BitMLPConfig(3, 8, 8, 4)).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="not of one checkpoint"):
        AutoBitModel.from_pretrained(tmp_path)
    monkeypatch.setattr(native, "write_json", real)
    BitMLPModel(BitMLPConfig(3, 8, 8, 4)).save_pretrained(tmp_path)
    assert len(AutoBitModel.from_pretrained(tmp_path).layers) == 3


def test_files_have_the_modes_that_the_user_wants(tmp_path):
    mask = os.umask(0o027)
    try:
        BitMLPModel(BitMLPConfig(2, 8, 8, 4)).save_pretrained(tmp_path / "c")
    finally:
        os.umask(mask)
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "c").iterdir()} == {0o640}


def test_deployed_checkpoints_take_two_bits_a_weight(tmp_path):
    model = BitMLPModel(BitMLPConfig(4, 512, 512, 512, norm=False)).deploy()
    model.save_pretrained(tmp_path)
    biases = 4 * 512 * 4
    stored = (tmp_path / "model.safetensors").stat().st_size - biases
    assert stored * 8 / (4 * 512 * 512) <= 2.1
    assert model.memory_usage()["bits_per_ternary_weight"] <= 2.1
