"""Exports of small models against models whose weights were replaced by hand, and against Intel's reader."""

import json
import os
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from auto_round.config_manager import AutoRoundConfig, LayerSettings
from auto_round.exceptions import CheckpointError, ConfigurationError, ExportError
from auto_round.export import check_export, export_model
from auto_round.export._auto_round import quantization_config, read_layer
from auto_round.export._tensors import CheckpointTensors, LayerRows, ModuleTensors, parts_of_layers
from auto_round.low_cpu_mem._checkpoint import CheckpointReader
from auto_round.low_cpu_mem._weights import ModelWeights, Piece
from auto_round.quantization._layers import find_layers
from auto_round.quantization._quantized import QuantizedWeight
from auto_round.quantization._results import ResultStore
from auto_round.quantization._rtn import quantize_rtn
from auto_round.quantization._source import CheckpointModel, FloatModel, ModuleModel, block_layers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

SMALL: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", "LlamaForCausalLM", SMALL),
    "llama-tied": ("LlamaConfig", "LlamaForCausalLM", {**SMALL, "tie_word_embeddings": True}),
    "gpt2": (
        "GPT2Config",
        "GPT2LMHeadModel",
        {"vocab_size": 96, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64},
    ),
    "mixtral": (
        "MixtralConfig",
        "MixtralForCausalLM",
        {**SMALL, "num_local_experts": 3, "num_experts_per_tok": 2},
    ),
    "qwen3-moe": (
        "Qwen3MoeConfig",
        "Qwen3MoeForCausalLM",
        {**SMALL, "head_dim": 16, "moe_intermediate_size": 32, "num_experts": 3, "num_experts_per_tok": 2},
    ),
    "bert": ("BertConfig", "BertForMaskedLM", {**SMALL, "type_vocab_size": 2}),
}
INTEL = os.environ.get("AUTO_ROUND_PEER_PYTHON")


def small_model(family: str, dtype: torch.dtype = torch.float32) -> Any:
    config_name, class_name, fields = FAMILIES[family]
    torch.manual_seed(3)
    model = getattr(transformers, class_name)(getattr(transformers, config_name)(**fields))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.1)
    return model.to(dtype).eval()


def logits_of(model: Any) -> Tensor:
    tokens = torch.arange(3, 27).reshape(2, 12)
    with torch.no_grad():
        return model(input_ids=tokens, attention_mask=torch.ones_like(tokens)).logits


def config_of(export: dict[str, Any] | None = None, **quantization: Any) -> AutoRoundConfig:
    return AutoRoundConfig(quantization={"group_size": 32, **quantization}, export=export or {})


@dataclass
class Quantised:
    """A model that was rounded to nearest, and what it was made from."""

    source: FloatModel
    store: ResultStore
    config: AutoRoundConfig
    weights: dict[str, QuantizedWeight]

    def export(self, name: str, folder: Path, tokenizer: Any = None) -> Path:
        export_model(name, self.source, self.store, self.config, folder, tokenizer)
        return folder


def quantised(source: FloatModel, folder: Path, config: AutoRoundConfig) -> Quantised:
    folder.mkdir()
    store = ResultStore(folder)
    everything: dict[str, QuantizedWeight] = {}
    for index, (block, name) in enumerate(zip(source.blocks, source.block_names, strict=True)):
        weights = {
            layer.name: quantize_rtn(source.read(layer, torch.device("cpu")), settings, torch.float16)
            for layer, settings in block_layers(block, name, config.quantization)
        }
        store.write(f"block-{index}", weights)
        source.finish(index, weights)
        everything |= weights
    outside = {
        layer.name: quantize_rtn(source.read(layer, torch.device("cpu")), settings, torch.float16)
        for layer, settings in source.outside(config.quantization)
    }
    if outside:
        store.write("outside", outside)
        source.take_over(outside)
    return Quantised(source, store, config, everything | outside)


