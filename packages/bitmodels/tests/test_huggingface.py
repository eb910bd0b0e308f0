"""Checkpoints that transformers wrote are read, and what is written transformers reads: the same logits."""

import json
from dataclasses import replace

import pytest
import torch
from bitcore.config import BitQuantConfig
from bitcore.packing import hf_bitnet
from bitlayers.utils import ternary_layers
from bitmodels import BitTransformerConfig, BitTransformerLM
from bitmodels.exceptions import CheckpointError
from bitmodels.formats import huggingface
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    BitNetConfig,
    BitNetForCausalLM,
    BitNetQuantConfig,
    LlamaConfig,
    LlamaForCausalLM,
)
from transformers.integrations import bitnet

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 40,
    "initializer_range": 0.3,
}
IDS = torch.tensor([[1, 5, 9, 33, 2, 60, 7], [3, 3, 3, 8, 0, 63, 11]])


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def small(**given):
    return BitTransformerLM(BitTransformerConfig(**(SIZES | given))).eval()


def set_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def theirs(folder):
    # Their functions are compiled for each shape they see; what they compute is the same without.
    with torch.compiler.set_stance("force_eager"), torch.no_grad():
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        for part in model.modules():
            if isinstance(part, bitnet.AutoBitLinear) and part.weight.dtype == torch.uint8:
                # Releases before huggingface/transformers#46808 unpack codes as bytes and leave them so.
                part.weight = torch.nn.Parameter(part.weight.view(torch.int8).float(), requires_grad=False)
        return model(IDS).logits


def assert_close(found, expected):
    """Rounding of activations may fall on either side where sums of floats differ in their last bit."""
    assert (found - expected).norm() < 0.01 * expected.norm()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("linear_class", ["bitlinear", "autobitlinear"])
@pytest.mark.parametrize(
    "given",
    [
        {},
        {"tie_word_embeddings": False},
        {"sub_norm": False, "hidden_act": "silu", "tie_word_embeddings": False},
    ],
)
def test_transformers_computes_the_same_of_packed_weights(linear_class, given, tmp_path):
    model = small(**given).deploy()
    huggingface.save(model, tmp_path, linear_class=linear_class)
    with torch.no_grad():
        expected = model(IDS)
        assert_close(theirs(tmp_path), expected)
        loaded = huggingface.load(tmp_path)
        assert loaded.is_deployed
        torch.testing.assert_close(loaded(IDS), expected, rtol=1e-4, atol=1e-4)
    assert loaded.config == replace(model.config, head_dim=8)


@pytest.mark.filterwarnings("ignore")
def test_transformers_computes_the_same_of_float_weights(tmp_path):
    model = small()
    huggingface.save(model, tmp_path)
    with torch.no_grad():
        assert_close(theirs(tmp_path), model(IDS))
    loaded = huggingface.load(tmp_path)
    assert not loaded.is_deployed
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("linear_class", ["bitlinear", "autobitlinear"])
def test_what_transformers_made_is_read(linear_class, tmp_path):
    """Their own model, quantised and packed by their own functions, in shards."""
    config = BitNetConfig(
        **SIZES, tie_word_embeddings=True, rope_parameters={"rope_type": "default", "rope_theta": 500000.0}
    )
    source = BitNetForCausalLM(config).eval()
    source.save_pretrained(tmp_path, max_shard_size="20KB")
    assert (tmp_path / "model.safetensors.index.json").exists()
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    for shard in set(index["weight_map"].values()):
        tensors = load_file(tmp_path / shard)
        for name in [name for name in tensors if name.endswith("_proj.weight")]:
            weight = tensors[name]
            absmean = weight.abs().mean()
            codes = (weight / absmean).round().clamp(-1, 1)
            tensors[name] = bitnet.pack_weights(codes.clone())
            stored = 1 / absmean if linear_class == "bitlinear" else absmean
            tensors[f"{name}_scale"] = stored.view(1)
            index["weight_map"][f"{name}_scale"] = shard
        save_file(tensors, tmp_path / shard, {"format": "pt"})
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    quantization = BitNetQuantConfig(linear_class=linear_class, quantization_mode="offline")
    set_config(tmp_path, quantization_config=quantization.to_dict())
    model = huggingface.load(tmp_path)
    assert model.is_deployed
    assert model.config.rope_theta == 500000.0
    # By hand: their float model, whose projections round both sides.
    for part in source.modules():
        if isinstance(part, torch.nn.Linear) and part is not source.lm_head:
            part.forward = rounded_forward(part)
    with torch.no_grad():
        assert_close(model(IDS), source(IDS).logits)


def rounded_forward(layer):
    absmean = layer.weight.detach().abs().mean()
    weight = (layer.weight.detach() / absmean).round().clamp(-1, 1) * absmean

    def forward(x):
        scale = x.abs().amax(-1, keepdim=True).clamp(min=1e-5) / 127
        return ((x / scale).round() * scale) @ weight.t()

    return forward


def test_the_float_weights_of_their_model_are_read(tmp_path):
    source = BitNetForCausalLM(BitNetConfig(**SIZES)).to(torch.bfloat16)
    source.save_pretrained(tmp_path)
    model = huggingface.load(tmp_path)
    assert not model.is_deployed
    assert model.lm_head is not None
    assert model.model.embed_tokens.weight.dtype == torch.bfloat16
    own = model.state_dict()
    assert all(torch.equal(own[name], value) for name, value in source.state_dict().items())
    assert huggingface.load(tmp_path, dtype=torch.float32).model.norm.weight.dtype == torch.float32


