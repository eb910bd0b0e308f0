"""Training of all scales together, against plain autograd and torch's own divergence."""

import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from auto_round import AutoRound
from auto_round.config_manager import QuantizationConfig
from auto_round.exceptions import AutoRoundError, CalibrationError, ConfigurationError, ExportError
from auto_round.quantization import _autoround, _end_to_end, _plan
from auto_round.quantization._end_to_end import EndToEnd, split
from auto_round.quantization._growth import grown_scale
from auto_round.quantization._layers import find_layers
from auto_round.quantization._quantized import QuantizedWeight
from auto_round.quantization._scales import ScaledBlocks
from auto_round.quantization._source import open_model
from auto_round.quantization._tail import Tail, divergence
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

FIELDS: dict[str, Any] = {
    "quality": "rtn",
    "bits": 2,
    "group_size": 32,
    "nsamples": 6,
    "seqlen": 16,
    "batch_size": 4,
    "end_to_end_iters": 4,
    "end_to_end_lr": 1e-2,
}
FAMILIES = ["llama", "gpt2", "opt", "gemma2", "mixtral"]


@pytest.fixture(autouse=True)
def in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_autoround, "choose_dtype", lambda device: torch.float32)


@pytest.fixture
def quick(calibration_ids: Tensor) -> Iterator[Callable[..., AutoRound]]:
    """Return a function that quantises a model; all is closed after the test."""
    made: list[AutoRound] = []

    def run(model: Any, *, data: Any = "ids", memory: Any = None, starts: bool = True, **fields: Any) -> Any:
        config = {"quantization": {**FIELDS, **fields}, "memory": memory or {}}
        given_ids = calibration_ids if isinstance(data, str) else data
        made.append(AutoRound(model, config=config, calibration=given_ids, progress=False))
        if starts:
            made[-1].quantize()
        return made[-1]

    yield run
    for rounder in made:
        rounder.close()


@pytest.fixture
def planned(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    original = _plan.make_plan

    def plan(**fields: Any) -> None:
        monkeypatch.setattr(_autoround, "make_plan", lambda *args: replace(original(*args), **fields))

    return plan


def weights_of(rounder: AutoRound) -> dict[str, QuantizedWeight]:
    assert rounder._store is not None
    return {name: rounder._store.read(name) for name in rounder._store.layers}


def parts_of(weights: dict[str, QuantizedWeight]) -> dict[str, tuple[Any, ...]]:
    """Codes, zero points and scales as values that can be compared."""
    return {
        name: (
            weight.codes.tolist(),
            None if weight.zero is None else weight.zero.tolist(),
            weight.scale.dtype,
            weight.scale.float().tolist(),
        )
        for name, weight in weights.items()
    }


def logits_of(model: Any, ids: Tensor) -> Tensor:
    return model(ids, attention_mask=torch.ones_like(ids)).logits


def torchs_divergence(logits: Tensor, wanted: Tensor) -> Tensor:
    """A mean over tokens, by torch."""
    pair = (x.flatten(0, -2).log_softmax(-1) for x in (logits, wanted))
    return F.kl_div(*pair, reduction="batchmean", log_target=True)


# --- the loss ---------------------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), size=st.floats(0.01, 30), tokens=st.integers(1, 4), dtype=st.booleans())
def test_the_divergence_and_its_gradient_are_those_of_torch(
    seed: int, size: float, tokens: int, dtype: bool
) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits, wanted = (torch.randn(2, tokens, 11, generator=generator) * size for _ in range(2))
    if dtype:
        logits, wanted = logits.bfloat16(), wanted.bfloat16()
    mine, theirs = (logits.clone().requires_grad_() for _ in range(2))
    loss = divergence(mine, wanted)
    expected = torchs_divergence(theirs.double(), wanted.double()) * 2 * tokens
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4, abs=1e-5)
    loss.backward()
    expected.backward()
    assert mine.grad is not None
    assert theirs.grad is not None
    torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-2 if dtype else 1e-4, atol=1e-6)