@pytest.fixture
def made(tmp_path: Path) -> Any:
    opened: list[FloatModel] = []

    def make(family: str, dtype: torch.dtype = torch.float32, **quantization: Any) -> Quantised:
        folder = tmp_path / "float"
        small_model(family, dtype).save_pretrained(folder, max_shard_size="60KB")
        source = CheckpointModel(folder)
        opened.append(source)
        return quantised(source, tmp_path / "store", config_of(**quantization))

    yield make
    for source in opened:
        source.close()


def replaced_by_hand(model: Any, weights: dict[str, QuantizedWeight]) -> Any:
    """The float model with codes times scales in place of its weights, by a formula of this test's own."""
    with torch.no_grad():
        for layer in find_layers(model):
            if layer.name not in weights:
                continue
            weight = weights[layer.name]
            rows, width = weight.codes.shape
            zero = 2 ** (weight.settings.bits - 1) if weight.zero is None else weight.zero.double()
            zero = torch.as_tensor(zero).expand_as(weight.scale).unsqueeze(-1)
            groups = weight.codes.double().view(rows, weight.scale.shape[1], -1)
            matrix = ((groups - zero) * weight.scale.double().unsqueeze(-1)).view(rows, width).to(model.dtype)
            stored = layer.weight
            stored.copy_(matrix.T if layer.transposed else matrix.view(stored.shape))
    return model


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fake_gives_the_logits_of_weights_replaced_by_hand(
    family: str, dtype: torch.dtype, made: Callable[..., Quantised], tmp_path: Path
) -> None:
    done = made(family, dtype, bits=3, symmetric=dtype == torch.float32)
    folder = done.export("fake", tmp_path / "fake")
    kind = type(small_model(family))
    # Not small_model itself: it has its rotary frequencies in 16 bits as well.
    model = kind.from_pretrained(tmp_path / "float")
    before = logits_of(model)
    loaded = kind.from_pretrained(folder)
    assert loaded.dtype == dtype
    assert torch.equal(logits_of(loaded), logits_of(replaced_by_hand(model, done.weights)))
    assert not torch.equal(logits_of(loaded), before)


@pytest.mark.parametrize("family", ["llama-tied", "mixtral"])
def test_fake_copies_what_is_not_quantised_bit_by_bit_under_the_checkpoints_names(
    family: str, made: Callable[..., Quantised], tmp_path: Path
) -> None:
    done = made(family)
    folder = done.export("fake", tmp_path / "fake")
    before, after = (everything_in(path) for path in (tmp_path / "float", folder))
    assert after.keys() == before.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed
    assert all(name.endswith(("_proj.weight", "w1.weight", "w2.weight", "w3.weight")) for name in changed)
    assert (folder / "config.json").read_bytes() == (tmp_path / "float" / "config.json").read_bytes()


