"""The converter against from_pretrained, and what it leaves on disk and in the models."""

import gc
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from auto_round import low_cpu_mem
from auto_round.config_manager import config_scope
from auto_round.exceptions import CheckpointError, ConfigurationError
from auto_round.low_cpu_mem import HookManager, ModelConverter, _spill, convert_model
from auto_round.low_cpu_mem._streamed import StreamedWeight
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

TOKENS = torch.tensor([[3, 9, 9, 45, 4], [5, 3, 8, 7, 0]])


@pytest.fixture(scope="session")
def original() -> Any:
    torch.manual_seed(1)
    config = transformers.LlamaConfig(
        vocab_size=48,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=32,
    )
    return transformers.LlamaForCausalLM(config).eval()


@pytest.fixture(scope="session")
def expected(original: Any) -> Tensor:
    return logits_of(original)


@pytest.fixture(scope="session")
def folder(original: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("llama")
    original.save_pretrained(path, max_shard_size="4KB")
    return path


@pytest.fixture
def legacy(folder: Path, original: Any, tmp_path: Path) -> Path:
    """Two shards as torch before 1.6 wrote them, and their index."""
    path = tmp_path / "legacy"
    path.mkdir()
    shutil.copy(folder / "config.json", path)
    state = original.state_dict()
    weight_map: dict[str, str] = {}
    for number in (1, 2):
        name = f"pytorch_model-{number:05}-of-00002.bin"
        names = [key for index, key in enumerate(state) if index % 2 == number - 1]
        shard = {key: state[key].clone() for key in names}
        torch.save(shard, path / name, _use_new_zipfile_serialization=False)
        weight_map |= dict.fromkeys(names, name)
    (path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return path


@torch.no_grad()
def logits_of(model: Any) -> Tensor:
    return model(input_ids=TOKENS, attention_mask=torch.ones_like(TOKENS)).logits


def hooked(model: nn.Module) -> bool:
    return "forward" in vars(model) or any(module._forward_pre_hooks for module in model.modules())


def on_meta(model: nn.Module) -> bool:
    return all(tensor.is_meta for tensor in model.state_dict().values())


def test_the_room_gives_what_the_contract_names() -> None:
    assert set(low_cpu_mem.__all__) == {
        *("ModelConverter", "convert_model", "TensorUtils", "HookManager", "register_hooks"),
        *("load", "loads", "dump", "dumps"),
    }
    assert all(hasattr(low_cpu_mem, name) for name in low_cpu_mem.__all__)


# --- its steps --------------------------------------------------------------------------------------------


def test_the_steps_one_after_the_other(folder: Path, expected: Tensor) -> None:
    converter = ModelConverter(folder, transformers.AutoModelForCausalLM, "cpu")
    assert converter.model is None
    empty = converter.load_empty_model()
    assert empty is converter.model
    assert on_meta(empty)
    assert not hooked(empty)
    assert all(parameter.requires_grad for parameter in empty.parameters())
    prepared = converter.prepare_model_for_conversion()
    assert prepared is empty
    assert on_meta(prepared)
    assert not hooked(prepared)
    assert not any(parameter.requires_grad for parameter in prepared.parameters())
    manager = converter.add_hooks()
    assert isinstance(manager, HookManager)
    assert manager is converter.hook_manager
    assert manager.model is empty
    assert hooked(empty)
    assert torch.equal(logits_of(empty), expected)
    assert on_meta(empty)
    # Asked for again, other hooks take their place.
    assert converter.add_hooks(clean_weights=False) is not manager
    assert manager.handles == []
    assert not any(isinstance(parameter, StreamedWeight) for parameter in empty.parameters())
    assert torch.equal(logits_of(empty), expected)
    assert not any(parameter.is_meta for parameter in empty.parameters())
    assert converter.load_empty_model() is not empty
    assert converter.hook_manager is None


def test_a_model_with_hooks_in_one_call(folder: Path, expected: Tensor) -> None:
    converter = ModelConverter(str(folder), device="cpu")
    model = converter.load_model_with_hooks()
    assert model is converter.model
    assert torch.equal(logits_of(model), expected)
    assert on_meta(model)
    assert torch.equal(logits_of(convert_model(folder, None, "cpu", None)), expected)
    model = convert_model(folder, transformers.LlamaForCausalLM, "cpu", None, clean_weights=False)
    assert torch.equal(logits_of(model), expected)
    assert not on_meta(model)


def test_prepared_is_checked_before_anything_is_read(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "intermediate_size": 25}))
    converter = ModelConverter(tmp_path, device="cpu")
    converter.load_empty_model()
    with pytest.raises(CheckpointError, match=r"'model\.layers\.0\.mlp\..*has shape .*24.*25"):
        converter.prepare_model_for_conversion()


