"""Float models from a folder and in memory, side by side."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from auto_round.config_manager import QuantizationConfig
from auto_round.exceptions import CheckpointError, ConfigurationError, QuantizationError
from auto_round.quantization._layers import find_layers
from auto_round.quantization._rtn import quantize_rtn
from auto_round.quantization._source import (
    CheckpointModel,
    FloatModel,
    ModuleModel,
    block_layers,
    open_model,
)
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

CPU = torch.device("cpu")
FAMILIES = ["llama", "llama-tied", "gpt2", "mixtral", "bert", "opt"]


def config(**fields: Any) -> QuantizationConfig:
    return QuantizationConfig(group_size=32, **fields)


def values_of(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


@pytest.fixture
def opened(saved_model: Callable[[str], Path]) -> Any:
    sources: list[FloatModel] = []

    def open_it(family: str) -> FloatModel:
        sources.append(open_model(str(saved_model(family))))
        return sources[-1]

    yield open_it
    for source in sources:
        source.close()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_folder_and_a_module_give_the_same_blocks_and_weights(
    family: str, random_model: Callable[..., Any], opened: Callable[[str], FloatModel]
) -> None:
    module = random_model(family)
    stored, held = opened(family), open_model(module)
    assert isinstance(stored, CheckpointModel)
    assert isinstance(held, ModuleModel)
    assert stored.block_names == held.block_names
    assert stored.kind == held.kind == type(module).__name__
    assert (stored.vocab_size, stored.max_tokens) == (held.vocab_size, held.max_tokens) == (96, 64)
    layers = {layer.name: layer for layer in held.all_layers()}
    assert [layer.name for layer in stored.all_layers()] == list(layers)
    for layer in stored.all_layers():
        found = stored.read(layer, CPU)
        assert found.dtype == torch.float32
        assert found.is_contiguous()
        assert torch.equal(found, held.read(layers[layer.name], CPU))
        found.fill_(7)
    for dtype in (torch.float32, torch.bfloat16):
        blocks = [source.load(1, CPU, dtype) for source in (stored, held)]
        found, wanted = (values_of(block) for block in blocks)
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[name], wanted[name]) for name in found)
        assert {value.dtype for value in found.values() if value.is_floating_point()} == {dtype}
        assert not any(block.training for block in blocks)
        stored.finish(1, {})
    assert all(parameter.is_meta for parameter in stored.model.parameters())


def test_what_is_loaded_is_a_copy_and_what_is_read_too(random_model: Callable[..., Any]) -> None:
    model = random_model("llama")
    before = values_of(model)
    source = ModuleModel(model)
    for parameter in source.load(0, CPU, torch.float32).parameters():
        parameter.data.fill_(1)
    source.read(next(source.all_layers()), CPU).fill_(1)
    assert all(torch.equal(value, before[name]) for name, value in values_of(model).items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_module_takes_over_quantised_weights_and_nothing_else(
    dtype: torch.dtype, random_model: Callable[..., Any]
) -> None:
    model = random_model("gpt2", dtype=dtype)
    before = values_of(model)
    source = ModuleModel(model)
    name = source.block_names[1]
    weights = {
        layer.name: quantize_rtn(source.read(layer, CPU), settings, torch.float16)
        for layer, settings in block_layers(source.blocks[1], name, config(bits=2))
    }
    source.finish(1, weights)
    after = values_of(model)
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    assert changed == {f"{layer}.weight" for layer in weights}
    for layer, weight in weights.items():
        assert torch.equal(after[f"{layer}.weight"].t(), weight.dequantize(dtype))
        assert after[f"{layer}.weight"].dtype == dtype


def test_what_comes_before_the_blocks_is_run_in_evaluation_mode_and_left_as_it_was(
    random_model: Callable[..., Any],
) -> None:
    model = random_model("gpt2")
    model.train()
    model.transformer.h[0].eval()
    before = [module.training for module in model.modules()]
    source = ModuleModel(model)

    def fail_within() -> None:
        with source.callable_head() as head:
            assert not any(module.training for module in head.modules())
            raise KeyError

    with pytest.raises(KeyError):
        fail_within()
    assert [module.training for module in model.modules()] == before
    assert not any(module.training for module in source.load(1, CPU, torch.float32).modules())


@pytest.mark.parametrize("limit", [None, 1])
def test_the_whole_model_is_loaded_or_streamed_and_let_go(
    limit: int | None,
    opened: Callable[[str], FloatModel],
    random_model: Callable[..., Any],
    calibration_ids: Tensor,
) -> None:
    source = opened("llama")
    with torch.no_grad():
        expected = random_model("llama")(calibration_ids).logits
        with source.whole_model(limit) as model:
            assert model.lm_head.weight.is_meta == (limit is not None)
            assert torch.equal(model(calibration_ids).logits, expected)
    assert all(parameter.is_meta for parameter in source.model.parameters())


def test_layers_outside_the_blocks_only_where_they_are_named(opened: Callable[[str], FloatModel]) -> None:
    named = {"ignore_layers": (), "layer_config": {"lm_head": {"bits": 8}}}
    assert list(opened("llama").outside(config())) == []
    assert list(opened("llama").outside(config(ignore_layers=()))) == []
    ((layer, settings),) = opened("llama").outside(config(**named))
    assert (layer.name, settings.bits) == ("lm_head", 8)
    for family in ("llama-tied", "gpt2"):
        with pytest.raises(QuantizationError, match="lm_head shares its weight with the embedding"):
            list(opened(family).outside(config(**named)))


@pytest.mark.parametrize(
    ("name", "place", "value"),
    [
        ("model.layers.1.mlp.up_proj.weight", (3, 4), float("nan")),
        ("model.layers.0.input_layernorm.weight", (5,), float("inf")),
        ("lm_head.weight", (0, 0), -float("inf")),
    ],
)
def test_weights_that_are_not_finite_are_named(
    name: str, place: tuple[int, ...], value: float, saved_model: Callable[[str], Path], tmp_path: Path
) -> None:
    shutil.copytree(saved_model("llama"), tmp_path, dirs_exist_ok=True)
    wanted = config(ignore_layers=(), layer_config={"lm_head": {}})
    source = CheckpointModel(tmp_path)
    source.check_finite(wanted)
    source.close()
    for path in tmp_path.glob("*.safetensors"):
        tensors = load_file(path)
        if name in tensors:
            tensors[name][place] = value
            save_file(tensors, path, metadata={"format": "pt"})
    source = CheckpointModel(tmp_path)
    with pytest.raises(QuantizationError, match=rf"^{name}: 1 of \d+ weights are NaN or infinite"):
        source.check_finite(wanted)
    if name.startswith("lm_head"):
        source.check_finite(config())
    source.close()


def test_groups_must_divide_the_inputs_of_each_layer(random_model: Callable[..., Any]) -> None:
    for family, name, width in (
        ("llama", "self_attn.q_proj", 64),
        ("gpt2", "attn.c_attn", 64),
        ("mixtral", "self_attn.q_proj", 64),
    ):
        source = ModuleModel(random_model(family))
        with pytest.raises(QuantizationError, match=rf"{name} has rows of {width} weights.*groups of 128"):
            block_layers(source.blocks[0], source.block_names[0], QuantizationConfig(group_size=128))
        assert block_layers(source.blocks[0], source.block_names[0], QuantizationConfig(group_size=-1))
    # Experts are [.., 96, 64]; along the wrong side the group would divide.
    experts = ModuleModel(random_model("mixtral")).blocks[0].mlp.experts
    sizes = {layer.name: layer.weight.shape[-1] for layer in find_layers(experts, "experts")}
    assert sizes == {"experts.gate_up_proj": 64, "experts.down_proj": 96}
    left = QuantizationConfig(group_size=48, layer_config={".*gate_up_proj|.*_proj": {"group_size": 32}})
    assert len(block_layers(experts, "experts", left)) == 2


def test_models_that_cannot_be_worked_on_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="the model is a int"):
        open_model(3)  # pyright: ignore
    with torch.device("meta"):
        empty = nn.ModuleDict({"blocks": nn.ModuleList(nn.Sequential(nn.Linear(2, 2)) for _ in range(2))})
    with pytest.raises(ConfigurationError, match=r"blocks\.0\.0\.weight has no values"):
        open_model(empty)
    with pytest.raises(CheckpointError, match=r"has no weights: none of model\.safetensors"):
        open_model(tmp_path)


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_are_those_of_the_whole_weight(
    family: str, random_model: Callable[..., Any], opened: Callable[[str], FloatModel]
) -> None:
    for source in (
        opened(family),
        open_model(random_model(family)),
        open_model(random_model(family).bfloat16()),
    ):
        for layer in source.all_layers():
            whole, rows = source.read(layer, CPU), source.rows(layer, CPU)
            assert tuple(rows.shape) == tuple(whole.shape)
            for part in (slice(0, 1), slice(3, 20), slice(0, len(whole))):
                assert torch.equal(rows[part], whole[part])
                assert rows[part].is_contiguous()
                assert rows[part].dtype == torch.float32


def test_weights_that_lie_in_rows_are_not_held(
    random_model: Callable[..., Any], opened: Callable[[str], FloatModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    for source in (opened("llama"), open_model(random_model("llama")), open_model(random_model("gpt2"))):
        with monkeypatch.context() as patch:
            patch.setattr(source, "read", None)
            assert all(source.rows(layer, CPU)[:2].shape[0] == 2 for layer in source.all_layers())
    # On disk GPT-2's are columns of the matrix.
    transposed = opened("gpt2")
    assert {transposed.gives_rows(layer) for layer in transposed.all_layers() if layer.transposed} == {False}