def everything_in(folder: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for path in folder.glob("*.safetensors"):
        found |= load_file(path)
    return found


def test_fake_keeps_tensors_that_the_model_does_not_know_and_files_of_torch(tmp_path: Path) -> None:
    folder = tmp_path / "float"
    model = small_model("llama")
    model.config.save_pretrained(folder)
    state = {**model.state_dict(), "extra.table": torch.arange(7), "scalar": torch.tensor(2.5)}
    torch.save(state, folder / "pytorch_model.bin")
    done = quantised(CheckpointModel(folder), tmp_path / "store", config_of())
    written = everything_in(done.export("fake", tmp_path / "fake"))
    assert written.keys() == state.keys()
    assert torch.equal(written["extra.table"], torch.arange(7))
    assert torch.equal(written["scalar"], torch.tensor(2.5))
    done.source.close()


@pytest.mark.parametrize("weight_dtype", ["mxfp4", "nvfp4", "fp8"])
def test_fake_holds_float_weights(weight_dtype: str, made: Callable[..., Quantised], tmp_path: Path) -> None:
    done = made("llama", group_size=None, weight_dtype=weight_dtype)
    written = everything_in(done.export("fake", tmp_path / "fake"))
    for name, weight in done.weights.items():
        assert torch.equal(written[f"{name}.weight"], weight.dequantize())


def test_a_large_tensor_is_copied_in_pieces(
    made: Callable[..., Quantised], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("auto_round.export._tensors._PIECE_BYTES", 1000)
    done = made("llama")
    sizes: list[int] = []
    read = type(done.source.weights.reader).read_rows  # pyright: ignore

    def watched(self: Any, name: str, rows: slice, **options: Any) -> Tensor:
        values = read(self, name, rows, **options)
        sizes.append(values.nbytes)
        return values

    monkeypatch.setattr("auto_round.low_cpu_mem._checkpoint.CheckpointReader.read_rows", watched)
    written = everything_in(done.export("fake", tmp_path / "fake"))
    before = everything_in(tmp_path / "float")
    assert torch.equal(written["model.embed_tokens.weight"], before["model.embed_tokens.weight"])
    assert sizes
    assert max(sizes) <= 1000


@pytest.mark.parametrize("family", ["llama", "llama-tied", "gpt2", "mixtral"])
def test_a_module_of_transformers_is_saved_by_itself(family: str, tmp_path: Path) -> None:
    model = small_model(family)
    done = quantised(ModuleModel(model), tmp_path / "store", config_of(bits=2))
    folder = done.export("fake", tmp_path / "fake")
    wanted = replaced_by_hand(small_model(family), done.weights)
    assert torch.equal(logits_of(type(model).from_pretrained(folder)), logits_of(wanted))


class Own(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(10, 32)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(32, 32), nn.ReLU()) for _ in range(2))
        self.head = nn.Linear(32, 10, bias=False)
        self.head.weight = self.embedding.weight
        self.register_buffer("steps", torch.tensor(3))


class Experts(nn.Module):
    is_transposed = True

    def __init__(self) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.randn(3, 8, 16))


def test_another_module_is_saved_as_its_state_with_tied_tensors_once(tmp_path: Path) -> None:
    model = Own()
    done = quantised(ModuleModel(model), tmp_path / "store", config_of())
    folder = done.export("fake", tmp_path / "fake")
    written = load_file(folder / "model.safetensors")
    state = dict(model.state_dict())
    assert torch.equal(written["blocks.0.0.weight"], done.weights["blocks.0.0"].dequantize())
    del state["head.weight"]
    assert written.keys() == state.keys()
    assert all(torch.equal(written[name], state[name]) for name in state)
    with pytest.raises(ConfigurationError, match="Own is no model of transformers"):
        done.export("auto_round", tmp_path / "packed")
    assert not (tmp_path / "packed").exists()


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_packed_integers_times_scales_are_the_fake_weights(
    bits: int, symmetric: bool, made: Callable[..., Quantised], tmp_path: Path
) -> None:
    done = made("llama", bits=bits, symmetric=symmetric)
    packed = done.export("auto_round", tmp_path / "packed")
    fake = everything_in(done.export("fake", tmp_path / "fake"))
    about = json.loads((packed / "config.json").read_text())["quantization_config"]
    assert about["packing_format"] == ("auto_round:auto_gptq" if symmetric else "auto_round")
    assert (about["bits"], about["group_size"], about["sym"]) == (bits, 32, symmetric)
    assert about["block_name_to_quantize"] == "model.layers"
    assert "extra_config" not in about
    if symmetric:
        assert any(bool((weight.scale < 0).any()) for weight in done.weights.values())
    for name in done.weights:
        assert torch.equal(read_layer(packed, name).dequantize(), fake[f"{name}.weight"])
    written = everything_in(packed)
    assert not {f"{name}.weight" for name in done.weights} & written.keys()
    untouched = fake.keys() - {f"{name}.weight" for name in done.weights}
    assert all(torch.equal(fake[name], written[name]) for name in untouched)


