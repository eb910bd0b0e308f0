"""What a model gives its blocks: the hidden states that go into the first, and each one's other arguments."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from auto_round.exceptions import CalibrationError, QuantizationError


@dataclass(frozen=True, kw_only=True, slots=True)
class Call:
    """How a block is called, but for its hidden states."""

    args: tuple[Any, ...]
    """Positional arguments after the hidden states."""
    kwargs: dict[str, Any]
    hidden_name: str | None
    """Under which name the hidden states are passed; None for the first position."""

    def to(self, device: torch.device, dtype: torch.dtype) -> Call:
        """Return the call with its tensors on a device, those of floating point in `dtype`."""
        move = _mover(device, dtype)
        return Call(
            args=_mapped(self.args, move), kwargs=_mapped(self.kwargs, move), hidden_name=self.hidden_name
        )

    def __call__(self, block: nn.Module, hidden: Tensor) -> Tensor:
        """Return what a block makes of the hidden states; the first of its outputs if it has several."""
        return call_block(block, hidden, self.args, self.kwargs, self.hidden_name)


def call_block(
    block: nn.Module, hidden: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any], hidden_name: str | None
) -> Tensor:
    """Return what `Call` does, from its parts, which a compiler looks into."""
    if hidden_name is None:
        output = block(hidden, *args, **kwargs)
    else:
        output = block(*args, **{**kwargs, hidden_name: hidden})
    return output if isinstance(output, Tensor) else output[0]


class _Stop(Exception):
    """The last block was reached: no error, but the end of a forward pass that has gone far enough."""


class _TakesTuples(Exception):
    """The model takes the first of what a block returns."""


class Capture:
    """Runs a model up to its blocks, which are replaced by recorders while it does.

    Args:
        model: What is before its blocks must be callable: loaded, or with hooks that load it.
        blocks: Its repeated blocks, in the order in which they are called.
    """

    def __init__(self, model: nn.Module, blocks: Sequence[nn.Module]) -> None:
        self._model, self._blocks = model, blocks
        self._as_tuple = False

    def run(self, tokens: Tensor) -> tuple[Tensor, list[Call]]:
        """Return the hidden states that go into the first block, and the call of each.

        Args:
            tokens: int64 [batch, tokens].

        Raises:
            QuantizationError: The blocks are not called one after another with hidden states.
            CalibrationError: The model has no embedding for a token.
        """
        try:
            return self._run(tokens)
        except _TakesTuples:
            self._as_tuple = True
            return self._run(tokens)
        except IndexError as failure:
            raise CalibrationError(
                f"{type(self._model).__name__} fails on the calibration's token ids, which are "
                f"{tokens.min()} to {tokens.max()}: {failure}. It may have fewer embeddings than that."
            ) from failure

    def _run(self, tokens: Tensor) -> tuple[Tensor, list[Call]]:
        calls: list[Call] = []
        first: list[Tensor] = []

        def recorder(index: int) -> Callable[..., Any]:
            def forward(*args: Any, **kwargs: Any) -> Any:
                hidden, call = _split(args, kwargs)
                if index != len(calls):
                    raise QuantizationError(
                        f"block {index} of {type(self._model).__name__} is called as number {len(calls)}; "
                        "blocks are quantised in the order of their list, and each is called once."
                    )
                if hidden is None or (first and hidden.ndim < first[0].ndim):
                    raise _TakesTuples
                calls.append(call)
                if not first:
                    first.append(hidden)
                if len(calls) == len(self._blocks):
                    raise _Stop
                return (hidden,) if self._as_tuple else hidden

            return forward

        with _replaced_forwards(self._blocks, recorder), _without_cache(self._model), torch.no_grad():
            try:
                self._model(tokens)
            except _Stop:
                return first[0], calls
        raise QuantizationError(
            f"{type(self._model).__name__} called {len(calls)} of its {len(self._blocks)} blocks; blocks are "
            "quantised one after another, so all must be called."
        )


def same_calls(one: Sequence[Call], other: Sequence[Call]) -> int | None:
    """Return the first block whose call differs in a tensor's values, or None."""
    for index, (left, right) in enumerate(zip(one, other, strict=True)):
        for a, b in zip(_tensors(left), _tensors(right), strict=True):
            if a.shape != b.shape or not torch.equal(a, b):
                return index
    return None


def _split(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor | None, Call]:
    if args:
        hidden = args[0] if isinstance(args[0], Tensor) else None
        return hidden, Call(args=args[1:], kwargs=kwargs, hidden_name=None)
    name = next((name for name in ("hidden_states", "x", "input", "inputs") if name in kwargs), "")
    hidden = kwargs.get(name)
    rest = {key: value for key, value in kwargs.items() if key != name}
    return hidden if isinstance(hidden, Tensor) else None, Call(args=(), kwargs=rest, hidden_name=name)


@contextmanager
def _replaced_forwards(blocks: Sequence[nn.Module], recorder: Callable[[int], Callable[..., Any]]) -> Any:
    own = [block.__dict__.get("forward") for block in blocks]
    try:
        for index, block in enumerate(blocks):
            block.forward = recorder(index)
        yield
    finally:
        for block, forward in zip(blocks, own, strict=True):
            if forward is None:
                del block.forward
            else:
                block.forward = forward


@contextmanager
def _without_cache(model: nn.Module) -> Any:
    config = getattr(model, "config", None)
    before = getattr(config, "use_cache", None)
    if before is None:
        yield
        return
    cast("Any", config).use_cache = False
    try:
        yield
    finally:
        cast("Any", config).use_cache = before


def _mover(device: torch.device, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    # A tensor that several blocks share stays one.
    moved: dict[int, tuple[Tensor, Tensor]] = {}

    def move(tensor: Tensor) -> Tensor:
        if id(tensor) not in moved:
            moved[id(tensor)] = tensor, tensor.to(device, dtype if tensor.is_floating_point() else None)
        return moved[id(tensor)][1]

    return move


def _mapped(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, Mapping):
        return {key: _mapped(entry, change) for key, entry in cast("Mapping[Any, Any]", value).items()}
    if isinstance(value, tuple | list):
        entries = [_mapped(entry, change) for entry in cast("list[Any]", value)]
        return tuple(entries) if isinstance(value, tuple) else entries
    return value


def _tensors(call: Call) -> list[Tensor]:
    found: list[Tensor] = []

    def note(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor

    _mapped((call.args, call.kwargs), note)
    return found
