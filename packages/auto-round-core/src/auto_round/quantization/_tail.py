"""What follows a model's blocks, up to the logits, and how far two models' predictions are apart.

Norms, heads, soft caps and scalings differ from model to model, so nothing here knows of them: the model's
own forward is run, with blocks that all put out the hidden states that are given.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from auto_round.exceptions import AutoRoundError, ConfigurationError
from auto_round.quantization._capture import Capture
from auto_round.quantization._source import FloatModel

_PIECE_VALUES = 1 << 22
"""So many logits are computed at once: 16 MB in fp32."""
_TRIED_TOKENS = 4
_COPIES = 8
"""How often the logits of a piece are there while their divergence and its gradient are computed."""


class Tail:
    """What a language model makes of the hidden states that its last block puts out.

    Args:
        source: The float model; it is run once on a few tokens, without its blocks.

    Raises:
        ConfigurationError: The model gives no logits for each token.
    """

    def __init__(self, source: FloatModel) -> None:
        self._source = source
        self._as_tuple = False
        self.names: tuple[str, ...] = ()
        """Full names of the parameters that it uses."""
        ids = torch.zeros((1, _TRIED_TOKENS), dtype=torch.int64)
        with source.callable_head(), torch.no_grad():
            given, _ = Capture(source.model, list(source.blocks)).run(ids)
            hidden = torch.randn(given.shape, generator=torch.Generator().manual_seed(0)).to(given)
            whole = self._tried(ids, hidden)
            half = _TRIED_TOKENS // 2
            part = self._run(ids[:, half:], hidden[:, half:])
        self.vocabulary = whole.shape[-1]
        """How many logits a token has."""
        self._by_token = part.shape == whole[:, half:].shape and torch.allclose(
            part.float(), whole[:, half:].float(), rtol=1e-2, atol=1e-2 * float(whole.float().std())
        )
        """Tokens do not see one another."""

    def nbytes(self, dtype: torch.dtype, tokens: int, *, copies: int = 1) -> int:
        """Return what it takes: `copies` of its parameters, and logits for a sequence of so many tokens."""
        sizes = [self._source.model.get_parameter(name).numel() for name in self.names]
        at_once = tokens * self.vocabulary
        if self._by_token:
            at_once = min(at_once, max(_PIECE_VALUES, self.vocabulary))
        # One that is read is there in its stored type too for a moment, before there are any logits.
        return copies * sum(sizes) * dtype.itemsize + 4 * max(_COPIES * at_once, *sizes, 0)

    def load(self, device: torch.device, dtype: torch.dtype) -> dict[str, nn.Parameter]:
        """Return its float parameters by their full names."""
        return {name: frozen(self._source.value(name).detach().to(device, dtype)) for name in self.names}

    def divergence(
        self,
        tokens: Tensor,
        wanted: Tensor,
        hidden: Tensor,
        parameters: tuple[Mapping[str, nn.Parameter], Mapping[str, nn.Parameter]],
        *,
        weight: float | None = None,
    ) -> tuple[float, Tensor | None]:
        """Return the divergence of the predictions of `hidden` from those of `wanted`, summed over tokens.

        Runs within `callable_head`.

        Args:
            tokens: int64 [batch, tokens], on the CPU.
            wanted: Hidden states of the float model, [batch, tokens, width].
            hidden: Those of the quantised model.
            parameters: Those of the float model, from `load`, and of the quantised one.
            weight: Also return the gradient of so much times the divergence.

        Returns:
            The sum in nats, and the gradient with respect to `hidden` or None.
        """
        total = 0.0
        gradient = None if weight is None else torch.empty_like(hidden)
        for samples, places in self._pieces(tokens.shape):
            ids = tokens[samples, places]
            part = hidden[samples, places].detach().requires_grad_(weight is not None)
            with torch.no_grad():
                target = self._run(ids, wanted[samples, places], parameters[0])
            with torch.set_grad_enabled(weight is not None):
                loss = divergence(self._run(ids, part, parameters[1]), target)
            del target
            total += float(loss.detach())
            if gradient is not None and weight is not None:
                (loss * weight).backward()  # pyright: ignore[reportUnknownMemberType] - torch's annotation
                assert part.grad is not None  # noqa: S101
                gradient[samples, places] = part.grad
        return total, gradient

    def _pieces(self, shape: torch.Size) -> Generator[tuple[slice, slice]]:
        batch, tokens = shape
        samples = max(1, _PIECE_VALUES // (tokens * self.vocabulary))
        places = tokens
        if self._by_token:
            places = min(tokens, max(1, _PIECE_VALUES // self.vocabulary))
        for start in range(0, batch, samples):
            for place in range(0, tokens, places):
                yield slice(start, start + samples), slice(place, place + places)

    def _tried(self, ids: Tensor, hidden: Tensor) -> Tensor:
        """Return logits, having found how blocks return hidden states and which parameters come after."""
        kind, found = self._source.kind, "it fails without its blocks"
        for self._as_tuple in (False, True):
            used: list[nn.Module] = []
            try:
                logits = self._run(ids, hidden, used=used)
            except AutoRoundError as failure:
                found = str(failure)
                continue
            except (TypeError, ValueError, RuntimeError, AttributeError, IndexError) as failure:
                # A model whose blocks return the other of tensor and tuple fails in ways of its own.
                found = f"it fails without its blocks ({failure})"
                continue
            every = cast("Any", self._source.model).named_modules()
            self.names = tuple(
                f"{path}.{name}" if path else name
                for path, module in every
                if any(module is one for one in used)
                for name, _ in module.named_parameters(recurse=False)
            )
            return logits
        raise ConfigurationError(
            f"quantization.end_to_end_iters trains scales by predictions of tokens, but {kind} gives none: "
            f"{found}. Give a language model with its head, such as AutoModelForCausalLM loads, or set "
            "end_to_end_iters to 0."
        )

    def _run(
        self,
        ids: Tensor,
        hidden: Tensor,
        parameters: Mapping[str, nn.Parameter] | None = None,
        *,
        used: list[nn.Module] | None = None,
    ) -> Tensor:
        model = self._source.model
        given = (hidden,) if self._as_tuple else hidden
        with ExitStack() as stack:
            state = stack.enter_context(_bypassed(model, list(self._source.blocks), given))
            if used is not None:
                for module in model.modules():
                    stack.callback(module.register_forward_pre_hook(_noting(used, state)).remove)
            # What is tied to the head, such as an embedding, must stay as it is.
            output: Any = cast("Any", torch.func.functional_call)(
                model, dict(parameters or {}), (ids,), tie_weights=False
            )
        logits: Any = getattr(output, "logits", output)
        if not isinstance(logits, Tensor) or logits is hidden:
            raise ConfigurationError(f"it returns {type(output).__name__} without logits")
        if logits.ndim != 3 or logits.shape[:2] != ids.shape or not logits.is_floating_point():
            raise ConfigurationError(
                f"its logits for {list(ids.shape)} tokens are {list(logits.shape)}, not one vector a token"
            )
        return logits


class _Divergence(torch.autograd.Function):
    """Sum over tokens of KL(target || logits), whose gradient is softmax(logits) - softmax(target)."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, target: Tensor) -> Tensor:  # pyright: ignore
        own, wanted = logits.float().log_softmax(-1), target.float().log_softmax(-1)
        shares = wanted.exp()
        # What the float model rules out adds nothing, and may be ruled out by both: minus infinity in both.
        loss = wanted.sub_(own).masked_fill_(shares == 0, 0).mul_(shares).sum(-1).sum(dtype=torch.float64)
        ctx.save_for_backward(own.exp_().sub_(shares))
        ctx.dtype = logits.dtype
        return loss

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:  # pyright: ignore
        (difference,) = ctx.saved_tensors
        return (difference * grads[0].float()).to(ctx.dtype), None