def test_the_layout_is_what_was_worked_out_by_hand(tmp_path: Path) -> None:
    model = small_model("llama")
    source = ModuleModel(model)
    name = "model.layers.0.self_attn.q_proj"
    codes = (torch.arange(64 * 64).view(64, 64) % 16).to(torch.uint8)
    scale = torch.arange(128).view(64, 2).half() + 1
    zero = (torch.arange(128).view(64, 2) % 16).to(torch.uint8)
    settings = LayerSettings(bits=4, group_size=32, symmetric=False, weight_dtype="int")
    (tmp_path / "store").mkdir()
    store = ResultStore(tmp_path / "store")
    store.write("one", {name: QuantizedWeight(settings=settings, codes=codes, scale=scale, zero=zero)})
    config = config_of(symmetric=False)
    export_model("auto_round", source, store, config, tmp_path / "packed")
    written = everything_in(tmp_path / "packed")
    qweight, qzeros, scales = (written[f"{name}.{end}"] for end in ("qweight", "qzeros", "scales"))
    assert (tuple(qweight.shape), tuple(qzeros.shape), tuple(scales.shape)) == ((8, 64), (2, 8), (2, 64))
    # Rows of 64 codes begin with 0, 1, 2..; the first 8 along the input are the first word of each output.
    assert qweight[0, 0].item() == 0x76543210
    assert qweight[1, 5].item() == 0xFEDCBA98 - 2**32
    # The zero points of outputs 0 to 7 in the first group are 0, 2, 4.. 14.
    assert qzeros[0, 0].item() == 0xECA86420 - 2**32
    assert scales[1, 3].item() == 8


def test_zero_points_less_one_are_those_of_gptq(made: Callable[..., Quantised], tmp_path: Path) -> None:
    written = everything_in(made("llama").export("auto_round", tmp_path / "packed"))
    zeros = written["model.layers.1.mlp.up_proj.qzeros"]
    assert torch.equal(zeros, torch.full_like(zeros, 0x77777777))


def test_layers_that_differ_are_named(made: Callable[..., Quantised], tmp_path: Path) -> None:
    done = made(
        "llama",
        layer_config={
            "down_proj": {"bits": 8, "group_size": -1},
            "layers.1.self_attn.q_proj": {"symmetric": False},
        },
        ignore_layers=[r"layers\.0\.mlp\.gate_proj"],
    )
    folder = done.export("auto_round", tmp_path / "packed")
    about = json.loads((folder / "config.json").read_text())["quantization_config"]
    down = {"bits": 8, "group_size": -1, "sym": True, "data_type": "int"}
    assert about["packing_format"] == "auto_round"
    assert about["extra_config"] == {
        "model.layers.0.mlp.gate_proj": {"bits": 16, "data_type": "float"},
        "model.layers.0.mlp.down_proj": down,
        "model.layers.1.mlp.down_proj": down,
        "model.layers.1.self_attn.q_proj": {"bits": 4, "group_size": 32, "sym": False, "data_type": "int"},
    }
    for name, weight in done.weights.items():
        assert torch.equal(read_layer(folder, name).dequantize(), weight.dequantize())


def test_a_quantised_head_is_named(made: Callable[..., Quantised], tmp_path: Path) -> None:
    done = made("llama", layer_config={"lm_head": {"bits": 8}}, ignore_layers=[])
    assert "lm_head" in done.weights
    folder = done.export("auto_round", tmp_path / "packed")
    about = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert about["extra_config"]["lm_head"]["bits"] == 8
    assert torch.equal(read_layer(folder, "lm_head").dequantize(), done.weights["lm_head"].dequantize())


