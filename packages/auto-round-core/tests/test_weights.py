"""Weights read one by one against what transformers loads, and against checkpoints that do not fit."""

import json
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from auto_round.exceptions import CheckpointError, ConfigurationError, MissingPackageError
from auto_round.low_cpu_mem import _empty, _key_map
from auto_round.low_cpu_mem._checkpoint import CheckpointReader
from auto_round.low_cpu_mem._empty import empty_model
from auto_round.low_cpu_mem._weights import ModelWeights, Piece
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

SMALL: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
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
    "qwen2": ("Qwen2Config", "Qwen2ForCausalLM", SMALL),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", {**SMALL, "head_dim": 8}),
    "mistral": ("MistralConfig", "MistralForCausalLM", {**SMALL, "sliding_window": 8}),
    "gemma": ("GemmaConfig", "GemmaForCausalLM", {**SMALL, "head_dim": 8}),
    "gemma2": ("Gemma2Config", "Gemma2ForCausalLM", {**SMALL, "head_dim": 8, "sliding_window": 8}),
    "phi": ("PhiConfig", "PhiForCausalLM", SMALL),
    "phi3": ("Phi3Config", "Phi3ForCausalLM", SMALL),
    "opt": (
        "OPTConfig",
        "OPTForCausalLM",
        {**SMALL, "ffn_dim": 48, "word_embed_proj_dim": 16},
    ),
    "gpt2": (
        "GPT2Config",
        "GPT2LMHeadModel",
        {"vocab_size": 96, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
    ),
    "mixtral": (
        "MixtralConfig",
        "MixtralForCausalLM",
        {**SMALL, "num_local_experts": 3, "num_experts_per_tok": 2},
    ),
    "qwen3-moe": (
        "Qwen3MoeConfig",
        "Qwen3MoeForCausalLM",
        {**SMALL, "head_dim": 8, "moe_intermediate_size": 16, "num_experts": 3, "num_experts_per_tok": 2},
    ),
    "bert": ("BertConfig", "BertForMaskedLM", {**SMALL, "type_vocab_size": 2}),
}


def small_model(family: str, dtype: torch.dtype = torch.float32) -> Any:
    config_name, class_name, fields = FAMILIES[family]
    # Nothing in a model of this size may be left at a value that a wrong model would have as well.
    torch.manual_seed(1)
    model = getattr(transformers, class_name)(getattr(transformers, config_name)(**fields))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3)
    return model.to(dtype).eval()


def state_of(model: nn.Module) -> dict[str, Tensor]:
    return {**model.state_dict(), **dict(model.named_buffers())}


def logits_of(model: Any) -> Tensor:
    tokens = torch.arange(3, 27).reshape(2, 12)
    with torch.no_grad():
        return model(input_ids=tokens, attention_mask=torch.ones_like(tokens)).logits


def loaded(folder: Path, **options: Any) -> Any:
    model = empty_model(folder, **options)
    with CheckpointReader(folder) as reader:
        ModelWeights(model, reader).load_module(model, "")
    return model


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    folders: dict[str, Path] = {}

    def save(family: str) -> Path:
        if family not in folders:
            folders[family] = tmp_path_factory.mktemp(family)
            small_model(family).save_pretrained(folders[family])
        return folders[family]

    return save