def test_convert_leaves_the_converters_own_model_alone(folder: Path, expected: Tensor) -> None:
    converter = ModelConverter(folder, device="cpu")
    own = converter.load_empty_model()
    made = converter.convert()
    again = converter.convert(inplace=False)
    assert len({id(own), id(made), id(again)}) == 3
    assert converter.model is own
    assert not hooked(own)
    assert on_meta(own)
    assert all(parameter.requires_grad for parameter in own.parameters())
    assert torch.equal(logits_of(made), expected)
    assert torch.equal(logits_of(again), expected)
    assert converter.convert(inplace=True) is own
    assert torch.equal(logits_of(own), expected)
    assert ModelConverter(folder, device="cpu").convert(inplace=True) is not own


@pytest.mark.parametrize("clean", [True, False])
def test_convert_follows_the_configuration(folder: Path, clean: bool) -> None:
    with config_scope(memory={"clean_weights_after_use": clean}):
        for inplace in (True, False):
            model = ModelConverter(folder, device="cpu").convert(inplace)
            logits_of(model)
            assert on_meta(model) == clean
        model = ModelConverter(folder, device="cpu").convert(clean_weights=not clean)
        logits_of(model)
        assert on_meta(model) != clean


def test_a_converted_model_outlives_its_converter(folder: Path, expected: Tensor) -> None:
    model = convert_model(folder, device="cpu")
    gc.collect()
    assert torch.equal(logits_of(model), expected)


def test_options_reach_the_model(folder: Path) -> None:
    model: Any = convert_model(
        folder, device="cpu", dtype=torch.bfloat16, attn_implementation="eager", rms_norm_eps=0.5
    )
    assert model.config._attn_implementation == "eager"
    wanted = transformers.LlamaForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16, attn_implementation="eager", rms_norm_eps=0.5
    )
    assert torch.equal(logits_of(model), logits_of(wanted))
    base = convert_model(folder, transformers.AutoModel, "cpu")
    assert type(base).__name__ == "LlamaModel"