def test_conv1d_is_packed_along_its_inputs(made: Callable[..., Quantised], tmp_path: Path) -> None:
    done = made("gpt2", bits=2)
    folder = done.export("auto_round", tmp_path / "packed")
    model = replaced_by_hand(small_model("gpt2"), done.weights)
    layer = read_layer(folder, "transformer.h.1.attn.c_attn")
    assert torch.equal(layer.dequantize(), model.transformer.h[1].attn.c_attn.weight.T)


@pytest.mark.parametrize("family", ["mixtral", "qwen3-moe"])
@pytest.mark.parametrize("in_memory", [False, True])
def test_experts_are_packed_one_by_one(
    family: str, in_memory: bool, made: Callable[..., Quantised], tmp_path: Path
) -> None:
    options: dict[str, Any] = {"bits": 4, "layer_config": {"down_proj": {"bits": 8}}}
    if in_memory:
        done = quantised(ModuleModel(small_model(family)), tmp_path / "store", config_of(**options))
    else:
        done = made(family, **options)
    folder = done.export("auto_round", tmp_path / "packed")
    model = replaced_by_hand(small_model(family), done.weights)
    prefix = "block_sparse_moe" if family == "mixtral" and not in_memory else "mlp"
    for expert in range(3):
        gate_up, down = (
            getattr(model.model.layers[1].mlp.experts, name)[expert] for name in ("gate_up_proj", "down_proj")
        )
        for name, wanted in zip(
            ("gate_proj", "up_proj", "down_proj"), (*gate_up.chunk(2), down), strict=True
        ):
            layer = read_layer(
                folder,
                f"model.layers.1.{prefix}.experts.{expert}.{name}",
                f"model.layers.1.mlp.experts.{expert}.{name}",
            )
            assert layer.settings.bits == (8 if name == "down_proj" else 4)
            assert torch.equal(layer.dequantize(), wanted)


