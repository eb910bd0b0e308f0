"""GGUF files, read by the gguf package: the numbers that the model computes with."""

import json

import gguf
import numpy as np
import pytest
import torch
from bitcore.config import BitQuantConfig
from bitcore.packing import gguf_i2_s
from bitlayers.utils import ternary_layers
from bitmodels import BitTransformerConfig, BitTransformerLM
from bitmodels.exceptions import CheckpointError, QuantizationError
from bitmodels.formats.gguf import export
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

SIZES = {
    "vocab_size": 300,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "bos_token_id": 0,
    "eos_token_id": 1,
}


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return BitTransformerLM(BitTransformerConfig(**SIZES)).deploy()


def field(reader, name):
    return reader.get_field(name).contents()


@pytest.mark.parametrize("kind", ["TQ1_0", "TQ2_0"])
def test_the_numbers_are_the_models(kind, model, tmp_path):
    export(model, tmp_path / "m.gguf", kind=kind, name="small")
    reader = gguf.GGUFReader(tmp_path / "m.gguf")
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    assert len(tensors) == 2 + 2 * 11
    assert field(reader, "general.architecture") == "bitnet"
    assert field(reader, "general.name") == "small"
    assert field(reader, "bitnet.hidden_activation") == "relu2"
    assert field(reader, "bitnet.block_count") == 2
    assert field(reader, "bitnet.attention.head_count_kv") == 2
    assert field(reader, "bitnet.rope.dimension_count") == 64
    assert field(reader, "general.file_type") == getattr(gguf.LlamaFileType, f"MOSTLY_{kind}")
    down = tensors["blk.1.ffn_down.weight"]
    assert down.tensor_type == gguf.GGMLQuantizationType[kind]
    assert down.shape.tolist() == [512, 256]
    assert down.n_bytes == 256 * 512 // 256 * (54 if kind == "TQ1_0" else 66)
    for name, own in (
        ("blk.1.ffn_down", "model.layers.1.mlp.down_proj"),
        ("blk.0.attn_k", "model.layers.0.self_attn.k_proj"),
    ):
        scale, codes = ternary_layers(model)[own].ternary_weight()
        numbers = gguf.quants.dequantize(
            tensors[f"{name}.weight"].data, tensors[f"{name}.weight"].tensor_type
        )
        expected = codes.float() * scale[:, None].half().float()
        assert np.array_equal(numbers, expected.numpy())
    embedding = torch.from_numpy(tensors["token_embd.weight"].data.copy())
    assert torch.equal(embedding, model.model.embed_tokens.weight.detach().half())
    assert tensors["output_norm.weight"].tensor_type == gguf.GGMLQuantizationType.F32
    assert not [name for name in tensors if name.startswith("output.")]


def test_i2_s_for_bitnet_cpp(model, tmp_path):
    export(model, tmp_path / "m.gguf", kind="I2_S")
    data = (tmp_path / "m.gguf").read_bytes()
    assert b"bitnet-b1.58" in data
    scale, codes = model.model.layers[0].mlp.up_proj.ternary_weight()
    assert gguf_i2_s.pack(codes, scale[:1]).numpy().tobytes() in data
    # The reader knows no type 36: the entry of a tensor by hand, [columns, rows], the type, the offset.
    name = b"blk.0.ffn_up.weight"
    at = data.index(name) + len(name)
    entry = np.frombuffer(data[at : at + 32], "<u4")
    assert entry[0] == 2
    assert entry[[1, 3]].tolist() == [256, 512]
    assert entry[5] == 36


def tokenizer(path, **given):
    found = Tokenizer(models.BPE())
    found.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, **given)
    found.decoder = decoders.ByteLevel()
    special = trainers.BpeTrainer(
        vocab_size=290, special_tokens=["<s>", "</s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    found.train_from_iterator(["the cat sat on the mat and the hat"] * 3, special)
    found.save(str(path))
    return found


def test_vocabulary(model, tmp_path):
    own = tokenizer(tmp_path / "tokenizer.json")
    export(model, tmp_path / "m.gguf", tokenizer=tmp_path / "tokenizer.json")
    reader = gguf.GGUFReader(tmp_path / "m.gguf")
    tokens, kinds = field(reader, "tokenizer.ggml.tokens"), field(reader, "tokenizer.ggml.token_type")
    count = own.get_vocab_size()
    assert count < 300 == len(tokens) == len(kinds)
    assert [own.token_to_id(token) for token in tokens[:count]] == list(range(count))
    assert kinds[:3] == [gguf.TokenType.CONTROL, gguf.TokenType.CONTROL, gguf.TokenType.NORMAL]
    assert set(kinds[count:]) == {gguf.TokenType.UNUSED}
    merges = json.loads((tmp_path / "tokenizer.json").read_text())["model"]["merges"]
    assert field(reader, "tokenizer.ggml.merges") == [" ".join(pair) for pair in merges]
    assert field(reader, "tokenizer.ggml.eos_token_id") == 1
    assert field(reader, "tokenizer.ggml.pre") == "gpt-2"


def test_vocabularies_that_are_refused(model, tmp_path):
    path = tmp_path / "tokenizer.json"
    tokenizer(path, use_regex=False)
    with pytest.raises(CheckpointError, match="splits text as GPT-2's"):
        export(model, tmp_path / "m.gguf", tokenizer=path)
    Tokenizer(models.WordPiece({"[UNK]": 0})).save(str(path))
    with pytest.raises(CheckpointError, match="byte-level BPE"):
        export(model, tmp_path / "m.gguf", tokenizer=path)
    tokenizer(path)
    little = BitTransformerLM(BitTransformerConfig(**(SIZES | {"vocab_size": 100}))).deploy()
    with pytest.raises(CheckpointError, match="the model has 100"):
        export(little, tmp_path / "m.gguf", tokenizer=path)
    assert not (tmp_path / "m.gguf").exists()
    assert [file.name for file in tmp_path.iterdir()] == ["tokenizer.json"]


@pytest.mark.parametrize(
    ("given", "kind", "error", "message"),
    [
        ({"tie_word_embeddings": False}, "TQ2_0", CheckpointError, "tie_word_embeddings"),
        ({"sub_norm": False}, "TQ2_0", CheckpointError, "sub_norm"),
        ({"intermediate_size": 384}, "TQ2_0", QuantizationError, "256"),
        ({"intermediate_size": 320}, "I2_S", QuantizationError, "128"),
        ({}, "Q4_0", CheckpointError, "TQ2_0, TQ1_0, I2_S"),
    ],
)
def test_what_the_format_has_no_place_for(given, kind, error, message, tmp_path):
    model = BitTransformerLM(BitTransformerConfig(**(SIZES | {"num_hidden_layers": 1} | given)))
    with pytest.raises(error, match=message):
        export(model, tmp_path / "m.gguf", kind=kind)
    assert not list(tmp_path.iterdir())


def test_scales_for_each_row(tmp_path):
    model = BitTransformerLM(BitTransformerConfig(**SIZES), BitQuantConfig("per_channel"))
    with pytest.raises(CheckpointError, match="I2_S has one"):
        export(model, tmp_path / "m.gguf", kind="I2_S")
    export(model, tmp_path / "m.gguf", kind="TQ2_0")
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "m.gguf").tensors}
    scale, codes = model.model.layers[0].mlp.up_proj.ternary_weight()
    found = gguf.quants.dequantize(tensors["blk.0.ffn_up.weight"].data, gguf.GGMLQuantizationType.TQ2_0)
    assert np.array_equal(found, (codes.float() * scale[:, None].half().float()).numpy())