def test_what_both_models_rule_out_adds_nothing() -> None:
    logits, wanted = torch.tensor([[1.0, 2.0, -torch.inf]]), torch.tensor([[0.5, 0.0, -torch.inf]])
    expected = torchs_divergence(logits[:, :2], wanted[:, :2])
    assert float(divergence(logits, wanted)) == pytest.approx(float(expected))


@pytest.mark.parametrize("family", ["llama", "llama-tied", "gpt2", "opt", "gemma2", "bert"])
def test_the_tail_gives_the_models_own_logits(
    family: str,
    random_model: Callable[..., Any],
    saved_model: Callable[[str], Path],
    calibration_ids: Tensor,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = random_model(family)
    last: list[Tensor] = []
    block = open_model(model).blocks[-1]
    handle = block.register_forward_hook(
        lambda module, args, output: last.append(output if isinstance(output, Tensor) else output[0])
    )
    with torch.no_grad():
        expected = logits_of(model, calibration_ids)
    handle.remove()
    for pieces in (1 << 22, 96 * 5):
        monkeypatch.setattr("auto_round.quantization._tail._PIECE_VALUES", pieces)
        for given_model in (model, str(saved_model(family))):
            source = open_model(given_model)
            tail = Tail(source)
            assert (tail.vocabulary, tail._by_token) == (96, True)
            before = {name: id(p) for name, p in source.model.named_parameters()}
            parameters = tail.load(torch.device("cpu"), torch.float32)
            with source.callable_head():
                with torch.no_grad():
                    found = tail._run(calibration_ids, last[0], parameters)
                    assert torch.allclose(found, expected, atol=1e-5)
                # Half as large, the hidden states give other logits: all of them are looked at.
                loss, _ = tail.divergence(calibration_ids, last[0], last[0] / 2, (parameters, parameters))
                other = tail._run(calibration_ids, last[0] / 2, parameters)
            assert loss / calibration_ids.numel() == pytest.approx(
                float(torchs_divergence(other, found)), rel=1e-4, abs=1e-6
            )
            assert {name: id(p) for name, p in source.model.named_parameters()} == before
            assert not any("forward" in vars(module) for module in source.model.modules())
            source.close()


# --- gradients --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "symmetric"),
    [("llama", True), ("llama", False), ("gpt2", False), ("mixtral", True), ("gemma3", True)],
)
def test_gradients_of_scales_are_those_of_plain_autograd(
    family: str,
    symmetric: bool,
    random_model: Callable[..., Any],
    quick: Callable[..., AutoRound],
    planned: Callable[..., None],
    calibration_ids: Tensor,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    gradients: dict[str, Tensor] = {}
    original = ScaledBlocks.step

    def step(self: Any, index: int, block: Any, rate: float, count: int) -> None:
        for one in block.trained:
            gradients[one.layer.name] = one.gradient.clone()
        original(self, index, block, rate, count)

    monkeypatch.setattr(ScaledBlocks, "step", step)
    # Parts of 4 and 2; a rate so large that the scales would be lost if the second step mattered.
    planned(micro_batch=4)
    rounder = quick(random_model(family), symmetric=symmetric, batch_size=6, end_to_end_iters=1)
    weights = weights_of(quick(random_model(family), symmetric=symmetric, end_to_end_iters=0))
    float_model = random_model(family)
    with torch.no_grad():
        wanted = logits_of(float_model, calibration_ids)
    scales: dict[str, Tensor] = {}
    values: dict[str, Tensor] = {}
    for layer in find_layers(float_model):
        if layer.name in weights:
            weight = weights[layer.name]
            zero = torch.full_like(weight.scale, 2.0) if weight.zero is None else weight.zero.float()
            scales[layer.name] = weight.scale.float().requires_grad_()
            groups = weight.codes.float().view(*zero.shape, -1) - zero.float().unsqueeze(-1)
            matrix = (groups * scales[layer.name].unsqueeze(-1)).view(weight.codes.shape)
            stored = matrix.T if layer.transposed else matrix.view(layer.weight.shape)
            values[layer.parameter_name] = stored
    mask = torch.ones_like(calibration_ids)
    output: Any = torch.func.functional_call(
        float_model, values, (calibration_ids,), {"attention_mask": mask}
    )
    loss = torchs_divergence(output.logits, wanted)
    assert rounder.report.end_to_end is not None
    assert rounder.report.end_to_end.step_losses == pytest.approx([loss.item()], rel=1e-4)
    assert rounder.report.end_to_end.loss_before == pytest.approx(loss.item(), rel=1e-4)
    expected = torch.autograd.grad(loss, list(scales.values()))
    assert gradients.keys() == scales.keys()
    for name, gradient in zip(scales, expected, strict=True):
        torch.testing.assert_close(gradients[name], gradient, rtol=2e-3, atol=2e-4 * float(gradient.std()))


def test_a_step_is_adams(
    random_model: Callable[..., Any], quick: Callable[..., AutoRound], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The growth of scales after steps with gradients that are known, against torch's Adam."""
    names: list[str] = []
    grown: list[Tensor] = []
    given_gradients: list[Tensor] = []
    original = ScaledBlocks.step

    def step(self: Any, index: int, block: Any, rate: float, count: int) -> None:
        if index == 0:
            names.append(block.trained[0].layer.name)
            given_gradients.append((block.trained[0].gradient * block.trained[0].weight.scale).flatten())
        original(self, index, block, rate, count)
        if index == 0:
            grown.append(self._states[0].read((0,))[0, block.trained[0].state])

    monkeypatch.setattr(ScaledBlocks, "step", step)
    quick(random_model("llama"), end_to_end_iters=5, end_to_end_lr=0.01)
    growth = torch.zeros_like(grown[0])
    adam = torch.optim.Adam([growth], lr=0.01, eps=1e-30)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(adam, T_max=5)
    for gradient, after in zip(given_gradients, grown, strict=True):
        growth.grad = gradient
        adam.step()
        schedule.step()
        torch.testing.assert_close(after, growth, rtol=1e-3, atol=1e-6)
    assert len(set(names)) == 1


@settings(max_examples=30, deadline=None)
@given(
    start=st.floats(2**-24, 60_000) | st.floats(-60_000, -(2**-24)),
    growth=st.floats(-0.5, 1),
    dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32]),
)
def test_a_grown_scale_can_be_stored_and_keeps_its_sign(
    start: float, growth: float, dtype: torch.dtype
) -> None:
    first = torch.tensor([[start]], dtype=dtype)
    scale = grown_scale(first, torch.tensor([growth]), dtype)
    assert scale.dtype == dtype
    assert bool(scale.isfinite().all())
    if float(first) != 0:
        assert scale.sign() == first.sign()
        assert torch.equal(grown_scale(first, torch.zeros(1), dtype), first)
    unbounded = float(first) * (1 + growth)
    if 1e-3 < abs(unbounded) < 60_000:
        assert float(scale) == pytest.approx(unbounded, rel=2**-8)