def test_a_layer_of_many_parts_is_read_once_for_each_type(
    made: Callable[..., Quantised], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = made("mixtral")
    read: list[str] = []
    original = ResultStore.read
    monkeypatch.setattr(ResultStore, "read", lambda self, name: read.append(name) or original(self, name))
    done.export("fake", tmp_path / "fake")
    assert len(read) == len(set(read)) == len(done.weights)
    read.clear()
    done.export("auto_round", tmp_path / "packed")
    assert max(read.count(name) for name in done.weights) == 2


def test_rows_of_a_layer_keep_their_zero_points(tmp_path: Path) -> None:
    weight = quantize_rtn(
        torch.randn(8, 32),
        LayerSettings(bits=4, group_size=16, symmetric=False, weight_dtype="int"),
        torch.float16,
    )
    store = ResultStore(tmp_path)
    store.write("one", {"layer": weight})
    rows = LayerRows(store).read("layer", slice(2, 5))
    assert torch.equal(rows.dequantize(), weight.dequantize()[2:5])


def layer(**changes: Any) -> dict[str, LayerSettings]:
    usual = {"bits": 4, "group_size": 32, "symmetric": True, "weight_dtype": "int"}
    return {"model.layers.0.mlp.up_proj": LayerSettings(**{**usual, **changes})}


@pytest.mark.parametrize(
    ("export", "quantization", "layers", "message"),
    [
        ("gptq", {}, layer(), "'gptq' is not written by this release; it writes auto_round and fake"),
        ("gguf", {}, layer(), "auto_round and fake"),
        (
            "auto_round",
            {},
            layer(bits=5),
            r"5 bits \(model.layers.0.mlp.up_proj\); it holds integers of 2, 3, 4",
        ),
        ("auto_round", {}, layer(weight_dtype="mxfp4"), "'mxfp4'"),
        ("auto_round", {"act_bits": 8}, layer(), "act_bits 8"),
        ("auto_round", {"scale_dtype": "float32"}, layer(), "scale_dtype 'float32'"),
        ("auto_round", {}, {}, "no layer is quantised"),
        (("fake", "auto_round"), {}, layer(bits=7), "7 bits"),
    ],
)
def test_what_a_format_cannot_hold_is_refused(
    export: Any, quantization: dict[str, Any], layers: dict[str, LayerSettings], message: str
) -> None:
    with pytest.raises(ConfigurationError, match=message):
        check_export(config_of({"export_format": export}, **quantization), layers)
    check_export(config_of({"export_format": "fake"}, **quantization), layers)


def test_what_a_format_cannot_hold_is_not_begun(made: Callable[..., Quantised], tmp_path: Path) -> None:
    done = made("llama", bits=5)
    for name, message in (("auto_round", "5 bits"), ("gptq", "not written by this release")):
        with pytest.raises(ConfigurationError, match=message):
            done.export(name, tmp_path / "deep" / name)
    assert not (tmp_path / "deep").exists()


def test_layers_that_differ_are_refused_where_they_may_not() -> None:
    layers = {**layer(), "other": LayerSettings(bits=8, group_size=32, symmetric=True, weight_dtype="int")}
    check_export(config_of(), layers)
    with pytest.raises(ConfigurationError, match=r"up_proj has .*bits=4.* and other has .*bits=8"):
        check_export(config_of({"mixed_precision": False}), layers)
    check_export(config_of({"mixed_precision": False}), layer())


def test_shapes_that_readers_do_not_take_are_refused_before_the_work(tmp_path: Path) -> None:
    narrow = transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**SMALL, "intermediate_size": 80}))
    settings = layer()["model.layers.0.mlp.up_proj"]
    with pytest.raises(
        ConfigurationError, match=r"up_proj has a weight of shape \[80, 64\].*multiples of 32"
    ):
        check_export(config_of(), layer(), ModuleModel(narrow))
    check_export(config_of({"export_format": "fake"}), layer(), ModuleModel(narrow))

    class Odd(nn.Linear):
        pass

    model = Own()
    model.blocks[0][0] = Odd(32, 32)
    with pytest.raises(ConfigurationError, match="is a Odd"):
        check_export(config_of(), {"blocks.0.0": settings}, ModuleModel(model))
    experts = ModuleModel(small_model("mixtral"))
    with pytest.raises(ConfigurationError, match=r"experts\.gate_up_proj is left as it is"):
        check_export(config_of(), {"model.layers.0.self_attn.q_proj": settings}, experts)
    other = nn.Sequential(nn.ModuleList([nn.Sequential(Experts())]))
    with pytest.raises(ConfigurationError, match="is one of gate_up_proj, and the format"):
        check_export(config_of(), {"0.0.0.gate_up_proj": settings}, ModuleModel(other))


def test_experts_stored_the_other_way_round_are_put_back_as_they_were(tmp_path: Path) -> None:
    model = nn.Sequential(Experts())
    save_file(dict(model.state_dict()), tmp_path / "model.safetensors")
    (layer,) = find_layers(model)
    with CheckpointReader(tmp_path) as reader:
        (part,) = CheckpointTensors(ModelWeights(model, reader)).parts(layer)
    stored = model[0].gate_up_proj.detach()
    assert (part.rows, part.transposed) == (slice(0, 48), True)
    assert torch.equal(part.stored(layer.matrix(stored)), stored)
    assert ModuleTensors(model).parts(layer) == (part,)


