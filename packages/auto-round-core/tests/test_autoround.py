"""What `AutoRound` promises, on a small Llama and on modules of a few weights."""

import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from auto_round import AutoRound
from auto_round.exceptions import (
    AutoRoundError,
    CalibrationError,
    CheckpointError,
    ConfigurationError,
    ExportError,
    QuantizationError,
)
from auto_round.export._auto_round import read_layer
from auto_round.quantization import QuantizationReport, _autoround, _walk
from auto_round.quantization._quantized import QuantizedWeight
from auto_round.quantization._rtn import quantize_rtn
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

QUANTIZATION: dict[str, Any] = {
    "bits": 3,
    "group_size": 32,
    "iters": 10,
    "nsamples": 6,
    "seqlen": 16,
    "batch_size": 4,
}


class Quick:
    """Quantises, and closes everything at the end of the test."""

    def __init__(self, ids: Tensor) -> None:
        self.ids, self.made = ids, list[AutoRound]()

    def open(self, model: Any, data: Any = "ids", memory: Any = None, **fields: Any) -> AutoRound:
        config = {"quantization": {**QUANTIZATION, **fields}, "memory": memory or {}}
        given = self.ids if isinstance(data, str) else data
        self.made.append(AutoRound(model, config=config, calibration=given, progress=False))
        return self.made[-1]

    def __call__(self, model: Any, data: Any = "ids", memory: Any = None, **fields: Any) -> AutoRound:
        rounder = self.open(model, data, memory, **fields)
        rounder.quantize()
        return rounder


@pytest.fixture
def quick(calibration_ids: Tensor) -> Iterator[Quick]:
    quick = Quick(calibration_ids)
    yield quick
    for rounder in quick.made:
        rounder.close()


@pytest.fixture
def llama(saved_model: Callable[[str], Path]) -> str:
    return str(saved_model("llama"))


@pytest.fixture
def in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Signs of gradients do not depend on how sums are rounded."""
    monkeypatch.setattr(_autoround, "choose_dtype", lambda device: torch.float32)


@pytest.fixture
def planned(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Return a function that has every plan replaced in the fields that it is given."""
    original = _autoround.make_plan

    def plan(**fields: Any) -> None:
        monkeypatch.setattr(_autoround, "make_plan", lambda *given: replace(original(*given), **fields))

    return plan


def weights_of(rounder: AutoRound) -> dict[str, QuantizedWeight]:
    assert rounder._store is not None
    return {name: rounder._store.read(name) for name in rounder._store.layers}


def same(one: AutoRound, other: AutoRound) -> bool:
    left, right = weights_of(one), weights_of(other)
    return left.keys() == right.keys() and all(
        torch.equal(weight.codes, right[name].codes) and torch.equal(weight.scale, right[name].scale)
        for name, weight in left.items()
    )