# --- what comes of it -------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_predictions_come_nearer_and_codes_stay(
    family: str,
    random_model: Callable[..., Any],
    saved_model: Callable[[str], Path],
    quick: Callable[..., AutoRound],
    calibration_ids: Tensor,
) -> None:
    symmetric = family != "opt"
    model, plain = random_model(family), random_model(family)
    with torch.no_grad():
        wanted = logits_of(model, calibration_ids)
    rounder = quick(model, symmetric=symmetric)
    before, after = (
        weights_of(quick(plain, symmetric=symmetric, end_to_end_iters=0)),
        weights_of(rounder),
    )
    report = rounder.report.end_to_end
    assert report is not None
    with torch.no_grad():
        losses = [float(torchs_divergence(logits_of(one, calibration_ids), wanted)) for one in (plain, model)]
    assert [report.loss_before, report.loss_after] == pytest.approx(losses, rel=1e-3)
    assert losses[1] < 0.98 * losses[0]
    assert 0 < report.best_step <= 4
    assert len(report.step_losses) == 4
    assert (report.samples, report.held_out) == (6, False)
    moved = 0
    for name, weight in before.items():
        assert torch.equal(weight.codes, after[name].codes), name
        assert (weight.zero is None) == (after[name].zero is None) == symmetric
        assert weight.zero is None or torch.equal(weight.zero, after[name].zero), name
        assert weight.scale.dtype == after[name].scale.dtype
        moved += int((weight.scale != after[name].scale).sum())
    assert moved > 0.9 * sum(weight.scale.numel() for weight in before.values())
    assert parts_of(weights_of(quick(str(saved_model(family)), symmetric=symmetric))) == parts_of(after)