@pytest.mark.parametrize(
    "place", [(slice(None), slice(0, 4)), (slice(0, 16, 2), slice(None))], ids=["columns", "every other row"]
)
def test_parts_that_are_not_whole_rows_are_refused(
    place: tuple[slice, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = nn.Sequential(nn.Linear(8, 16, bias=False))
    save_file(dict(model.state_dict()), tmp_path / "model.safetensors")
    (layer,) = find_layers(model)
    with CheckpointReader(tmp_path) as reader:
        weights = ModelWeights(model, reader)
        piece = Piece(source="0.weight", place=place, transposed=False)
        monkeypatch.setattr(weights, "pieces", lambda _: (piece,))
        with pytest.raises(ExportError, match=r"0\.weight of the checkpoint is not whole rows of 0"):
            CheckpointTensors(weights).parts(layer)


def test_weights_that_two_layers_share_are_refused(tmp_path: Path) -> None:
    model = Own()
    model.blocks[1][0].weight = model.blocks[0][0].weight
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    del state["blocks.1.0.weight"], state["head.weight"]
    save_file(state, tmp_path / "model.safetensors")
    with CheckpointReader(tmp_path) as reader:
        tensors = CheckpointTensors(ModelWeights(model, reader))
        with pytest.raises(ExportError, match=r"blocks\.1\.0 and blocks\.0\.0 share their weight"):
            list(parts_of_layers(ModuleModel(model), tensors, {"blocks.0.0", "blocks.1.0"}))


def test_an_export_is_not_written_over_another(made: Callable[..., Quantised], tmp_path: Path) -> None:
    done = made("llama")
    done.export("fake", tmp_path / "fake")
    before = sorted((tmp_path / "fake").iterdir())
    with pytest.raises(ConfigurationError, match="is not empty"):
        done.export("auto_round", tmp_path / "fake")
    with pytest.raises(ConfigurationError, match="is not empty"):
        done.export("fake", tmp_path / "float")
    assert sorted((tmp_path / "fake").iterdir()) == before


def test_an_export_that_fails_leaves_nothing(made: Callable[..., Quantised], tmp_path: Path) -> None:
    done = made("llama")
    next((tmp_path / "store").iterdir()).write_bytes(b"damaged")
    before = sorted(tmp_path.iterdir())
    with pytest.raises(CheckpointError):
        done.export("auto_round", tmp_path / "packed")
    assert sorted(tmp_path.iterdir()) == before


def test_an_export_that_is_none_is_refused_by_the_reader(
    made: Callable[..., Quantised], tmp_path: Path
) -> None:
    done = made("llama")
    fake = done.export("fake", tmp_path / "fake")
    with pytest.raises(CheckpointError, match="no export in the format auto_round"):
        read_layer(fake, "model.layers.0.mlp.up_proj")
    packed = done.export("auto_round", tmp_path / "packed")
    config = json.loads((packed / "config.json").read_text())
    for change, message in (({"group_size": 64}, "have 1 groups each"), ({"bits": 5}, "has bits 5")):
        changed = {**config, "quantization_config": {**config["quantization_config"], **change}}
        (packed / "config.json").write_text(json.dumps(changed))
        with pytest.raises(CheckpointError, match=message):
            read_layer(packed, "model.layers.0.mlp.up_proj")


def test_what_is_outside_the_blocks_is_described_by_name() -> None:
    source = ModuleModel(small_model("llama"))
    same = layer()["model.layers.0.mlp.up_proj"]
    every = {one.name: same for one in find_layers(source.model)}
    about = quantization_config(source, every)
    assert list(about["extra_config"]) == ["lm_head"]


def test_routers_are_said_to_be_floats() -> None:
    source = ModuleModel(small_model("qwen3-moe"))
    names = [one.name for one in find_layers(source.model) if one.weight.ndim == 2 and one.name != "lm_head"]
    about = quantization_config(source, dict.fromkeys(names, layer()["model.layers.0.mlp.up_proj"]))
    floats = {"bits": 16, "data_type": "float"}
    assert about["extra_config"] == {f"model.layers.{index}.mlp.gate": floats for index in range(2)}


def test_a_name_that_begins_another_does_not_speak_for_it() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate, self.gate_proj, self.up = (nn.Linear(32, 32) for _ in range(3))

    model = Own()
    model.blocks = nn.ModuleList([Block()])
    same = layer()["model.layers.0.mlp.up_proj"]
    about = quantization_config(ModuleModel(model), {"blocks.0.gate_proj": same, "blocks.0.up": same})
    # Readers that look for the pattern blocks.0.gate find blocks.0.gate_proj as well.
    assert about["extra_config"] == {
        "blocks.0.gate": {"bits": 16, "data_type": "float"},
        "blocks.0.gate_proj": {"bits": 4, "group_size": 32, "sym": True, "data_type": "int"},
    }


# Intel's reader changes how transformers loads experts for the rest of the process, so it comes last. The
# weights of a layer are what it makes of the unit vectors.
PEER = """
import sys
import torch, transformers
torch.set_num_threads(1)
tokens = torch.arange(3, 27).reshape(2, 12)
out = {}
for name in ("fake", "auto_round"):
    folder = f"{sys.argv[1]}/{name}"
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float16).eval()
    with torch.no_grad():
        out[name] = model(input_ids=tokens, attention_mask=torch.ones_like(tokens)).logits
layers = {name: layer for name, layer in model.named_modules() if hasattr(layer, "qweight")}
for layer in layers.values():
    layer.bias = None
with torch.no_grad():
    out["weights"] = {
        name: layer(torch.eye(layer.infeatures, dtype=torch.float16)).T for name, layer in layers.items()
    }
torch.save(out, f"{sys.argv[1]}/read.pt")
"""


@pytest.mark.skipif(not INTEL, reason="AUTO_ROUND_PEER_PYTHON names no Python that has Intel's auto-round")
@pytest.mark.parametrize(
    ("family", "options"),
    [
        *(("llama", {"bits": bits, "symmetric": even}) for bits in (2, 3, 4, 8) for even in (True, False)),
        ("llama", {"layer_config": {"v_proj": {"bits": 8, "group_size": -1}, "lm_head": {}}}),
        ("llama-tied", {"ignore_layers": [r"layers\.0\..*"]}),
        ("gpt2", {"bits": 3, "layer_config": {"h.1.attn.c_proj": {"bits": 8}}}),
        ("mixtral", {"symmetric": False, "layer_config": {"down_proj": {"bits": 8}}}),
        ("qwen3-moe", {"layer_config": {"down_proj": {"bits": 2}}}),
    ],
)
def test_intels_reader_has_the_same_weights(
    family: str, options: dict[str, Any], made: Callable[..., Quantised], tmp_path: Path
) -> None:
    if "lm_head" in options.get("layer_config", {}):
        options = {**options, "ignore_layers": []}
    done = made(family, torch.float16, **options)
    for name in ("auto_round", "fake"):
        done.export(name, tmp_path / name)
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    subprocess.run([str(INTEL), "-I", "-c", PEER, tmp_path], check=True, env=environment)
    out = torch.load(tmp_path / "read.pt")
    wanted = replaced_by_hand(small_model(family, torch.float16), done.weights)
    for name, weight in out["weights"].items():
        assert torch.equal(weight, weight_of(wanted, name)), name
    quantised = sum(weight.codes.numel() for weight in done.weights.values())
    assert sum(weight.numel() for weight in out["weights"].values()) == quantised
    difference = (out["fake"].float() - out["auto_round"].float()).abs().max()
    print(f"{family} {options}: logits differ by {difference:.2g} of {out['fake'].float().std():.2g}")
    # Conv1D and experts are computed in another order.
    assert difference <= (0 if family.startswith("llama") else 4e-3)


def weight_of(model: Any, name: str) -> Tensor:
    if ".experts." not in name:
        layer = model.get_submodule(name)
        return layer.weight.T if type(layer).__name__ == "Conv1D" else layer.weight
    experts, expert, matrix = name.rsplit(".", 2)
    module = model.get_submodule(experts)
    if matrix == "down_proj":
        return module.down_proj[int(expert)]
    return module.gate_up_proj[int(expert)].chunk(2)[("gate_proj", "up_proj").index(matrix)]