def tensors_in(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def losses(rounder: AutoRound) -> list[tuple[float, float]]:
    return [(float(block.loss_before or 0), float(block.loss_after or 0)) for block in rounder.report.blocks]


# --- exactness --------------------------------------------------------------------------------------------


class OneLinear(nn.Module):
    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.embedding = nn.Embedding(8, weight.shape[1])
        linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        linear.weight.data.copy_(weight)
        self.blocks = nn.ModuleList([nn.Sequential(linear)])

    def forward(self, ids: Tensor) -> Tensor:
        return self.blocks[0](self.embedding(ids))


def test_a_matrix_worked_out_by_hand(quick: Quick) -> None:
    """Scales of 0.2 become 0.199951171875 in float16, which takes 0.5 units to 0.5001 and so to 1."""
    model = OneLinear(torch.tensor([[0.4, -0.1, 0.2, 0.0], [-0.4, 0.1, 0.3, 0.2]]))
    rounder = quick(model, None, iters=0, bits=2, group_size=-1)
    (weight,) = weights_of(rounder).values()
    s = 0.199951171875
    assert weight.scale.flatten().tolist() == [-s, s]
    assert (weight.codes.int() - 2).tolist() == [[-2, 1, -1, 0], [-2, 1, 1, 1]]
    expected = torch.tensor([[2 * s, -s, s, 0.0], [-2 * s, s, s, s]])
    assert model.blocks[0][0].weight.tolist() == expected.tolist()


@pytest.mark.parametrize(
    "fields",
    [
        {"quality": "signround"},
        {"quality": "signround", "symmetric": False, "bits": 2},
        {"quality": "best", "bits": 4, "end_to_end_iters": 0},
        {"quality": "best", "symmetric": False, "end_to_end_iters": 0},
        {"weight_dtype": "mxfp4", "bits": None, "group_size": None},
        {"weight_dtype": "nvfp4", "bits": None, "group_size": None},
        {"weight_dtype": "fp8", "bits": None, "group_size": None},
    ],
    ids=str,
)
def test_the_weights_that_the_block_was_run_with_are_those_that_are_written(
    fields: dict[str, Any],
    llama: str,
    quick: Quick,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    in_float32: None,
) -> None:
    ran: dict[str, Tensor] = {}
    finish = _walk.Walk._pass

    def watched(self: Any, run: Any, inputs: Any, outputs: Any, name: str, targets: Any = None) -> float:
        if targets is not None and outputs is not None:
            block = self._source.model.get_submodule(name)
            ran.update({f"{name}.{key}": value.detach().clone() for key, value in block.named_parameters()})
        return finish(self, run, inputs, outputs, name, targets)

    monkeypatch.setattr(_walk.Walk, "_pass", watched)
    rounder = quick(llama, **fields)
    formats = ["fake"] if "weight_dtype" in fields else ["fake", "auto_round"]
    folders = {name: rounder.save(tmp_path / name, name)[0] for name in formats}
    fake, float_weights = tensors_in(folders["fake"]), tensors_in(Path(llama))
    for name, weight in weights_of(rounder).items():
        assert torch.equal(weight.dequantize(), ran[f"{name}.weight"]), name
        assert torch.equal(fake[f"{name}.weight"], ran[f"{name}.weight"]), name
        if "auto_round" in formats:
            assert torch.equal(read_layer(folders["auto_round"], name).dequantize(), ran[f"{name}.weight"])
        if "weight_dtype" not in fields:
            # What was trained is something else than what is rounded to nearest.
            with torch.no_grad():
                plain = quantize_rtn(float_weights[f"{name}.weight"], weight.settings, torch.float16)
            assert not torch.equal(plain.dequantize(), ran[f"{name}.weight"]), name


# --- settings ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", range(2, 9))
def test_bits(bits: int, symmetric: bool, llama: str, quick: Quick) -> None:
    rounder = quick(llama, bits=bits, symmetric=symmetric, iters=2)
    for weight in weights_of(rounder).values():
        assert (weight.settings.bits, weight.settings.symmetric) == (bits, symmetric)
        assert int(weight.codes.max()) < 2**bits
        assert (weight.zero is None) == symmetric
    # Each bit is worth 6 dB.
    sqnr = np.mean([layer.sqnr_db for layer in rounder.report.layers])
    assert 6 * bits - 9 < sqnr < 6 * bits + 1


@pytest.mark.parametrize("group_size", [32, 64, 128, -1])
def test_group_sizes(group_size: int, random_model: Callable[..., Any], quick: Quick) -> None:
    sizes = {"hidden_size": 128, "intermediate_size": 256}
    rounder = quick(random_model("llama", **sizes), group_size=group_size, iters=2)
    for weight in weights_of(rounder).values():
        width = weight.codes.shape[1]
        assert weight.scale.shape[1] == (1 if group_size == -1 else width // group_size)


def test_layers_of_their_own_settings_and_layers_left_out(llama: str, quick: Quick) -> None:
    rounder = quick(
        llama,
        iters=2,
        ignore_layers=["lm_head", r"layers\.1\.self_attn\..*"],
        layer_config={"down_proj": {"bits": 8}, "model.layers.0.mlp.up_proj": {"group_size": 16, "bits": 2}},
    )
    found = {name: weight.settings for name, weight in weights_of(rounder).items()}
    assert len(found) == 14 - 4
    assert not any("1.self_attn" in name for name in found)
    bits = {name.removeprefix("model.layers."): settings.bits for name, settings in found.items()}
    assert (bits["0.mlp.down_proj"], bits["1.mlp.down_proj"], bits["0.mlp.up_proj"]) == (8, 8, 2)
    assert set(bits.values()) == {2, 3, 8}
    assert found["model.layers.0.mlp.up_proj"].group_size == 16


def test_a_block_that_is_left_out_whole_is_passed_through(llama: str, quick: Quick) -> None:
    rounder = quick(llama, ignore_layers=["lm_head", r"layers\.0\..*"])
    first, second = rounder.report.blocks
    assert (first.layers, first.loss_before, first.best_step) == ((), None, None)
    # The second is given what the float model gives it.
    alone = quick(llama, enable_quanted_input=False).report.blocks[1]
    assert second.loss_before == alone.loss_before


@pytest.mark.parametrize(
    ("fields", "error", "match"),
    [
        ({"layer_config": {"nothing": {"bits": 2}}}, ConfigurationError, "'nothing', which is no layer"),
        ({"ignore_layers": [".*"]}, QuantizationError, "all layers of .* are left out"),
        ({"group_size": 128}, QuantizationError, r"q_proj has rows of 64 weights.*groups of 128"),
        ({"seqlen": 65}, ConfigurationError, "at most 64 tokens"),
        ({"calibration": "mixed", "given": None}, CalibrationError, "needs calibration, and there is none"),
        ({"quality": "best", "given": None}, CalibrationError, "needs calibration, and there is none"),
    ],
    ids=str,
)
def test_what_can_be_known_is_said_at_once(
    fields: dict[str, Any], error: type[Exception], match: str, llama: str, quick: Quick
) -> None:
    fields = dict(fields)
    given = fields.pop("given", "ids")
    with pytest.raises(error, match=match):
        quick.open(llama, given, **fields)


def test_a_path_that_cannot_be_is_refused_before_the_work(llama: str, quick: Quick) -> None:
    rounder = quick.open(llama)
    for path in ("", "a\0b"):
        with pytest.raises(ConfigurationError, match="a path that is not empty and has no zero byte"):
            rounder.quantize_and_save(path)
    with pytest.raises(QuantizationError, match="nothing is quantised yet"):
        _ = rounder.report


def test_on_a_gpu_no_more_samples_at_once_than_the_configuration_allows(
    llama: str, quick: Quick, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(_autoround, "choose_device", lambda name: torch.device("cuda"))
    monkeypatch.setattr(_autoround, "choose_dtype", lambda device: torch.bfloat16)
    for limit, at_once in ((3, 3), (8, 4)):
        rounder = quick.open(llama, memory={"gpu_batch_size": limit}, batch_size=4, compile=False)
        report = QuantizationReport(model=llama, configuration={})
        means = rounder._plan(quick.ids, tmp_path, report)
        assert (means.device.type, means.micro_batch) == ("cuda", at_once)


def test_a_head_is_quantised_where_it_is_named_and_its_own(
    llama: str, quick: Quick, saved_model: Callable[[str], Path], tmp_path: Path
) -> None:
    named = {"ignore_layers": [], "layer_config": {"lm_head": {"bits": 8}}}
    rounder = quick(llama, iters=2, **named)
    (head,) = rounder.report.outside
    assert (head.name, head.settings.bits) == ("lm_head", 8)
    (folder,) = rounder.save(tmp_path / "fake", "fake")
    before, after = (tensors_in(path)["lm_head.weight"] for path in (Path(llama), folder))
    assert torch.equal(after, quantize_rtn(before, head.settings, torch.float16).dequantize())
    assert "lm_head" not in quick(llama, iters=2, ignore_layers=[]).layers
    with pytest.raises(QuantizationError, match="lm_head shares its weight with the embedding"):
        quick.open(str(saved_model("llama-tied")), **named)


# --- methods ----------------------------------------------------------------------------------------------


def test_no_steps_round_to_nearest_and_read_no_calibration(llama: str, quick: Quick) -> None:
    weights = weights_of(quick(llama, None, iters=0))
    float_weights = tensors_in(Path(llama))
    for name, weight in weights.items():
        plain = quantize_rtn(float_weights[f"{name}.weight"], weight.settings, torch.float16)
        assert torch.equal(plain.codes, weight.codes)
        assert torch.equal(plain.scale, weight.scale)
    assert same(quick(llama, None, quality="rtn"), quick(llama, None, iters=0))


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("quality", ["optimized_rtn", "signround", "best"])
def test_every_method_is_better_than_rounding(
    quality: str, symmetric: bool, llama: str, quick: Quick
) -> None:
    rounder = quick(llama, quality=quality, symmetric=symmetric, iters=20, bits=2)
    for before, after in losses(rounder):
        assert after < 0.9 * before


def test_what_is_kept_is_the_best_step(llama: str, quick: Quick) -> None:
    """A rate far too high makes all later steps worse: what is kept is the first, rounded to nearest."""
    rounder = quick(llama, lr=50.0, minmax_lr=1e-9)
    for block in rounder.report.blocks:
        assert min(block.step_losses[1:]) > 1.5
        assert block.best_step == 0
        assert block.loss_after == pytest.approx(block.loss_before)
    assert same(rounder, quick(llama, None, iters=0))


def test_inputs_of_blocks_are_those_of_the_quantised_model_or_the_float_one(llama: str, quick: Quick) -> None:
    plain = {"quality": "optimized_rtn", "bits": 2}
    on, off = (quick(llama, enable_quanted_input=flag, **plain) for flag in (True, False))
    assert losses(on)[0] == losses(off)[0]
    # Errors of the first block come on top of the second's own.
    assert losses(on)[1][0] > 1.5 * losses(off)[1][0]


@pytest.mark.usefixtures("in_float32")
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_the_loss_of_the_last_block_is_that_of_the_models_hidden_states(
    family: str, random_model: Callable[..., Any], quick: Quick
) -> None:
    """The blocks of Gemma 3 differ in their masks and positions: each must have had its own."""
    model = random_model(family)
    hidden: list[Tensor] = []
    model.model.layers[1].register_forward_hook(
        lambda module, given, output: hidden.append(output if isinstance(output, Tensor) else output[0])
    )
    model(quick.ids)
    before = hidden.pop()
    rounder = quick(model)
    hidden.clear()
    model(quick.ids)
    assert losses(rounder)[1][1] == pytest.approx(F.mse_loss(hidden.pop(), before).item(), rel=1e-3)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_whether_the_caller_takes_gradients_does_not_matter(
    mode: Callable[[], Any], llama: str, quick: Quick
) -> None:
    with mode():
        inside = quick(llama, iters=3)
        assert not torch.is_grad_enabled()
    assert same(inside, quick(llama, iters=3))


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
@pytest.mark.parametrize("dynamic", [True, False])
def test_activations_of_8_bits_are_part_of_what_is_trained_against(
    dynamic: bool, family: str, saved_model: Callable[[str], Path], quick: Quick
) -> None:
    folder = str(saved_model(family))
    fields: dict[str, Any] = {"bits": 8, "quality": "optimized_rtn", "act_dynamic": dynamic}
    rounded, plain = (losses(quick(folder, act_bits=bits, **fields)) for bits in (8, 16))
    # Weights of 8 bits lose as little as activations of 8 bits: both together lose more. In Mixtral other
    # experts may be chosen, which outweighs both.
    if family == "mixtral":
        assert rounded[0][1] != plain[0][1]
    else:
        assert all(loss > 1.1 * without for (_, loss), (_, without) in zip(rounded, plain, strict=True))
    trained = losses(quick(folder, act_bits=8, act_dynamic=dynamic, bits=2))
    assert all(after < before for before, after in trained)


# --- batches, seeds, and what is left alone ---------------------------------------------------------------


@pytest.mark.usefixtures("in_float32")
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_how_a_batch_is_split_does_not_matter(
    family: str, saved_model: Callable[[str], Path], quick: Quick, planned: Callable[..., None]
) -> None:
    folder = str(saved_model(family))
    whole = quick(folder, batch_size=5)
    planned(micro_batch=2, spills=True)
    # Parts of 2, 2 and 1: a call for one sample is made on the way.
    parts = quick(folder, batch_size=5)
    for one, other in zip(losses(whole), losses(parts), strict=True):
        assert one == pytest.approx(other, rel=1e-3)
    ours, theirs = weights_of(whole), weights_of(parts)
    differing = sum(int((ours[name].codes != theirs[name].codes).sum()) for name in ours)
    assert differing <= 1e-3 * sum(weight.codes.numel() for weight in ours.values())
    assert any("kept on disk" in note for note in parts.report.notes)
    assert any("in parts of 2" in note for note in parts.report.notes)


@pytest.mark.usefixtures("in_float32")
def test_accumulated_batches_are_one_batch(llama: str, quick: Quick) -> None:
    whole = quick(llama, batch_size=4)
    parts = quick(llama, batch_size=2, gradient_accumulate_steps=2)
    other = quick(llama, batch_size=2)
    ours, theirs, others = (weights_of(rounder) for rounder in (whole, parts, other))
    weights = sum(weight.codes.numel() for weight in ours.values())
    assert sum(int((ours[name].codes != theirs[name].codes).sum()) for name in ours) <= 1e-3 * weights
    assert sum(int((ours[name].codes != others[name].codes).sum()) for name in ours) > 0.02 * weights


def test_a_seed_repeats_everything_whatever_the_global_state(
    llama: str, quick: Quick, tmp_path: Path
) -> None:
    torch.manual_seed(1)
    random.seed(1)
    np.random.seed(1)
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()
    one = quick(llama, seed=3)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert all(np.array_equal(a, b) for a, b in zip(np.random.get_state(), states[2], strict=True))
    torch.manual_seed(2)
    random.seed(2)
    other = quick(llama, seed=3)
    files = []
    for name, rounder in (("one", one), ("other", other)):
        (folder,) = rounder.save(tmp_path / name, "auto_round")
        files.append({path.name: path.read_bytes() for path in folder.glob("*.safetensors")})
    assert files[0] == files[1]
    assert not same(one, quick(llama, seed=4))


@pytest.mark.parametrize("calibration", ["self", "mixed"])
def test_text_that_the_model_writes(calibration: str, llama: str, quick: Quick) -> None:
    state = torch.get_rng_state()
    given = quick.ids if calibration == "mixed" else None
    rounder = quick(llama, given, calibration=calibration, iters=20)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(after < before for before, after in losses(rounder))
    assert same(rounder, quick(llama, given, calibration=calibration, iters=20))
    assert not same(rounder, quick(llama))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_module_in_memory_keeps_its_flags_and_types(
    dtype: torch.dtype, random_model: Callable[..., Any], quick: Quick
) -> None:
    model = random_model("gpt2", dtype=dtype)
    model.train()
    model.transformer.h[1].mlp.eval()
    model.transformer.wte.weight.requires_grad_(False)

    def state() -> Any:
        flags = [module.training for module in model.modules()]
        kinds = [(name, id(p), p.requires_grad, p.dtype, p.grad) for name, p in model.named_parameters()]
        return (
            flags,
            kinds,
            model.config.use_cache,
            [vars(module).get("forward") for module in model.modules()],
        )

    before = state()
    values = {name: value.clone() for name, value in model.state_dict().items()}
    rounder = quick(model)
    assert state() == before
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, values[name])}
    assert changed == {f"{name}.weight" for name in rounder.layers}


# --- bad input --------------------------------------------------------------------------------------------


def changed_copy(folder: str, target: Path, change: Callable[[dict[str, Tensor]], None]) -> str:
    shutil.copytree(folder, target)
    for path in target.glob("*.safetensors"):
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path, metadata={"format": "pt"})
    return str(target)