def test_remote_code_is_never_run_unless_asked_for(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    mark = tmp_path / "ran"
    (tmp_path / "modeling_mine.py").write_text(
        f"import pathlib\npathlib.Path({str(mark)!r}).touch()\n"
        "from transformers import LlamaForCausalLM\nclass Mine(LlamaForCausalLM):\n    pass\n"
    )
    config = json.loads((tmp_path / "config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "modeling_mine.Mine"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    ModelConverter(tmp_path, device="cpu").load_model_with_hooks()
    ModelConverter(tmp_path, transformers.AutoModelForCausalLM, "cpu").load_model_with_hooks()
    assert not mark.exists()
    convert_model(tmp_path, device="cpu", trust_remote_code=True)
    assert mark.exists()


def test_what_cannot_be_is_said_at_once(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="does not exist"):
        ModelConverter(tmp_path / "missing")
    with pytest.raises(ConfigurationError, match="device is 'tpu'"):
        ModelConverter(folder, device="tpu")
    with pytest.raises(
        CheckpointError, match=r"describes no model that BertModel can build: .*type_vocab_size"
    ):
        ModelConverter(folder, transformers.BertModel, device="cpu").load_empty_model()


# --- the disk ---------------------------------------------------------------------------------------------


def files_in(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


@pytest.mark.parametrize("place", ["save_path", "workspace_dir"])
def test_nothing_is_written_where_nothing_must_be(
    folder: Path, expected: Tensor, tmp_path: Path, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_spill.tempfile, "tempdir", str(tmp_path))
    before = files_in(folder)
    work = tmp_path / "work"
    with config_scope(memory={"workspace_dir": str(work) if place == "workspace_dir" else None}):
        model = convert_model(folder, device="cpu", save_path=work if place == "save_path" else None)
        assert torch.equal(logits_of(model), expected)
    assert files_in(tmp_path) == set()
    assert files_in(folder) == before


@pytest.mark.parametrize("place", ["save_path", "workspace_dir", None])
def test_old_torch_files_are_converted_for_as_long_as_they_are_needed(
    legacy: Path,
    original: Any,
    expected: Tensor,
    tmp_path: Path,
    place: str | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(_spill.tempfile, "tempdir", str(tmp_path))
    before = files_in(legacy)
    work = tmp_path / "deep" / "work"
    with config_scope(memory={"workspace_dir": str(work) if place == "workspace_dir" else None}):
        converter = ModelConverter(legacy, device="cpu", save_path=work if place == "save_path" else None)
        model = converter.load_model_with_hooks()
    spilled = list((tmp_path if place is None else work).glob("auto-round-*"))
    assert len(spilled) == 1
    assert files_in(spilled[0]) == {f"model-0000{number}-of-00002.safetensors" for number in (1, 2)}
    found = {name: tensor for path in spilled[0].iterdir() for name, tensor in load_file(path).items()}
    assert all(torch.equal(found[name], tensor) for name, tensor in original.state_dict().items())
    assert torch.equal(logits_of(model), expected)
    assert on_meta(model)
    assert files_in(legacy) == before
    assert converter.hook_manager is not None
    converter.hook_manager.remove_hooks()
    del model, converter, found
    gc.collect()
    assert not spilled[0].exists()


def test_old_torch_files_that_go_wrong_leave_nothing(
    legacy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = tmp_path / "work"
    (legacy / "pytorch_model-00002-of-00002.bin").write_bytes(b"nonsense")
    with pytest.raises(CheckpointError):
        convert_model(legacy, device="cpu", save_path=work)
    assert files_in(work) == set()
    blocked = tmp_path / "blocked"
    blocked.touch()
    with pytest.raises(ConfigurationError, match="blocked' cannot be written to"):
        convert_model(legacy, device="cpu", save_path=blocked)


def test_old_torch_files_beside_safetensors_are_not_touched(
    legacy: Path, original: Any, expected: Tensor, tmp_path: Path
) -> None:
    save_file(
        {name: tensor.clone() for name, tensor in original.state_dict().items()}, legacy / "model.safetensors"
    )
    model = convert_model(legacy, device="cpu", save_path=tmp_path / "work")
    assert torch.equal(logits_of(model), expected)
    assert not (tmp_path / "work").exists()


# --- memory -----------------------------------------------------------------------------------------------


def memory_mb(field: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:")) / 1024


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_forward_pass_takes_little_memory(tmp_path: Path) -> None:
    """160 MB of weights: 64 MB each in embedding and head, and two layers of 16 MB."""
    config = transformers.LlamaConfig(
        vocab_size=32768,
        hidden_size=512,
        intermediate_size=2048,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=8,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path)
    gc.collect()
    with torch.inference_mode():
        model = convert_model(tmp_path, device="cpu")
        tokens = torch.arange(8)[None]
        model(input_ids=tokens[:, :1], use_cache=False)
        Path("/proc/self/clear_refs").write_text("5")
        before = memory_mb("VmRSS")
        model(input_ids=tokens, use_cache=False)
        # A chunk of the head is 16 MB, the largest other weight 4 MB.
        assert memory_mb("VmHWM") - before < 24
        Path("/proc/self/clear_refs").write_text("5")
        loaded = transformers.LlamaForCausalLM.from_pretrained(tmp_path)
        loaded(input_ids=tokens, use_cache=False)
        # The head alone.
        assert memory_mb("VmHWM") - before > 64
