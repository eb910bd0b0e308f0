"""Files of tensors against safetensors and torch, tensors put into modules, and devices by name."""

import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from auto_round.exceptions import CheckpointError, ConfigurationError, UnsafeFileError
from auto_round.low_cpu_mem import TensorUtils, _tensor_utils
from safetensors.torch import load_file
from torch import Tensor, nn


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 4)
        self.block = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
        self.head = nn.Linear(4, 5, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("computed", torch.arange(3.0), persistent=False)


class Attack:
    def __reduce__(self) -> Any:
        return os.system, ("touch /nowhere",)


@pytest.fixture
def module() -> Small:
    torch.manual_seed(0)
    return Small()


# --- files ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["new/state.pt", "new/state.safetensors", "state.bin"])
def test_a_state_comes_back(module: Small, tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    TensorUtils.save_tensor_state(module, path)
    expected = module.state_dict()
    independent = load_file(path) if path.suffix == ".safetensors" else torch.load(path, weights_only=True)
    for state in (TensorUtils.load_tensor_state(path), independent):
        assert state.keys() == expected.keys()
        assert "computed" not in state
        for key, tensor in state.items():
            assert tensor.dtype == expected[key].dtype
            assert torch.equal(tensor, expected[key])
    # Nothing but the file is left behind.
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


def test_views_and_half_tensors_are_saved_whole(tmp_path: Path) -> None:
    module = nn.Module()
    base = torch.arange(12.0).reshape(3, 4)
    module.register_buffer("turned", base.T)
    module.register_buffer("part", base[1])
    module.register_buffer("short", base.to(torch.bfloat16))
    module.register_buffer("empty", torch.empty(0, 3))
    TensorUtils.save_tensor_state(module, tmp_path / "state.safetensors")
    state = load_file(tmp_path / "state.safetensors")
    assert torch.equal(state["turned"], base.T)
    assert torch.equal(state["part"], base[1])
    assert torch.equal(state["short"], base.to(torch.bfloat16))
    assert state["empty"].shape == (0, 3)
    assert (tmp_path / "state.safetensors").stat().st_size < 1000


@pytest.mark.parametrize("name", ["state.pt", "state.safetensors"])
def test_a_failed_save_leaves_the_old_file(
    module: Small, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / name
    TensorUtils.save_tensor_state(module, path)
    before = path.read_bytes()
    for function in ("save_file", "dump"):

        def fail(*_: Any, **__: Any) -> None:
            raise OSError("disk full")

        monkeypatch.setattr(_tensor_utils, function, fail)
    with pytest.raises(OSError, match="disk full"):
        TensorUtils.save_tensor_state(module, path)
    module.head.weight = nn.Parameter(torch.empty(5, 4, device="meta"))
    with pytest.raises(CheckpointError, match=r"'head\.weight' is on the meta device"):
        TensorUtils.save_tensor_state(module, path)
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == [name]


def test_what_is_no_state_is_refused_and_nothing_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "state.pt"
    path.write_bytes(pickle.dumps(Attack()))
    ran: list[str] = []
    monkeypatch.setattr(os, "system", ran.append)
    with pytest.raises(UnsafeFileError, match="system"):
        TensorUtils.load_tensor_state(path)
    torch.save({"a": torch.ones(1), "b": 3}, path)
    with pytest.raises(CheckpointError, match="does not hold tensors by name, but a dict"):
        TensorUtils.load_tensor_state(path)
    path.write_bytes(pickle.dumps([1, 2]))
    with pytest.raises(CheckpointError, match="but a list"):
        TensorUtils.load_tensor_state(path)
    with pytest.raises(CheckpointError, match="does not exist"):
        TensorUtils.load_tensor_state(tmp_path / "missing.pt")
    assert not ran


# --- tensors in modules -----------------------------------------------------------------------------------


def test_a_tensor_is_set_by_its_nested_name(module: Small) -> None:
    value = torch.arange(12.0, dtype=torch.float64).reshape(3, 4)
    TensorUtils.set_module_tensor_to_device(module, "block.0.weight", "cpu", value, dtype=torch.float16)
    assert isinstance(module.block[0].weight, nn.Parameter)
    assert module.block[0].weight.requires_grad
    assert torch.equal(module.block[0].weight, value.half())
    TensorUtils.set_module_tensor_to_device(module, "block.0.weight", "cpu", value)
    assert module.block[0].weight.dtype == torch.float64
    TensorUtils.set_module_tensor_to_device(module, "block.1.running_mean", "cpu", torch.full((3,), 7.0))
    assert module.block[1].running_mean.tolist() == [7, 7, 7]
    assert "running_mean" in dict(module.block[1].named_buffers())
    # A type is for floating-point values.
    counted = torch.tensor(9)
    TensorUtils.set_module_tensor_to_device(
        module, "block.1.num_batches_tracked", "cpu", counted, dtype=torch.float16
    )
    assert module.block[1].num_batches_tracked.dtype == torch.int64


def test_to_meta_and_back_keeps_what_is_tied(module: Small) -> None:
    value = module.embed.weight.detach().clone()
    TensorUtils.set_module_tensor_to_device(module, "head.weight", "meta")
    assert module.embed.weight is module.head.weight
    assert module.embed.weight.is_meta
    assert module.embed.weight.shape == (5, 4)
    with pytest.raises(CheckpointError, match=r"'embed\.weight' is on the meta device and has no values"):
        TensorUtils.set_module_tensor_to_device(module, "embed.weight", "cpu")
    TensorUtils.set_module_tensor_to_device(module, "embed.weight", "cpu", value)
    assert module.embed.weight is module.head.weight
    assert torch.equal(module.head.weight, value)


def test_without_a_value_the_type_changes_in_place(module: Small) -> None:
    before = module.block[0].bias.detach().clone()
    TensorUtils.set_module_tensor_to_device(module, "block.0.bias", "cpu", dtype=torch.bfloat16)
    assert torch.equal(module.block[0].bias, before.bfloat16())


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("block.0.weight", torch.zeros(4, 3), r"'block\.0\.weight' has shape \(3, 4\), .* has \(4, 3\)"),
        ("block.0.wait", torch.zeros(1), r"no parameter or buffer 'block\.0\.wait'; Linear has"),
        ("block.9.weight", torch.zeros(1), r"no 'block\.9\.weight'"),
        ("block", torch.zeros(1), r"no parameter or buffer 'block'"),
    ],
)
def test_what_does_not_fit_is_refused(module: Small, name: str, value: Tensor, message: str) -> None:
    before = {key: tensor.clone() for key, tensor in module.state_dict().items()}
    with pytest.raises(CheckpointError, match=message):
        TensorUtils.set_module_tensor_to_device(module, name, "cpu", value)
    assert all(torch.equal(tensor, before[key]) for key, tensor in module.state_dict().items())


# --- devices and memory -----------------------------------------------------------------------------------


def see_devices(monkeypatch: pytest.MonkeyPatch, count: int, version: str | None = "13.0") -> None:
    monkeypatch.setattr(torch.version, "cuda", version)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        *((None, "cuda"), ("auto", "cuda"), ("cuda", "cuda"), ("cuda:1", "cuda:1"), (1, "cuda:1")),
        *(("cpu", "cpu"), (torch.device("cpu"), "cpu"), (torch.device("cuda", 0), "cuda:0")),
    ],
)
def test_devices_are_known_by_name_and_number(
    monkeypatch: pytest.MonkeyPatch, given: Any, expected: str
) -> None:
    see_devices(monkeypatch, 2)
    assert TensorUtils.detect_device(given) == torch.device(expected)