def test_checkpoints_that_are_not_whole_are_refused_at_once(llama: str, quick: Quick, tmp_path: Path) -> None:
    name = "model.layers.1.mlp.up_proj.weight"

    def narrow(tensors: dict[str, Tensor]) -> None:
        if name in tensors:
            tensors[name] = tensors[name][:, :63].clone()

    with pytest.raises(CheckpointError, match=rf"'{name}' has shape .*63.*64"):
        quick.open(changed_copy(llama, tmp_path / "shape", narrow))
    shutil.copytree(llama, tmp_path / "shard")
    shard = sorted((tmp_path / "shard").glob("*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(CheckpointError, match=f"{shard.name} does not exist"):
        quick.open(str(tmp_path / "shard"))
    shutil.copytree(llama, tmp_path / "config")
    (tmp_path / "config" / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"config\.json does not exist"):
        quick.open(str(tmp_path / "config"))
    with pytest.raises(CheckpointError, match="missing does not exist"):
        quick.open(str(tmp_path / "missing"))
    with pytest.raises(ConfigurationError, match="there is no model"):
        quick.open(None)


@pytest.mark.parametrize("quality", ["rtn", "optimized_rtn", "signround", "best"])
def test_damaged_weights_are_named_before_any_block_is_worked_on(
    quality: str, llama: str, quick: Quick, tmp_path: Path
) -> None:
    def damage(tensors: dict[str, Tensor]) -> None:
        for name in tensors:
            if name.endswith("1.mlp.up_proj.weight"):
                tensors[name][3, 4] = float("nan")

    rounder = quick.open(changed_copy(llama, tmp_path / "nan", damage), quality=quality)
    with pytest.raises(QuantizationError, match=r"model\.layers\.1\.mlp\.up_proj.*1 of 6144 weights are NaN"):
        rounder.quantize()
    with pytest.raises(QuantizationError, match="nothing is quantised yet"):
        rounder.save(tmp_path / "out", "fake")
    assert not (tmp_path / "out").exists()


def test_damaged_embeddings_are_named(random_model: Callable[..., Any], quick: Quick) -> None:
    model = random_model("llama")
    model.model.embed_tokens.weight.data[int(quick.ids[5, 3]), 0] = float("inf")
    with pytest.raises(QuantizationError, match="embeddings of LlamaForCausalLM give NaN or infinity"):
        quick(model)


class Letters:
    """A tokenizer of letters."""

    eos_token_id = 2

    def __call__(self, text: str) -> dict[str, list[int]]:
        return {"input_ids": [3 + ord(letter) % 90 for letter in text]}


def test_calibration_that_does_not_do(llama: str, quick: Quick) -> None:
    ids = quick.ids
    beyond = ids.clone()
    beyond[2, 3] = 96
    for data, match in (
        (beyond, "row 2 .* token id 96 at place 3, but ids are 0 to 95"),
        (-ids, "token id -.* but ids are 0 to 95"),
        (ids.float(), "whole numbers, but holds a tensor of torch.float32"),
        (ids.float() * float("nan"), "whole numbers, but holds a tensor of torch.float32"),
        (ids.to_sparse(), "whole numbers, but holds a tensor of torch.int64 on cpu, torch.sparse_coo"),
        (ids[:, :15], "15 tokens, fewer than one sequence of 16"),
    ):
        with pytest.raises(CalibrationError, match=match):
            quick(llama, data)
    config = {"quantization": QUANTIZATION}
    with (
        AutoRound(llama, Letters(), config, calibration=["too short"], progress=False) as rounder,
        pytest.raises(CalibrationError, match="holds 9 tokens, fewer than one sequence of 16"),
    ):
        rounder.quantize()


def test_fewer_samples_than_asked_for_are_noted(llama: str, quick: Quick) -> None:
    with pytest.warns(UserWarning, match="holds 6 sequences of 16 tokens, not the 9"):
        report = quick(llama, iters=1, nsamples=9).report
    assert any("6 samples, not the 9" in note for note in report.notes)
    assert not any("samples" in note for note in quick(llama, iters=1).report.notes)


def test_a_tokenizer_without_its_files_is_none(llama: str) -> None:
    config = {"quantization": QUANTIZATION}
    with (
        AutoRound(llama, config=config, calibration=["some text " * 50], progress=False) as rounder,
        pytest.raises(CalibrationError, match="tokenizer"),
    ):
        rounder.quantize()


def test_the_default_type_of_tensors_does_not_matter(llama: str, quick: Quick) -> None:
    fields: list[dict[str, Any]] = [
        {},
        {"quality": "best"},
        {"quality": "rtn", "weight_dtype": "nvfp4", "bits": 4, "group_size": 16},
        {"weight_dtype": "fp8", "bits": 8, "group_size": -1},
    ]
    expected = [quick(llama, **one) for one in fields]
    torch.set_default_dtype(torch.bfloat16)
    try:
        found = [quick(llama, **one) for one in fields]
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(same(*pair) for pair in zip(found, expected, strict=True))


def test_text_is_calibrated_with(llama: str) -> None:
    config = {"quantization": {**QUANTIZATION, "iters": 1, "nsamples": 2}}
    with AutoRound(
        llama, Letters(), config, calibration=["text that is long " * 9], progress=False
    ) as rounder:
        assert len(rounder.quantize().layers) == 14


# --- the disk, and ends that are not happy ----------------------------------------------------------------


@pytest.mark.parametrize("kind", ["file", "under a file"])
def test_a_workspace_that_cannot_be_is_an_error_of_the_configuration(
    kind: str, llama: str, quick: Quick, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    folder = tmp_path / "file" if kind == "file" else tmp_path / "file" / "work"
    with pytest.raises(ConfigurationError, match=r"cannot be written to .*memory\.workspace_dir"):
        quick(llama, memory={"workspace_dir": str(folder)})


def test_a_full_workspace_leaves_nothing(
    llama: str, quick: Quick, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("auto_round.quantization._results._save", full)
    with pytest.raises(ExportError, match=r"block-00000\.safetensors cannot be written.*No space left"):
        quick(llama, memory={"workspace_dir": str(tmp_path)})
    assert list(tmp_path.iterdir()) == []


def test_a_model_is_never_there_without_its_report(
    llama: str, quick: Quick, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    rounder = quick(llama, iters=0)
    with monkeypatch.context() as patch:
        patch.setattr("auto_round.quantization._autoround.save_html", full)
        with pytest.raises(ExportError, match=r"out cannot be written: No space left.*export_path"):
            rounder.save(tmp_path / "out", "fake")
    assert list(tmp_path.iterdir()) == []
    rounder.save(tmp_path / "out", "fake")
    assert (tmp_path / "out" / "quantization_report.html").is_file()


def test_results_wait_in_the_workspace_until_they_are_let_go(llama: str, tmp_path: Path) -> None:
    config = {
        "quantization": {**QUANTIZATION, "iters": 0},
        "memory": {"workspace_dir": str(tmp_path / "new" / "work")},
    }
    with AutoRound(llama, config=config, progress=False) as rounder:
        rounder.quantize()
        rounder.quantize()
        (waiting,) = (tmp_path / "new" / "work").iterdir()
        assert len(list(waiting.iterdir())) == 2
    assert list((tmp_path / "new" / "work").iterdir()) == []
    with pytest.raises(QuantizationError, match="nothing is quantised yet"):
        _ = rounder.report


@pytest.mark.parametrize("spills", [False, True])
@pytest.mark.parametrize("kind", ["folder", "module"])
def test_an_interrupt_leaves_nothing_behind(
    kind: str,
    spills: bool,
    llama: str,
    random_model: Callable[..., Any],
    quick: Quick,
    planned: Callable[..., None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    planned(spills=spills)
    model = random_model("llama")
    flags = [(p.requires_grad, p.dtype, p.device.type) for p in model.parameters()]
    rounder = quick.open(model if kind == "module" else llama)
    files = {path.name for path in Path("/proc/self/fd").iterdir()}
    original, count = _walk.tune_block, []

    def interrupted(*given: Any, **named: Any) -> Any:
        count.append(1)
        if len(count) == 2:
            raise KeyboardInterrupt
        return original(*given, **named)

    monkeypatch.setattr(_walk, "tune_block", interrupted)
    with pytest.raises(KeyboardInterrupt):
        rounder.quantize()
    assert list(tmp_path.iterdir()) == []
    assert {path.name for path in Path("/proc/self/fd").iterdir()} == files
    assert [(p.requires_grad, p.dtype, p.device.type) for p in model.parameters()] == flags
    assert not any("forward" in vars(module) for module in model.modules())
    assert model(quick.ids).logits.isfinite().all()
    monkeypatch.setattr(_walk, "tune_block", original)
    # From a folder all is as if nothing had been.
    rounder.quantize()
    if kind == "folder":
        assert same(rounder, quick(llama))


@pytest.mark.skipif(sys.platform != "linux", reason="kills a process")
def test_a_process_that_is_killed_leaves_nothing_under_the_exports_name(llama: str, tmp_path: Path) -> None:
    script = f"""
import torch, time, pathlib
from auto_round import AutoRound
from auto_round.export import _fake
from auto_round.export._shards import write_shards
def slow(folder, plan, most):
    write_shards(folder, plan, most)
    pathlib.Path({str(tmp_path)!r}, "mark").touch()
    time.sleep(180)
_fake.write_shards = slow
config = {{"quantization": {{"iters": 0, "group_size": 32}}}}
AutoRound({llama!r}, config=config, progress=False).quantize_and_save({str(tmp_path / "out")!r}, "fake")
"""
    process = subprocess.Popen([sys.executable, "-c", script], env={**os.environ, "OMP_NUM_THREADS": "1"})
    try:
        end = time.monotonic() + 180
        while not (tmp_path / "mark").exists() and process.poll() is None and time.monotonic() < end:
            time.sleep(0.05)
        assert (tmp_path / "mark").exists()
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert not (tmp_path / "out").exists()


# --- memory -----------------------------------------------------------------------------------------------


def test_too_little_memory_is_refused_with_what_would_do(llama: str, quick: Quick) -> None:
    with pytest.raises(ConfigurationError, match=r"memory\.max_ram_mb is 1, but .*at least \d+") as failure:
        quick(llama, memory={"max_ram_mb": 1})
    words = str(failure.value).split("at least ")[1]
    enough = int(words.split(",")[0])
    # What the process holds may grow a little from one call to the next.
    rounder = quick(llama, memory={"max_ram_mb": enough + 24})
    assert all(after < before for before, after in losses(rounder))
    with pytest.raises(AutoRoundError):
        quick(llama, memory={"max_ram_mb": enough // 2})
