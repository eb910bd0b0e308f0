"""What a block's output is short of, forwards and backwards, compiled where that pays."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, cast

import torch
from torch import Tensor, nn

from auto_round.quantization._capture import Call, call_block
from auto_round.quantization._compiled import Compiled
from auto_round.quantization._fast_ops import Attention, fast_training


class BlockLoss:
    """Each sample's error of a block's output, for one block after another.

    Args:
        compiles: Have `torch.compile` make one function of the block and the error, which blocks of one kind
            share. Where it fails for a block, all that follow are run as they are.
    """

    def __init__(self, *, compiles: bool) -> None:
        self._compiled = Compiled(_block_errors, dynamic=False, precise=False) if compiles else None

    def fast(
        self, block: nn.Module, first: Callable[[], tuple[Call, Tensor, Tensor]]
    ) -> AbstractContextManager[object]:
        """Return a context in which a block is run fast.

        Args:
            block: Its parameters have no gradients afterwards.
            first: Gives the other arguments of a call, for one try where it is compiled; they are not kept.
        """
        compiled = self._compiled
        if compiled is None or not compiled.works:
            return fast_training(block)
        return self._tried(compiled, block, *first()) or fast_training(block)

    def _tried(
        self, compiled: Compiled, block: nn.Module, call: Call, hidden: Tensor, target: Tensor
    ) -> Attention | None:
        """Return what the block is to be run in if it can be compiled."""
        attention = Attention(compiled_for=hidden)
        try:
            with attention:
                self(block, call, hidden, target).sum().backward()  # pyright: ignore[reportUnknownMemberType]
        except torch.OutOfMemoryError:
            raise
        except Exception as failure:  # noqa: BLE001 - the way back is compiled here
            compiled.give_up(failure)
        block.zero_grad(set_to_none=True)
        return attention if compiled.works else None

    def __call__(self, block: nn.Module, call: Call, hidden: Tensor, target: Tensor) -> Tensor:
        """Return each sample's mean squared error, fp32 [samples].

        Args:
            block: What is trained in it requires its gradient.
            call: How it is called with so many samples.
            hidden: What goes in, [samples, tokens, width].
            target: What is to come out.
        """
        if self._compiled is not None and self._compiled.works:
            return self._compiled(block, call.args, call.kwargs, call.hidden_name, hidden, target)
        return sample_errors(call(block, hidden), target)


def _block_errors(
    block: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    hidden_name: str | None,
    hidden: Tensor,
    target: Tensor,
) -> Tensor:
    output = call_block(block, hidden, args, kwargs, hidden_name)
    return (output.float() - target.float()).square().flatten(1).mean(1)


class _Errors(torch.autograd.Function):
    """Each sample's mean squared error in fp32, which is taken of one sample at a time.

    In fp32 the output, the difference and their gradients of a whole batch would be the peak of a step.
    """

    @staticmethod
    def forward(ctx: Any, output: Tensor, target: Tensor) -> Tensor:  # pyright: ignore
        ctx.save_for_backward(output, target)
        errors = [(one.float() - wanted).square_().mean() for one, wanted in zip(output, target, strict=True)]
        return torch.stack(errors)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:  # pyright: ignore
        output, target = ctx.saved_tensors
        gradient = torch.empty_like(output)
        for index, share in enumerate(grads[0] * (2 / output[0].numel())):
            gradient[index] = (output[index].float() - target[index]).mul_(share)
        return gradient, None


def sample_errors(output: Tensor, target: Tensor) -> Tensor:
    """Return each sample's mean squared error, fp32 [samples]."""
    return cast("Any", _Errors).apply(output, target)