def test_without_cuda_auto_is_the_cpu_and_cuda_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    see_devices(monkeypatch, 0)
    assert TensorUtils.detect_device("auto") == torch.device("cpu")
    with pytest.raises(ConfigurationError, match="sees no CUDA device; use cpu"):
        TensorUtils.detect_device("cuda")
    with pytest.raises(ConfigurationError, match="sees no CUDA device"):
        TensorUtils.detect_device(0)
    see_devices(monkeypatch, 0, None)
    with pytest.raises(ConfigurationError, match="built without CUDA"):
        TensorUtils.detect_device("cuda:0")


@pytest.mark.parametrize("given", ["gpu", "cuda:x", "cuda:-1", "mps", "meta", 1.0, True, "", -1])
def test_other_devices_are_refused_with_what_is_allowed(given: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    see_devices(monkeypatch, 2)
    with pytest.raises(ConfigurationError, match="it can be auto, cpu, cuda, cuda:N"):
        TensorUtils.detect_device(given)


def test_a_number_beyond_the_last_device_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    see_devices(monkeypatch, 2)
    with pytest.raises(ConfigurationError, match="device is 2, but torch sees 2 CUDA devices"):
        TensorUtils.detect_device(2)


def test_memory_is_cleared() -> None:
    tensors = [torch.zeros(1000), torch.zeros(1000)]
    assert TensorUtils.clear_memory(tensors).freed_bytes == 8000
    assert tensors == []
    single = torch.zeros(1000)
    assert TensorUtils.clear_memory(single).freed_bytes == 4000
    assert TensorUtils.clear_memory().freed_bytes == 0