def test_how_memory_is_used_does_not_matter(
    saved_model: Callable[[str], Path],
    random_model: Callable[..., Any],
    quick: Callable[..., AutoRound],
    planned: Callable[..., None],
) -> None:
    llama, steps = str(saved_model("llama")), {"end_to_end_iters": 2}
    planned(spills=False, resident=True)
    expected = weights_of(quick(llama, **steps))
    for spills, resident in ((True, False), (True, True)):
        planned(spills=spills, resident=resident)
        assert parts_of(weights_of(quick(llama, **steps))) == parts_of(expected)
    planned(spills=False)
    assert parts_of(weights_of(quick(random_model("llama"), **steps))) == parts_of(expected)
    planned(micro_batch=3, spills=True)
    in_parts = weights_of(quick(llama, **steps))
    accumulated = weights_of(quick(llama, batch_size=2, gradient_accumulate_steps=2, **steps))
    for name, weight in expected.items():
        for other in (in_parts, accumulated):
            # One step in the last place of float16.
            torch.testing.assert_close(other[name].scale, weight.scale, rtol=2**-10, atol=0)


@pytest.mark.parametrize("kind", ["folder", "module"])
def test_blocks_are_let_go_where_they_must_not_stay(
    kind: str,
    saved_model: Callable[[str], Path],
    random_model: Callable[..., Any],
    quick: Callable[..., AutoRound],
    planned: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = random_model("llama", num_hidden_layers=4) if kind == "module" else str(saved_model("llama"))
    alive: dict[int, int] = {}
    most: list[int] = []
    original = ScaledBlocks._filled

    class Token:
        def __init__(self, index: int) -> None:
            self.index = index
            alive[id(self)] = index

        def __del__(self) -> None:
            alive.pop(id(self))

    def filled(self: Any, index: int, module: nn.Module) -> Any:
        block = original(self, index, module)
        if kind == "module":
            module.token = Token(index)
            most.append(len(alive))
        else:
            loaded = [not any(p.is_meta for p in one.parameters()) for one in self._source.blocks]
            most.append(max(sum(loaded), len(self._kept) + 1))
        return block

    monkeypatch.setattr(ScaledBlocks, "_filled", filled)
    planned(resident=False)
    quick(model, end_to_end_iters=2)
    assert set(most) == {1}
    assert not alive
    if kind == "folder":
        planned(resident=True)
        most.clear()
        quick(model, end_to_end_iters=2)
        assert most == [1, 2]


def test_a_training_that_does_harm_leaves_the_scales_as_they_were(
    random_model: Callable[..., Any], quick: Callable[..., AutoRound], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = random_model("llama")
    original = ScaledBlocks.step

    def uphill(self: Any, index: int, block: Any, rate: float, count: int) -> None:
        original(self, index, block, -rate, count)

    monkeypatch.setattr(ScaledBlocks, "step", uphill)
    rounder = quick(model)
    report = rounder.report.end_to_end
    assert report is not None
    assert report.best_step == 0
    assert report.loss_after == report.loss_before
    assert report.step_losses[-1] > report.loss_before
    plain_model = random_model("llama")
    plain = quick(plain_model, end_to_end_iters=0)
    assert plain.report.end_to_end is None
    assert parts_of(weights_of(rounder)) == parts_of(weights_of(plain))
    for name, value in plain_model.state_dict().items():
        assert torch.equal(value, model.state_dict()[name]), name


def test_it_is_off_unless_asked_for(
    random_model: Callable[..., Any], quick: Callable[..., AutoRound], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_autoround, "Tail", None)
    monkeypatch.setattr(EndToEnd, "run", None)
    usual = QuantizationConfig()
    assert (usual.end_to_end_iters, usual.end_to_end_lr) == (None, None)
    assert usual.end_to_end_steps == 0
    assert not QuantizationConfig(quality="rtn").needs_calibration
    assert QuantizationConfig(quality="rtn", end_to_end_iters=1).needs_calibration
    rounder = quick(random_model("llama"), data=None, end_to_end_iters=0)
    assert rounder.report.end_to_end is None
    assert rounder.report.to_dict()["end_to_end"] is None


def test_best_has_it_where_it_can_be_had(
    random_model: Callable[..., Any], quick: Callable[..., AutoRound]
) -> None:
    fields = {"quality": "best", "iters": 3, "end_to_end_iters": None}
    assert QuantizationConfig(quality="best", iters=100).end_to_end_steps == 33
    assert QuantizationConfig(quality="best", weight_dtype="fp8").end_to_end_steps == 0
    llama = random_model("llama")
    assert len(quick(llama, **fields).report.end_to_end.step_losses) == 1
    assert quick(llama, **{**fields, "end_to_end_iters": 0}).report.end_to_end is None
    assert quick(random_model("llama").model, **fields).report.end_to_end is None


def test_best_goes_without_it_where_memory_has_no_room(
    random_model: Callable[..., Any], quick: Callable[..., AutoRound], monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = _autoround.make_plan

    def tight(cost: Any, config: Any, limit: Any, together: Any = None) -> Any:
        if together is not None:
            raise ConfigurationError("too large")
        return plan(cost, config, limit)

    monkeypatch.setattr(_autoround, "make_plan", tight)
    fields = {"quality": "best", "iters": 3, "memory": {"max_ram_mb": 100_000}}
    report = quick(random_model("llama"), **fields, end_to_end_iters=None).report
    assert report.end_to_end is None
    assert any("Scales are not trained together" in note for note in report.notes)
    with pytest.raises(ConfigurationError, match="too large"):
        quick(random_model("llama"), **fields, end_to_end_iters=1)


def test_it_can_be_turned_on_and_off_later(
    random_model: Callable[..., Any], quick: Callable[..., AutoRound]
) -> None:
    rounder = quick(random_model("llama"), end_to_end_iters=0, starts=False)
    rounder.config.quantization.end_to_end_iters = 1
    assert rounder.quantize().end_to_end is not None
    rounder.config.quantization.end_to_end_iters = 0
    assert rounder.quantize().end_to_end is None


def test_samples_are_held_out_where_there_are_enough(
    random_model: Callable[..., Any], quick: Callable[..., AutoRound], monkeypatch: pytest.MonkeyPatch
) -> None:
    for count in (1, 2, 15):
        training, measured = split(count)
        assert training is measured
        assert training == list(range(count))
    for count in (16, 17, 128):
        training, measured = split(count)
        assert sorted(training + measured) == list(range(count))
        assert len(measured) == count // 8
    seen: set[int] = set()
    original = EndToEnd.step

    def step(self: Any, samples: Any, *rest: Any) -> float:
        seen.update(samples)
        return original(self, samples, *rest)

    monkeypatch.setattr(EndToEnd, "step", step)
    ids = torch.randint(3, 96, (17, 8), generator=torch.Generator().manual_seed(1))
    model = random_model("llama")
    with torch.no_grad():
        wanted = logits_of(model, ids)[[7, 15]]
    report = quick(model, data=ids, nsamples=17, seqlen=8, end_to_end_iters=4).report.end_to_end
    assert report is not None
    assert (report.samples, report.held_out) == (2, True)
    assert len(seen) >= 12
    assert not seen & {7, 15}
    with torch.no_grad():
        found = torchs_divergence(logits_of(model, ids)[[7, 15]], wanted)
    assert report.loss_after == pytest.approx(float(found), rel=1e-3)


def test_a_quantised_head_is_part_of_what_is_judged(
    random_model: Callable[..., Any],
    saved_model: Callable[[str], Path],
    quick: Callable[..., AutoRound],
    calibration_ids: Tensor,
) -> None:
    head = {"ignore_layers": [], "layer_config": {"lm_head": {"bits": 3}}}
    model = random_model("llama")
    with torch.no_grad():
        wanted = logits_of(model, calibration_ids)
    rounder = quick(model, **head)
    with torch.no_grad():
        expected = float(torchs_divergence(logits_of(model, calibration_ids), wanted))
    report = rounder.report.end_to_end
    assert report is not None
    assert report.loss_after == pytest.approx(expected, rel=1e-3)
    assert parts_of(weights_of(rounder)) == parts_of(weights_of(quick(str(saved_model("llama")), **head)))


@pytest.mark.parametrize("dynamic", [True, False])
def test_rounded_activations_and_layers_of_floats_are_part_of_it(
    dynamic: bool, random_model: Callable[..., Any], quick: Callable[..., AutoRound]
) -> None:
    own = {"down_proj": {"weight_dtype": "fp8"}, "o_proj": {"bits": 8}}
    fields = {"act_bits": 8, "act_dynamic": dynamic, "layer_config": own}
    rounder = quick(random_model("llama"), **fields)
    report = rounder.report.end_to_end
    assert report is not None
    assert report.loss_after < report.loss_before
    plain = weights_of(quick(random_model("llama"), end_to_end_iters=0, **fields))
    for name, weight in weights_of(rounder).items():
        assert torch.equal(weight.codes, plain[name].codes)
        assert torch.equal(weight.scale, plain[name].scale) == name.endswith("down_proj")


def test_the_first_blocks_may_have_nothing_to_train(
    random_model: Callable[..., Any], quick: Callable[..., AutoRound]
) -> None:
    rounder = quick(random_model("llama"), ignore_layers=["lm_head", r"layers\.0\..*"])
    report = rounder.report.end_to_end
    assert report is not None
    assert report.loss_after < report.loss_before


def test_it_follows_training_of_blocks_and_repeats_itself(
    saved_model: Callable[[str], Path], quick: Callable[..., AutoRound]
) -> None:
    llama = str(saved_model("llama"))
    fields = {"quality": "best", "iters": 4}
    one, other, plain = (
        quick(llama, **fields),
        quick(llama, **fields),
        quick(llama, end_to_end_iters=0, **fields),
    )
    assert parts_of(weights_of(one)) == parts_of(weights_of(other))
    assert one.report.end_to_end is not None
    assert one.report.end_to_end.loss_after < one.report.end_to_end.loss_before
    for name, weight in weights_of(plain).items():
        assert torch.equal(weight.codes, weights_of(one)[name].codes)
    assert not torch.equal(*(weights_of(x)["model.layers.0.mlp.up_proj"].scale.float() for x in (one, plain)))


# --- what is refused, and ends that are not happy ---------------------------------------------------------


class Hidden(nn.Module):
    """Blocks and nothing after them."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(96, 32)
        self.blocks = nn.ModuleList(nn.Linear(32, 32) for _ in range(2))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        for block in self.blocks:
            x = block(x)
        return x


def test_models_without_logits_of_tokens_are_refused_at_once(
    random_model: Callable[..., Any], quick: Callable[..., AutoRound]
) -> None:
    import transformers

    judge = transformers.LlamaForSequenceClassification(random_model("llama").config)
    for model in (random_model("llama").model, Hidden(), judge):
        forwards = [vars(module).get("forward") for module in model.modules()]
        with pytest.raises(
            ConfigurationError, match=r"end_to_end_iters .* gives none: .*AutoModelForCausalLM"
        ):
            quick(model, starts=False)
        assert [vars(module).get("forward") for module in model.modules()] == forwards
        quick(model, starts=False, end_to_end_iters=0)


@pytest.mark.parametrize(
    ("fields", "error", "match"),
    [
        ({"end_to_end_iters": -1}, ConfigurationError, "end_to_end_iters is -1; it must be an integer"),
        ({"end_to_end_iters": True}, ConfigurationError, "end_to_end_iters is True"),
        ({"end_to_end_lr": 0}, ConfigurationError, "end_to_end_lr is 0; it must be a number above 0"),
        ({"end_to_end_lr": "fast"}, ConfigurationError, "end_to_end_lr is 'fast'"),
        (
            {"weight_dtype": "mxfp4", "bits": None, "group_size": None},
            ConfigurationError,
            "only scales of integers are trained .*weight_dtype is 'mxfp4'",
        ),
        (
            {"layer_config": {"_proj": {}, ".*_proj": {"weight_dtype": "fp8"}}},
            ConfigurationError,
            "no layer of the blocks becomes integers",
        ),
        ({"data": None}, CalibrationError, "quality 'rtn' with end_to_end_iters 4 needs calibration"),
        ({"memory": {"max_ram_mb": 1}}, ConfigurationError, r"max_ram_mb is 1, but .*end_to_end_iters 0"),
    ],
    ids=str,
)
def test_what_cannot_be_is_refused(
    fields: dict[str, Any],
    error: type[AutoRoundError],
    match: str,
    saved_model: Callable[[str], Path],
    quick: Callable[..., AutoRound],
) -> None:
    fields = dict(fields)
    if "layer_config" in fields:
        fields["layer_config"].pop("_proj")
    with pytest.raises(error, match=match):
        quick(str(saved_model("llama")), **fields)


@pytest.mark.parametrize("kind", ["folder", "module"])
@pytest.mark.parametrize("failure", [KeyboardInterrupt, ExportError])
def test_an_end_in_the_middle_leaves_nothing_broken(
    kind: str,
    failure: type[BaseException],
    random_model: Callable[..., Any],
    saved_model: Callable[[str], Path],
    quick: Callable[..., AutoRound],
    planned: Callable[..., None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    planned(spills=True)
    model = random_model("llama")
    rounder = quick(model if kind == "module" else str(saved_model("llama")), starts=False)
    # Only now: the folder of a checkpoint is made below the system's temporary folder too.
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    files = {path.name for path in Path("/proc/self/fd").iterdir()}
    if failure is KeyboardInterrupt:
        original, count = EndToEnd.step, list[int]()

        def interrupted(self: Any, *rest: Any) -> float:
            count.append(1)
            if len(count) == 3:
                raise KeyboardInterrupt
            return original(self, *rest)

        monkeypatch.setattr(EndToEnd, "step", interrupted)
    else:
        from auto_round.quantization import _results

        save = _results._save

        def full(tensors: Any, path: Path, about: Any) -> None:
            if "scales-00001" in path.name:
                raise OSError(28, "No space left on device")
            save(tensors, path, about)

        monkeypatch.setattr(_results, "_save", full)
    with pytest.raises(failure):
        rounder.quantize()
    assert list(tmp_path.iterdir()) == []
    assert {path.name for path in Path("/proc/self/fd").iterdir()} == files
    assert not any("forward" in vars(module) for module in model.modules())
    assert all(p.requires_grad for p in model.parameters())
    if kind == "module":
        # Its layers hold what the blocks became.
        plain = random_model("llama")
        quick(plain, end_to_end_iters=0)
        for name, value in plain.state_dict().items():
            assert torch.equal(value, model.state_dict()[name]), name
    else:
        monkeypatch.undo()
        monkeypatch.setattr(_autoround, "choose_dtype", lambda device: torch.float32)
        rounder.quantize()
        assert parts_of(weights_of(rounder)) == parts_of(weights_of(quick(str(saved_model("llama")))))


def test_a_loss_that_is_not_finite_ends_the_training_with_the_best_so_far(
    saved_model: Callable[[str], Path], quick: Callable[..., AutoRound], monkeypatch: pytest.MonkeyPatch
) -> None:
    original = EndToEnd.step

    def step(self: Any, samples: Any, rate: float, count: int) -> float:
        loss = original(self, samples, rate, count)
        return float("nan") if count == 3 else loss

    monkeypatch.setattr(EndToEnd, "step", step)
    report = quick(str(saved_model("llama"))).report
    assert report.end_to_end is not None
    assert len(report.end_to_end.step_losses) == 3
    assert 0 < report.end_to_end.best_step < 3
    assert report.to_dict()["end_to_end"]["step_losses"][-1] is None
    monkeypatch.setattr(_end_to_end.EndToEnd, "measure", lambda self: float("nan"))
    with pytest.raises(AutoRoundError, match="predictions is nan"):
        quick(str(saved_model("llama")))