def test_a_head_that_is_the_embedding_may_be_stored_beside_it(tmp_path):
    model = small().deploy()
    huggingface.save(model, tmp_path, linear_class="autobitlinear")
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, tmp_path / "model.safetensors")
    assert torch.equal(huggingface.load(tmp_path)(IDS), model(IDS))


def test_bytes_are_a_quarter_a_weight(tmp_path):
    model = small().deploy()
    huggingface.save(model, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    for name, layer in ternary_layers(model).items():
        assert tensors[f"{name}.weight"].nbytes == layer.weight_count // 4
        codes = hf_bitnet.unpack(tensors[f"{name}.weight"], layer.out_features, layer.in_features)
        assert torch.equal(codes, layer.ternary_weight()[1])


def test_what_the_layout_has_no_place_for(tmp_path):
    model = BitTransformerLM(BitTransformerConfig(**SIZES), BitQuantConfig("per_channel"))
    with pytest.raises(CheckpointError, match="one scale for a weight"):
        huggingface.save(model.deploy(), tmp_path)
    model = BitTransformerLM(BitTransformerConfig(**SIZES), BitQuantConfig(activation_dtype="float32"))
    with pytest.raises(CheckpointError, match="8-bit activations"):
        huggingface.save(model, tmp_path)
    with pytest.raises(CheckpointError, match="make up hidden_size"):
        huggingface.save(small(head_dim=6), tmp_path)
    with pytest.raises(CheckpointError, match="30 rows"):
        huggingface.save(
            small(hidden_size=30, num_attention_heads=5, num_key_value_heads=5, head_dim=6).deploy(), tmp_path
        )
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "gpt2"}, "'gpt2' model"),
        ({"model_type": "llama", "quantization_config": None}, "no quantization_config"),
        ({"quantization_config": {"quant_method": "gptq"}}, "method bitnet"),
        ({"quantization_config": {"quant_method": "bitnet", "use_rms_norm": True}}, "use_rms_norm"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "yarn"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"hidden_size": "32"}, "hidden_size is '32'"),
        ({"num_hidden_layers": 3}, r"packed.*layers\.2"),
        ({"intermediate_size": 44}, "mlp"),
        ({"rope_parameters": "none"}, "no JSON object"),
        ({"rope_theta": "far", "rope_parameters": None}, "far"),
        ({"vocab_size": 63}, r"embed_tokens.*\[64, 32\]"),
        (
            {"quantization_config": {"quant_method": "bitnet", "linear_class": "linear"}},
            "linear_class is 'linear'",
        ),
    ],
)
def test_configurations_that_do_not_fit(changes, message, tmp_path):
    huggingface.save(small().deploy(), tmp_path)
    set_config(tmp_path, **changes)
    with pytest.raises(CheckpointError, match=message):
        huggingface.load(tmp_path)


def test_shards_that_are_missing_or_leave_the_folder(tmp_path):
    huggingface.save(small().deploy(), tmp_path)
    index = tmp_path / "model.safetensors.index.json"
    for shard in ("../model.safetensors", "/etc/passwd", "weights.bin"):
        index.write_text(json.dumps({"weight_map": {"model.norm.weight": shard}}))
        with pytest.raises(CheckpointError, match="no safetensors file of its folder"):
            huggingface.load(tmp_path)
    index.write_text(json.dumps({"weight_map": {"model.norm.weight": "other.safetensors"}}))
    with pytest.raises(CheckpointError, match=r"other\.safetensors does not exist"):
        huggingface.load(tmp_path)
    index.write_text(json.dumps({"weight_map": {"more.weight": "model.safetensors"}}))
    with pytest.raises(CheckpointError, match=r"more\.weight, which no shard holds"):
        huggingface.load(tmp_path)
    index.write_text("{}")
    with pytest.raises(CheckpointError, match="no weight_map"):
        huggingface.load(tmp_path)


def test_tensors_that_are_missing(tmp_path):
    huggingface.save(small().deploy(), tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    save_file({k: v for k, v in tensors.items() if k != name}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="up_proj"):
        huggingface.load(tmp_path)
    save_file({k: v for k, v in tensors.items() if not k.endswith("scale")}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="no weight has a weight_scale"):
        huggingface.load(tmp_path)


def test_shards_of_an_earlier_checkpoint_are_not_read(tmp_path):
    old, new = BitNetForCausalLM(BitNetConfig(**SIZES)), small(tie_word_embeddings=False)
    old.save_pretrained(tmp_path, max_shard_size="20KB")
    huggingface.save(new, tmp_path)
    loaded = huggingface.load(tmp_path)
    assert torch.equal(loaded.model.norm.weight, new.model.norm.weight)
    assert torch.equal(loaded(IDS), new(IDS))


def test_a_llama_without_norms_inside(tmp_path):
    sizes = {key: value for key, value in SIZES.items() if key != "initializer_range"}
    LlamaForCausalLM(LlamaConfig(**sizes)).save_pretrained(tmp_path)
    set_config(tmp_path, quantization_config={"quant_method": "bitnet", "quantization_mode": "online"})
    model = huggingface.load(tmp_path)
    assert not model.config.sub_norm
    assert model(IDS).shape == (2, 7, 64)