def change_tensors(folder: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def change_config(folder: Path, **fields: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


# --- what is right ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_what_transformers_loads(family: str, saved: Callable[[str], Path]) -> None:
    model = loaded(saved(family))
    expected = getattr(transformers, FAMILIES[family][1]).from_pretrained(saved(family))
    assert type(model) is type(expected)
    assert not model.training
    found, wanted = state_of(model), state_of(expected)
    assert found.keys() == wanted.keys()
    for name, tensor in found.items():
        assert tensor.dtype == wanted[name].dtype, name
        assert torch.equal(tensor, wanted[name]), name
    assert torch.equal(logits_of(model), logits_of(expected))


@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_is_real_before_it_is_loaded_but_what_is_computed(
    family: str, saved: Callable[[str], Path]
) -> None:
    before = torch.get_rng_state()
    model = empty_model(saved(family))
    assert torch.equal(torch.get_rng_state(), before)
    expected = getattr(transformers, FAMILIES[family][1]).from_pretrained(saved(family))
    computed = {name for name, _ in model.named_buffers()} - set(model.state_dict())
    wanted = dict(expected.named_buffers())
    for name, tensor in state_of(model).items():
        assert (tensor.device.type == "cpu") == (name in computed), name
    for name in computed:
        assert torch.equal(model.get_buffer(name), wanted[name]), name


@pytest.mark.parametrize("asks", [False, True])
def test_a_buffer_that_begins_empty_is_computed_all_the_same(
    saved: Callable[[str], Path], asks: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = transformers.LlamaModel.__init__

    def build(self: Any, config: Any) -> None:
        original(self, config)
        values = torch.empty(3).fill_(4)
        self.register_buffer(
            "fours", values * int(values[0].item() / 4) if asks else values, persistent=False
        )

    monkeypatch.setattr(transformers.LlamaModel, "__init__", build)
    model: Any = empty_model(saved("llama"))
    assert model.model.fours.tolist() == [4, 4, 4]
    assert next(model.parameters()).is_meta


def test_weights_are_not_even_allocated(saved: Callable[[str], Path], tmp_path: Path) -> None:
    shutil.copytree(saved("llama"), tmp_path, dirs_exist_ok=True)
    # 8 EB each: more than any machine may promise.
    change_config(tmp_path, vocab_size=2**48, hidden_size=2**12, head_dim=8)
    model: Any = empty_model(tmp_path)
    assert model.lm_head.weight.numel() == 2**60


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", ["gemma", "mixtral", "gpt2"])
def test_half_precision_is_kept_or_asked_for(
    family: str, dtype: torch.dtype, saved: Callable[[str], Path], tmp_path: Path
) -> None:
    small_model(family, dtype).save_pretrained(tmp_path)
    kind = getattr(transformers, FAMILIES[family][1])
    for model, expected in (
        (loaded(tmp_path), kind.from_pretrained(tmp_path, dtype=dtype)),
        (loaded(saved(family), dtype=dtype), kind.from_pretrained(saved(family), dtype=dtype)),
        (
            loaded(tmp_path, dtype=torch.float32),
            kind.from_pretrained(tmp_path, dtype=torch.float32),
        ),
    ):
        wanted = state_of(expected)
        for name, tensor in state_of(model).items():
            assert tensor.dtype == wanted[name].dtype, name
            assert torch.equal(tensor, wanted[name]), name


def test_without_a_type_in_the_configuration_that_of_the_weights_counts(tmp_path: Path) -> None:
    small_model("llama", torch.bfloat16).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config.pop("dtype", None)
    config.pop("torch_dtype", None)
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert {tensor.dtype for tensor in empty_model(tmp_path).parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_modules_that_transformers_keeps_in_float32_stay_in_it(tmp_path: Path, dtype: torch.dtype) -> None:
    config = transformers.T5Config(
        vocab_size=96, d_model=16, d_kv=4, d_ff=24, num_layers=2, num_heads=4, decoder_start_token_id=0
    )
    torch.manual_seed(0)
    transformers.T5ForConditionalGeneration(config).save_pretrained(tmp_path)
    model = loaded(tmp_path, dtype=dtype)
    wanted = state_of(transformers.T5ForConditionalGeneration.from_pretrained(tmp_path, dtype=dtype))
    found = state_of(model)
    assert {name: tensor.dtype for name, tensor in found.items()} == {
        name: tensor.dtype for name, tensor in wanted.items()
    }
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in found.items())
    assert model.lm_head.weight is model.shared.weight is model.decoder.embed_tokens.weight
    assert (len({tensor.dtype for tensor in found.values()}) == 2) == (dtype == torch.float16)


@pytest.mark.parametrize("family", ["llama-tied", "mixtral", "bert"])
def test_shards_and_torch_files_give_the_same(
    family: str, saved: Callable[[str], Path], tmp_path: Path
) -> None:
    model = small_model(family)
    expected = logits_of(model)
    sharded = tmp_path / "sharded"
    model.save_pretrained(sharded, max_shard_size="10KB")
    assert len(list(sharded.glob("*.safetensors"))) > 2
    assert torch.equal(logits_of(loaded(sharded)), expected)
    torch_file = tmp_path / "torch"
    torch_file.mkdir()
    shutil.copy(saved(family) / "config.json", torch_file)
    tensors = load_file(saved(family) / "model.safetensors")
    if family == "llama-tied":
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    torch.save(tensors, torch_file / "pytorch_model.bin")
    assert torch.equal(logits_of(loaded(torch_file)), expected)


def test_the_base_models_prefix_may_be_there_or_not(saved: Callable[[str], Path], tmp_path: Path) -> None:
    whole = small_model("llama")
    whole.model.save_pretrained(tmp_path)
    assert "embed_tokens.weight" in load_file(tmp_path / "model.safetensors")
    head = whole.lm_head.weight.detach().clone()
    change_tensors(tmp_path, lambda tensors: tensors.update({"lm_head.weight": head}))
    added = loaded(tmp_path, model_class=transformers.AutoModelForCausalLM)
    assert torch.equal(logits_of(added), logits_of(whole))

    removed = empty_model(saved("llama"), transformers.AutoModel)
    with CheckpointReader(saved("llama")) as reader:
        weights = ModelWeights(removed, reader)
        assert weights.unused == ("lm_head.weight",)
        weights.load_module(removed, "")
    for name, tensor in removed.state_dict().items():
        assert torch.equal(tensor, whole.get_parameter(f"model.{name}")), name


def test_the_class_is_what_the_configuration_names(saved: Callable[[str], Path], tmp_path: Path) -> None:
    transformers.BertModel(small_model("bert").config).save_pretrained(tmp_path)
    assert type(loaded(tmp_path)).__name__ == "BertModel"
    assert type(empty_model(saved("bert"))).__name__ == "BertForMaskedLM"
    change_config(tmp_path, architectures=["LlamaForCausalLM"])
    # A class for another configuration is not believed.
    assert type(empty_model(tmp_path)).__name__ == "BertLMHeadModel"


def test_old_names_of_layer_norms_are_known(saved: Callable[[str], Path], tmp_path: Path) -> None:
    shutil.copytree(saved("bert"), tmp_path, dirs_exist_ok=True)

    def rename(tensors: dict[str, Tensor]) -> None:
        for name in [name for name in tensors if "LayerNorm" in name]:
            old = name.replace("Norm.weight", "Norm.gamma").replace("Norm.bias", "Norm.beta")
            tensors[old] = tensors.pop(name)
        # What models of that time held as well.
        tensors["bert.embeddings.position_ids"] = torch.arange(64)[None]

    change_tensors(tmp_path, rename)
    assert "bert.embeddings.LayerNorm.gamma" in load_file(tmp_path / "model.safetensors")
    assert torch.equal(logits_of(loaded(tmp_path)), logits_of(small_model("bert")))
    with CheckpointReader(tmp_path) as reader:
        assert ModelWeights(empty_model(tmp_path), reader).unused == ("bert.embeddings.position_ids",)


@pytest.mark.parametrize("family", ["llama", "bert", "llama-tied"])
def test_names_are_found_without_transformers_table_too(
    family: str, saved: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before 5.0 transformers has none, and its models have the experts apart."""
    monkeypatch.setattr(_key_map, "_transformers_renaming", lambda *_: None)
    assert torch.equal(logits_of(loaded(saved(family))), logits_of(small_model(family)))
    test_old_names_of_layer_norms_are_known(saved, tmp_path / "old")
    test_the_base_models_prefix_may_be_there_or_not(saved, tmp_path / "prefix")


# --- tied weights -----------------------------------------------------------------------------------------


def test_tied_weights_count_once_and_load_as_one(saved: Callable[[str], Path]) -> None:
    model = empty_model(saved("llama-tied"))
    with CheckpointReader(saved("llama-tied")) as reader:
        weights = ModelWeights(model, reader)
        assert "lm_head.weight" not in weights.names
        assert weights.tied_to("lm_head.weight") == "model.embed_tokens.weight"
        assert weights.tied_to("model.norm.weight") == "model.norm.weight"
        assert torch.equal(weights.read("lm_head.weight"), weights.read("model.embed_tokens.weight"))
        weights.load_module(model.model.embed_tokens, "model.embed_tokens")
        weights.load_module(model.lm_head, "lm_head")
        assert model.lm_head.weight is model.model.embed_tokens.weight
        weights.unload_module(model)
        assert model.lm_head.weight is model.model.embed_tokens.weight
        assert model.lm_head.weight.device.type == "meta"


@pytest.mark.parametrize("only", ["lm_head.weight", "model.embed_tokens.weight"])
def test_either_of_two_tied_names_will_do(only: str, saved: Callable[[str], Path], tmp_path: Path) -> None:
    shutil.copytree(saved("llama-tied"), tmp_path, dirs_exist_ok=True)
    change_tensors(tmp_path, lambda tensors: tensors.update({only: tensors.pop("model.embed_tokens.weight")}))
    model = loaded(tmp_path)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert torch.equal(logits_of(model), logits_of(small_model("llama-tied")))


@pytest.mark.parametrize("row", [None, 0, 95])
def test_two_stored_tensors_are_tied_only_if_they_are_equal(
    row: int | None, saved: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from auto_round.low_cpu_mem import _weights

    monkeypatch.setattr(_weights, "_COMPARED_BYTES", 1000)
    shutil.copytree(saved("llama-tied"), tmp_path, dirs_exist_ok=True)

    def add(tensors: dict[str, Tensor]) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        if row is not None:
            tensors["lm_head.weight"][row, 5] += 1

    change_tensors(tmp_path, add)
    model = loaded(tmp_path)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == (row is None)
    expected = transformers.LlamaForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits_of(model), logits_of(expected))


# --- pieces and rows --------------------------------------------------------------------------------------


def test_fused_experts_say_where_each_matrix_goes(saved: Callable[[str], Path]) -> None:
    model = empty_model(saved("mixtral"))
    stored = load_file(saved("mixtral") / "model.safetensors")
    with CheckpointReader(saved("mixtral")) as reader:
        weights = ModelWeights(model, reader)
        name = "model.layers.1.mlp.experts.gate_up_proj"
        old = "model.layers.1.block_sparse_moe.experts"
        found = sorted(weights.pieces(name), key=lambda piece: piece.source)
        assert found == [
            Piece(source=f"{old}.{expert}.{matrix}.weight", place=(expert, place), transposed=False)
            for expert in range(3)
            for matrix, place in (("w1", slice(0, 48)), ("w3", slice(48, 96)))
        ]
        info = weights.info(name)
        assert (info.shape, info.dtype, info.bytes) == ((3, 96, 32), torch.float32, 3 * 96 * 32 * 4)
        whole = weights.read(name)
        assert torch.equal(whole[2, 48:], stored[f"{old}.2.w3.weight"])
        for rows in (
            torch.tensor([2, 0, 2]),
            slice(1, 3),
            slice(None, None, -1),
            torch.tensor([], dtype=int),
        ):
            expected = whole.flip(0) if rows == slice(None, None, -1) else whole[rows]
            assert torch.equal(weights.read_rows(name, rows), expected)
        assert weights.read_rows(name, slice(0, 1), dtype=torch.float16).dtype == torch.float16
        for wrong in (torch.tensor([3]), torch.tensor([-1]), slice(0, 4)):
            with pytest.raises(CheckpointError, match=r"its 3 rows|rows are 0 to 2"):
                weights.read_rows(name, wrong)


def test_more_than_ten_experts_are_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    config = transformers.MixtralConfig(**{**SMALL, "num_local_experts": 12, "num_hidden_layers": 1})
    torch.manual_seed(0)
    model = transformers.MixtralForCausalLM(config).eval()
    model.save_pretrained(tmp_path)
    assert torch.equal(logits_of(loaded(tmp_path)), logits_of(model))


def test_experts_stored_the_other_way_round_are_turned(tmp_path: Path) -> None:
    transform: Any = __import__("transformers.core_model_loading", fromlist=["x"])
    stored = torch.randn(3, 4, 6)
    save_file({"experts.up": stored}, tmp_path / "model.safetensors")
    with CheckpointReader(tmp_path) as reader:
        converter = transform.WeightConverter(
            "experts.up", "experts.up", operations=[transform.Transpose(1, 2, check_dims=True)]
        )
        for shape, transposed in (((3, 6, 4), True), ((3, 4, 6), False)):
            pieces = _key_map._join(converter, {"experts.up": ["experts.up"]}, "experts.up", shape, reader)
            assert pieces == (Piece(source="experts.up", place=(), transposed=transposed),)
            module = nn.Module()
            module.register_parameter("up", nn.Parameter(torch.empty(shape, device="meta")))
            weights = ModelWeights.__new__(ModelWeights)
            weights.reader, weights._tied = reader, {"up": "up"}
            weights._pieces, weights._specs = {"up": pieces}, {"up": (torch.Size(shape), torch.float32)}
            expected = stored.mT if transposed else stored
            assert torch.equal(weights.read("up"), expected)
            assert torch.equal(weights.read_rows("up", torch.tensor([2, 1])), expected[[2, 1]])


def test_operations_that_are_not_known_are_refused_by_name(tmp_path: Path) -> None:
    transform: Any = __import__("transformers.core_model_loading", fromlist=["x"])
    save_file({"qkv": torch.zeros(6, 2)}, tmp_path / "model.safetensors")
    converter = transform.WeightConverter("qkv", ["q", "k", "v"], operations=[transform.Chunk(0)])
    with CheckpointReader(tmp_path) as reader, pytest.raises(CheckpointError, match=r"'q'.*operation Chunk"):
        _key_map._join(converter, {"qkv": ["qkv"]}, "q", (2, 2), reader)


# --- loading and unloading --------------------------------------------------------------------------------


def test_a_module_is_loaded_in_another_type_and_unloaded_in_its_own(saved: Callable[[str], Path]) -> None:
    model = empty_model(saved("llama"))
    with CheckpointReader(saved("llama")) as reader:
        weights = ModelWeights(model, reader)
        block = model.model.layers[1]
        before = dict(block.named_parameters())
        weights.load_module(block, "model.layers.1", dtype=torch.float64)
        assert {parameter.dtype for parameter in block.parameters()} == {torch.float64}
        assert {parameter.device.type for parameter in model.model.layers[0].parameters()} == {"meta"}
        stored = load_file(saved("llama") / "model.safetensors")["model.layers.1.mlp.up_proj.weight"]
        assert torch.equal(block.mlp.up_proj.weight, stored.double())
        weights.unload_module(block)
        assert all(parameter is before[name] for name, parameter in block.named_parameters())


def test_what_is_real_stays_and_a_module_alone_is_loaded_alone(saved: Callable[[str], Path]) -> None:
    model = empty_model(saved("llama"))
    with CheckpointReader(saved("llama")) as reader:
        weights = ModelWeights(model, reader)
        own = nn.Parameter(torch.ones(32))
        model.model.norm.weight = own
        weights.load_module(model.model, "model", recurse=False)
        assert model.model.embed_tokens.weight.device.type == "meta"
        weights.load_module(model, "")
        assert model.model.norm.weight is own
        weights.unload_module(model.model, recurse=False)
        assert model.model.norm.weight is own
        weights.unload_module(model)
        assert all(parameter.device.type == "meta" for parameter in model.parameters())


def test_persistent_buffers_and_plain_modules_are_loaded(tmp_path: Path) -> None:
    def build() -> nn.Module:
        return nn.Sequential(nn.Conv1d(3, 4, 2), nn.BatchNorm1d(4), nn.Flatten(), nn.Linear(8, 2))

    torch.manual_seed(0)
    model = build()
    model(torch.randn(5, 3, 3))
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with torch.device("meta"):
        empty = build()
    with CheckpointReader(tmp_path) as reader:
        weights = ModelWeights(empty, reader)
        weights.load_module(empty, "", dtype=torch.float64)
        assert empty[1].num_batches_tracked.dtype == torch.int64
        assert int(empty[1].num_batches_tracked) == 1
        assert torch.equal(empty[1].running_mean, model[1].running_mean.double())
        weights.unload_module(empty)
        assert {tensor.device.type for tensor in empty.state_dict().values()} == {"meta"}


def test_an_error_leaves_nothing_loaded(saved: Callable[[str], Path], tmp_path: Path) -> None:
    shutil.copytree(saved("llama"), tmp_path, dirs_exist_ok=True)
    model = empty_model(tmp_path)
    reader = CheckpointReader(tmp_path)
    weights = ModelWeights(model, reader)
    with (tmp_path / "model.safetensors").open("r+b") as file:
        file.truncate((tmp_path / "model.safetensors").stat().st_size // 2)
    with pytest.raises(CheckpointError, match="truncated"):
        weights.load_module(model, "")
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}


def test_threads_load_different_blocks(saved: Callable[[str], Path]) -> None:
    model = empty_model(saved("llama"))
    failures: list[BaseException] = []
    with CheckpointReader(saved("llama")) as reader:
        weights = ModelWeights(model, reader)

        def work(number: int) -> None:
            try:
                for _ in range(20):
                    weights.load_module(model.model.layers[number], f"model.layers.{number}")
                    weights.unload_module(model.model.layers[number])
                weights.load_module(model.model.layers[number], f"model.layers.{number}")
            except BaseException as failure:  # noqa: BLE001 - handed to the test
                failures.append(failure)

        threads = [threading.Thread(target=work, args=(number,)) for number in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        weights.load_module(model, "")
    assert not failures
    assert torch.equal(logits_of(model), logits_of(small_model("llama")))


# --- what does not fit ------------------------------------------------------------------------------------


def opened(folder: Path) -> ModelWeights:
    return ModelWeights(empty_model(folder), CheckpointReader(folder))


def test_a_missing_tensor_is_named(saved: Callable[[str], Path], tmp_path: Path) -> None:
    shutil.copytree(saved("llama"), tmp_path, dirs_exist_ok=True)
    change_tensors(tmp_path, lambda tensors: tensors.pop("model.layers.0.mlp.up_proj.weight"))
    with pytest.raises(CheckpointError, match=r"no tensor for 'model\.layers\.0\.mlp\.up_proj\.weight'"):
        opened(tmp_path)


def test_a_shard_that_the_index_leaves_out_is_named(tmp_path: Path) -> None:
    small_model("llama").save_pretrained(tmp_path, max_shard_size="60KB")
    index = tmp_path / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    shard = content["weight_map"]["model.layers.1.mlp.up_proj.weight"]
    content["weight_map"] = {name: file for name, file in content["weight_map"].items() if file != shard}
    index.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=rf"no tensor for .*its index places no tensor in '{shard}'"):
        opened(tmp_path)


def test_a_missing_expert_is_named(saved: Callable[[str], Path], tmp_path: Path) -> None:
    shutil.copytree(saved("mixtral"), tmp_path, dirs_exist_ok=True)
    prefix = "model.layers.0.block_sparse_moe.experts"
    change_tensors(tmp_path, lambda tensors: tensors.pop(f"{prefix}.1.w3.weight"))
    with pytest.raises(CheckpointError, match=r"gate_up_proj'.*3 of one kind, but 2 like '.*w3\.weight'"):
        opened(tmp_path)
    change_tensors(tmp_path, lambda tensors: [tensors.pop(f"{prefix}.{e}.w3.weight") for e in (0, 2)])
    with pytest.raises(CheckpointError, match=r"no tensor '\.experts\.\*\.w3\.weight', a part of"):
        opened(tmp_path)


def test_a_shape_that_disagrees_is_named_with_both(saved: Callable[[str], Path], tmp_path: Path) -> None:
    shutil.copytree(saved("llama"), tmp_path, dirs_exist_ok=True)
    name = "model.layers.1.mlp.down_proj.weight"
    change_tensors(tmp_path, lambda tensors: tensors.update({name: torch.zeros(32, 47)}))
    with pytest.raises(
        CheckpointError, match=rf"model\.safetensors: tensor '{name}' .*\(32, 47\).*\(32, 48\)"
    ):
        opened(tmp_path)


def test_an_expert_of_another_shape_is_named(saved: Callable[[str], Path], tmp_path: Path) -> None:
    shutil.copytree(saved("mixtral"), tmp_path, dirs_exist_ok=True)
    name = "model.layers.0.block_sparse_moe.experts.1.w2.weight"
    change_tensors(tmp_path, lambda tensors: tensors.update({name: torch.zeros(32, 7)}))
    with pytest.raises(CheckpointError, match=rf"'{name}' has shape \(32, 7\).*\(32, 48\)"):
        opened(tmp_path)
    # All of them wrong in the same way.
    change_config(tmp_path, intermediate_size=40)
    shutil.copy(saved("mixtral") / "model.safetensors", tmp_path)
    with pytest.raises(CheckpointError, match=r"\(3, 96, 32\).*\(3, 80, 32\)|\(3, 32, 48\).*\(3, 32, 40\)"):
        opened(tmp_path)


def test_quantised_weights_are_refused(saved: Callable[[str], Path], tmp_path: Path) -> None:
    shutil.copytree(saved("llama"), tmp_path, dirs_exist_ok=True)

    def pack(tensors: dict[str, Tensor]) -> None:
        del tensors["model.layers.0.mlp.up_proj.weight"]
        tensors["model.layers.0.mlp.up_proj.qweight"] = torch.zeros(4, 48, dtype=torch.int32)

    change_tensors(tmp_path, pack)
    with pytest.raises(CheckpointError, match="integers and scales of quantised weights"):
        opened(tmp_path)
    change_config(tmp_path, quantization_config={"quant_method": "gptq", "bits": 4})
    with pytest.raises(CheckpointError, match="quantised already, by 'gptq'"):
        empty_model(tmp_path)


def test_integers_are_not_taken_for_weights(saved: Callable[[str], Path], tmp_path: Path) -> None:
    name = "model.layers.1.mlp.down_proj"
    shutil.copytree(saved("llama"), tmp_path / "int8")
    cast = torch.float8_e4m3fn
    change_tensors(
        tmp_path / "int8",
        lambda tensors: tensors.update({f"{name}.weight": torch.ones(32, 48).to(torch.int8)}),
    )
    with pytest.raises(
        CheckpointError, match=rf"model\.safetensors: tensor '{name}\.weight' holds torch\.int8"
    ):
        opened(tmp_path / "int8")
    # Floats of 8 bits may be the weights themselves, unless there are scales to multiply them by.
    shutil.copytree(saved("llama"), tmp_path / "fp8")
    change_tensors(
        tmp_path / "fp8", lambda tensors: tensors.update({f"{name}.weight": torch.ones(32, 48).to(cast)})
    )
    assert float(opened(tmp_path / "fp8").read(f"{name}.weight").mean()) == 1
    change_tensors(
        tmp_path / "fp8", lambda tensors: tensors.update({f"{name}.weight_scale_inv": torch.ones(1, 1)})
    )
    with pytest.raises(
        CheckpointError, match=r"holds torch\.float8_e4m3fn, where the model has floating-point"
    ):
        opened(tmp_path / "fp8")


def test_names_that_the_model_lacks_are_refused(saved: Callable[[str], Path]) -> None:
    weights = opened(saved("llama"))
    with pytest.raises(CheckpointError, match=r"did you mean .*'model\.norm\.weight'"):
        weights.read("model.norn.weight")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "config.json does not exist"),
        ("{", "not valid JSON"),
        ("[]", "must hold a JSON object"),
        ("{}", "has no model_type"),
        ('{"model_type": "martian"}', "no model_type 'martian'; a newer transformers"),
        (
            '{"model_type": "martian", "auto_map": {"AutoConfig": "evil.Config"}}',
            "brings code for it; pass trust_remote_code=True",
        ),
        ('{"model_type": "llama", "hidden_size": "wide"}', "config.json"),
        ('{"model_type": "llama", "dtype": "float33"}', "config.json"),
    ],
)
def test_a_configuration_that_cannot_be_used_is_named(
    tmp_path: Path, content: str | None, message: str
) -> None:
    (tmp_path / "evil.py").write_text("raise SystemExit('ran')")
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(CheckpointError, match=message):
        empty_model(tmp_path)


def test_a_path_that_is_no_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="missing does not exist"):
        empty_model(tmp_path / "missing")
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="is a file"):
        empty_model(tmp_path / "file")
    with pytest.raises(CheckpointError, match="hf download nobody/nothing-of-this-name"):
        empty_model("nobody/nothing-of-this-name")
    for path in ("", "a\0b"):
        with pytest.raises(CheckpointError, match="is empty or has a zero byte"):
            empty_model(path)


def test_remote_code_runs_only_when_asked_for(saved: Callable[[str], Path], tmp_path: Path) -> None:
    shutil.copytree(saved("llama"), tmp_path, dirs_exist_ok=True)
    mark = tmp_path / "ran"
    (tmp_path / "modeling_own.py").write_text(
        f"import pathlib\npathlib.Path({str(mark)!r}).touch()\n"
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "class OwnModel(LlamaForCausalLM):\n    pass\n"
    )
    change_config(tmp_path, auto_map={"AutoModelForCausalLM": "modeling_own.OwnModel"})
    assert type(empty_model(tmp_path)).__name__ == "LlamaForCausalLM"
    assert not mark.exists()
    assert type(empty_model(tmp_path, trust_remote_code=True)).__name__ == "OwnModel"
    assert mark.exists()


def test_arguments_that_nothing_reads_are_refused(saved: Callable[[str], Path]) -> None:
    with pytest.raises(ConfigurationError, match="atn_implementation"):
        empty_model(saved("llama"), atn_implementation="eager")
    with pytest.raises(ConfigurationError, match=r"dtype is torch\.int8"):
        empty_model(saved("llama"), dtype=torch.int8)
    with pytest.raises(ConfigurationError, match="must be a model class"):
        empty_model(saved("llama"), nn.Linear)
    model: Any = empty_model(saved("llama"), attn_implementation="eager", rms_norm_eps=0.25)
    assert model.config._attn_implementation == "eager"
    assert model.model.norm.variance_epsilon == 0.25


def test_without_transformers_the_error_says_how_to_get_it(
    saved: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(name: str) -> Any:
        raise ImportError(name)

    monkeypatch.setattr(_empty.importlib, "import_module", fail)
    with pytest.raises(MissingPackageError, match=r"pip install .*transformers"):
        empty_model(saved("llama"))


def test_other_threads_build_ordinary_modules_meanwhile(
    saved: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[nn.Linear] = []
    original = transformers.LlamaForCausalLM._from_config.__func__

    def build(kind: Any, *args: Any, **kwargs: Any) -> Any:
        thread = threading.Thread(target=lambda: made.append(nn.Linear(2, 2)))
        thread.start()
        thread.join()
        return original(kind, *args, **kwargs)

    monkeypatch.setattr(transformers.LlamaForCausalLM, "_from_config", classmethod(build))
    before = nn.Module.register_parameter
    model = empty_model(saved("llama"))
    assert made[0].weight.device.type == "cpu"
    assert next(model.parameters()).device.type == "meta"
    assert nn.Module.register_parameter is before