def divergence(logits: Tensor, target: Tensor) -> Tensor:
    """Return the Kullback-Leibler divergence of two models' predictions, summed over tokens.

    Args:
        logits: [..., vocabulary] of the model that is judged; the gradient flows to these.
        target: The same of the one that it is to be like.

    Returns:
        sum p (log p - log q) with p = softmax(target) and q = softmax(logits), fp64, in nats.
    """
    return cast("Any", _Divergence).apply(logits, target)


def frozen(value: Tensor) -> nn.Parameter:
    """Return a value as a parameter that takes no gradient."""
    return nn.Parameter(value, requires_grad=False)


class _State:
    behind = False
    """The last block was called."""


def _noting(used: list[nn.Module], state: _State) -> Any:
    def note(module: nn.Module, _: object) -> None:
        if state.behind:
            used.append(module)

    return note


@contextmanager
def _bypassed(model: nn.Module, blocks: Sequence[nn.Module], output: object) -> Generator[_State]:
    """Have all blocks put out the same, whatever they are given, and the model keep no cache."""
    state = _State()

    def middle(*_: object, **__: object) -> object:
        return output

    def last(*_: object, **__: object) -> object:
        state.behind = True
        return output

    own = [block.__dict__.get("forward") for block in blocks]
    config: Any = getattr(model, "config", None)
    cache = getattr(config, "use_cache", None)
    try:
        if cache is not None:
            config.use_cache = False
        for block in blocks:
            block.forward = last if block is blocks[-1] else middle
        yield state
    finally:
        if cache is not None:
            config.use_cache = cache
        for block, forward in zip(blocks, own, strict=True):
            if forward is None:
                block.__dict__.pop("forward", None)
            else:
                block.forward = forward
