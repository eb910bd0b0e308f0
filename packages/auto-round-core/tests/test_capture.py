"""What models give their blocks, against the outputs that their blocks have in a whole forward pass."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from auto_round.exceptions import CalibrationError, QuantizationError
from auto_round.quantization._capture import Call, Capture, same_calls
from auto_round.quantization._layers import find_blocks
from torch import Tensor, nn

FAMILIES = ["llama", "mistral", "gemma", "gemma2", "gemma3", "phi", "phi3", "opt", "gpt2", "mixtral", "bert"]
F32 = torch.float32


@torch.no_grad()
def outputs_of_blocks(model: Any, blocks: nn.ModuleList, tokens: Tensor) -> list[Tensor]:
    found: list[Tensor] = []

    def note(module: nn.Module, given: Any, output: Any) -> None:
        found.append(output if isinstance(output, Tensor) else output[0])

    handles = [block.register_forward_hook(note) for block in blocks]
    model(tokens)
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_blocks_called_one_by_one_give_what_they_give_in_the_model(
    family: str, attention: str, random_model: Callable[..., Any], calibration_ids: Tensor
) -> None:
    model = random_model(family, attn_implementation=attention)
    _, blocks = find_blocks(model)
    expected = outputs_of_blocks(model, blocks, calibration_ids)
    before = model.config.use_cache
    hidden, calls = Capture(model, list(blocks)).run(calibration_ids)
    assert model.config.use_cache == before
    assert not any("forward" in vars(block) for block in blocks)
    with torch.no_grad():
        for block, call, wanted in zip(blocks, calls, expected, strict=True):
            hidden = call.to(torch.device("cpu"), F32)(block, hidden)
            torch.testing.assert_close(hidden, wanted)
            given = [*call.args, *call.kwargs.values()]
            assert not any("Cache" in type(value).__name__ for value in given)
    # The masks of sliding windows matter: without them the numbers are others.
    if family in ("mistral", "gemma2", "gemma3"):
        assert calls[0].kwargs["attention_mask"] is not None


class Own(nn.Module):
    def __init__(self, how: str) -> None:
        super().__init__()
        self.embedding = nn.Embedding(10, 4)
        self.blocks = nn.ModuleList(Scaled(how) for _ in range(3))
        self.how = how

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        gain = torch.arange(4.0)
        order = list(self.blocks)
        if self.how == "backwards":
            order.reverse()
        if self.how == "skips":
            order = order[:2]
        for block in order:
            if self.how == "by name":
                x = block(hidden_states=x, gain=gain)
            elif self.how == "tuple":
                x = block(x, gain)[0]
            else:
                x = block(x, gain)
        return x


class Scaled(nn.Module):
    def __init__(self, how: str) -> None:
        super().__init__()
        self.linear, self.how = nn.Linear(4, 4), how

    def forward(self, hidden_states: Tensor, gain: Tensor) -> Any:
        result = self.linear(hidden_states) * gain
        return (result, "more") if self.how == "tuple" else result


IDS = torch.tensor([[1, 2, 3], [4, 5, 6]])


@pytest.mark.parametrize("how", ["by place", "by name", "tuple"])
def test_hidden_states_by_place_or_name_and_outputs_in_tuples(how: str) -> None:
    model = Own(how)
    hidden, calls = Capture(model, list(model.blocks)).run(IDS)
    assert torch.equal(hidden, model.embedding(IDS))
    assert [call.hidden_name for call in calls] == ["hidden_states" if how == "by name" else None] * 3
    for block, call in zip(model.blocks, calls, strict=True):
        hidden = call(block, hidden)
    assert torch.equal(hidden, model(IDS))


def test_blocks_that_are_not_called_in_their_order_are_refused_and_left_as_they_were() -> None:
    model = Own("backwards")

    def own(*given: Tensor) -> Tensor:
        return given[0]

    model.blocks[0].forward = own  # pyright: ignore
    with pytest.raises(QuantizationError, match="block 2 of Own is called as number 0"):
        Capture(model, list(model.blocks)).run(IDS)
    assert model.blocks[0].forward is own
    assert "forward" not in vars(model.blocks[1])
    skips = Own("skips")
    with pytest.raises(QuantizationError, match="Own called 2 of its 3 blocks"):
        Capture(skips, list(skips.blocks)).run(IDS)


def test_ids_that_the_model_has_no_embedding_for_are_named() -> None:
    model = Own("by place")
    with pytest.raises(CalibrationError, match="which are 1 to 10: index out of range"):
        Capture(model, list(model.blocks)).run(torch.tensor([[1, 10]]))


def test_calls_that_differ_in_values_or_shapes_are_told_apart() -> None:
    def call(mask: Tensor) -> Call:
        return Call(args=(1, None), kwargs={"masks": [{"full": mask}], "flag": True}, hidden_name=None)

    one, two = call(torch.zeros(2)), call(torch.ones(2))
    assert same_calls([one, two], [call(torch.zeros(2)), call(torch.ones(2))]) is None
    assert same_calls([one, two], [one, one]) == 1
    assert same_calls([one], [call(torch.zeros(3))]) == 0


def test_a_call_is_moved_and_tensors_that_blocks_share_stay_one() -> None:
    cos, ids = torch.ones(2), torch.arange(2)
    call = Call(args=((cos, ids),), kwargs={"again": cos, "name": "x"}, hidden_name="x")
    moved = call.to(torch.device("cpu"), torch.bfloat16)
    assert moved.args[0][0] is moved.kwargs["again"]
    assert moved.args[0][0].dtype == torch.bfloat16
    assert moved.args[0][1].dtype == torch.int64
    assert (moved.kwargs["name"], moved.hidden_name) == ("x", "x")
    assert cos.dtype == torch.float32
