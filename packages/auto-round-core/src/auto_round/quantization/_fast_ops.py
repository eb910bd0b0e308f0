"""Faster ways to the same results, for blocks that are run forwards and backwards hundreds of times on a CPU.

torch's fused attention is slow backwards on a CPU, and root mean square norms and rotary positions in plain
operations make a dozen passes over the activations each. These are replaced while a block is trained, where a
trial shows that the results are the same, and nothing else is: see `fast_training`.
"""

from __future__ import annotations

import sys
import threading
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import ExitStack, contextmanager
from types import ModuleType
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

_BAND = 128
_MOST_BYTES = 256 << 20
"""The most that the probabilities which attention keeps for its way back may take."""


@contextmanager
def fast_training(block: nn.Module) -> Generator[None]:
    """Have parts of a block computed faster within a `with`, on the CPU and in this thread.

    Attention only where `scaled_dot_product_attention` is called for causal attention without a mask of its
    own, dropout or values of another width. Norms and rotary positions only where a trial gives what they
    gave before, to the rounding of their dtype.
    """
    with ExitStack() as stack:
        for module in block.modules():
            if _replace_norm(module):
                stack.callback(delattr, module, "forward")
        for home in {sys.modules[type(module).__module__] for module in block.modules()}:
            stack.enter_context(_rotary_of(home))
        stack.enter_context(Attention())
        yield


class Attention(TorchFunctionMode):
    """Computes plain causal attention in bands of queries, within a `with` in this thread.

    Args:
        compiled_for: Hidden states [batch, tokens, width] for which `torch.compile` shall see through it and
            make the way back; None for what is not compiled.
    """

    def __init__(self, compiled_for: Tensor | None = None) -> None:
        super().__init__()
        self._biases = None if compiled_for is None else _causal_biases(compiled_for)

    def __torch_function__(
        self,
        func: Any,
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention and _is_plain(*args, **kwargs):
            query, key, value = args[:3]
            scale = kwargs.get("scale")
            heads = query.shape[1] // key.shape[1]
            if heads > 1:
                key, value = (part.repeat_interleave(heads, 1) for part in (key, value))
            scale = query.shape[-1] ** -0.5 if scale is None else scale
            if self._biases is not None:
                return _banded_attention(query, key, value, scale, self._biases)
            return cast("Any", _BandedAttention).apply(query, key, value, scale)
        return func(*args, **kwargs)


def _is_plain(
    query: Tensor,
    key: Tensor | None = None,
    value: Tensor | None = None,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,  # noqa: ARG001 - any is
    enable_gqa: bool = False,
) -> bool:
    if key is None or value is None or attn_mask is not None or dropout_p or not is_causal:
        return False
    if not (query.ndim == key.ndim == 4 and query.device.type in ("cpu", "meta") and query.requires_grad):
        return False
    tokens = query.shape[2]
    fits = key.shape == value.shape and key.shape[2] == tokens and key.shape[3] == query.shape[3]
    grouped = query.shape[1] == key.shape[1] or (enable_gqa and query.shape[1] % key.shape[1] == 0)
    kept = query.shape[0] * query.shape[1] * tokens * (tokens + _BAND) // 2 * query.element_size()
    return fits and grouped and kept <= _MOST_BYTES


class _BandedAttention(torch.autograd.Function):
    """Causal attention that keeps its probabilities, in bands of queries that see no later key.

    Takes and gives [batch, heads, tokens, width].
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:  # pyright: ignore
        shape = query.shape
        query, key, value = (part.flatten(0, 1) for part in (query * scale, key, value))
        out = torch.empty_like(query)
        kept: list[Tensor] = []
        for start, end in _bands(shape[2]):
            weights = torch.bmm(query[:, start:end], key[:, :end].transpose(1, 2))
            later = torch.ones(end - start, end - start, dtype=torch.bool, device=query.device).triu_(1)
            weights[:, :, start:].masked_fill_(later, float("-inf"))
            torch.softmax(weights, -1, out=weights)
            torch.bmm(weights, value[:, :end], out=out[:, start:end])
            kept.append(weights)
        ctx.save_for_backward(query, key, value, out, *kept)
        ctx.scale = scale
        return out.view(shape)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:  # pyright: ignore
        query, key, value, out, *kept = ctx.saved_tensors
        shape = grads[0].shape
        grad = grads[0].flatten(0, 1)
        along = (grad * out).sum(-1, keepdim=True)
        d_query, d_key, d_value = torch.empty_like(query), torch.zeros_like(key), torch.zeros_like(value)
        for (start, end), weights in zip(_bands(shape[2]), kept, strict=True):
            band = grad[:, start:end]
            d_value[:, :end].baddbmm_(weights.transpose(1, 2), band)
            d_weights = torch.bmm(band, value[:, :end].transpose(1, 2))
            d_weights.sub_(along[:, start:end]).mul_(weights)
            torch.bmm(d_weights, key[:, :end], out=d_query[:, start:end])
            d_key[:, :end].baddbmm_(d_weights.transpose(1, 2), query[:, start:end])
        d_query.mul_(ctx.scale)
        return d_query.view(shape), d_key.view(shape), d_value.view(shape), None


def _causal_biases(hidden: Tensor) -> list[Tensor]:
    """Return for each band of queries 0 for the keys that they see, and minus infinity for later ones."""
    nothing = torch.full((hidden.shape[1],) * 2, float("-inf"), dtype=hidden.dtype, device=hidden.device)
    biases = nothing.triu_(1)
    return [biases[start:end, :end].contiguous() for start, end in _bands(hidden.shape[1])]


def _banded_attention(
    query: Tensor, key: Tensor, value: Tensor, scale: float, biases: Sequence[Tensor]
) -> Tensor:
    """Return what `_BandedAttention` does; a compiler makes the way back, and code that masks slowly.

    Products would copy parts that are not contiguous, and so they would what comes back to the outputs. Where
    it is said here that they are, the compiler writes them so when it makes them.
    """
    shape = query.shape
    query, key, value = (part.flatten(0, 1) for part in (query * scale, key, value))
    outs: list[Tensor] = []
    for (start, end), bias in zip(_bands(shape[2]), biases, strict=True):
        seen, seen_value = key[:, :end].contiguous(), value[:, :end].contiguous()
        weights = torch.bmm(query[:, start:end].contiguous(), seen.transpose(1, 2)) + bias
        out = torch.bmm(torch.softmax(weights, -1), seen_value)
        outs.append(out.view(*shape[:2], end - start, -1).transpose(1, 2))
    return torch.cat(outs, 1).transpose(1, 2)


def _bands(tokens: int) -> list[tuple[int, int]]:
    return [(start, min(start + _BAND, tokens)) for start in range(0, tokens, _BAND)]


class _RMSNorm(torch.autograd.Function):
    """x / sqrt(mean(x ** 2) + eps) * weight over the last dimension, in fp32 inside."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:  # pyright: ignore
        wide = x.float()
        factor = wide.square().mean(-1, keepdim=True).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, factor)
        return (wide * factor).mul_(weight).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:  # pyright: ignore
        x, weight, factor = ctx.saved_tensors
        # The incoming gradient may belong to others too, and `float` makes no copy of fp32.
        wide, grad = x.float(), grads[0].float() * weight
        along = (grad * wide).sum(-1, keepdim=True).mul_(factor.square()).div_(x.shape[-1])
        return grad.addcmul_(wide, along, value=-1).mul_(factor).to(x.dtype), None, None


def _replace_norm(module: nn.Module) -> bool:
    """Give a module that is a root mean square norm a faster forward; return whether it is one."""
    weight, eps = getattr(module, "weight", None), getattr(module, "variance_epsilon", None)
    eps = getattr(module, "eps", None) if eps is None else eps
    named = type(module).__name__.endswith("RMSNorm")
    if not (named and isinstance(weight, Tensor) and isinstance(eps, float) and weight.device.type == "cpu"):
        return False
    x = torch.linspace(-2, 3, weight.numel() * 3, dtype=weight.dtype).view(3, -1)
    x = x[:, torch.randperm(weight.numel(), generator=torch.Generator().manual_seed(0))]
    with torch.no_grad():
        expected = module(x)
        for gain in (weight.float(), weight.float() + 1):
            # Gemma stores the gain less one.
            if torch.allclose(_apply_norm(x, gain, eps), expected, rtol=1.6e-2, atol=1e-3):
                module.forward = _bound_norm(gain, eps)
                return True
    return False


def _bound_norm(gain: Tensor, eps: float) -> Callable[[Tensor], Tensor]:
    def forward(x: Tensor) -> Tensor:
        return _apply_norm(x, gain, eps)

    return forward


def _apply_norm(x: Tensor, gain: Tensor, eps: float) -> Tensor:
    return cast("Any", _RMSNorm).apply(x, gain, eps)


class _Rotated(torch.autograd.Function):
    """x * cos + rotate_half(x) * sin; x is [batch, heads, tokens, width], cos and sin [.., tokens, width]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:  # pyright: ignore
        ctx.save_for_backward(cos, sin)
        half = x.shape[-1] // 2
        out = torch.empty(x.shape, dtype=x.dtype)
        torch.mul(x, cos, out=out)
        out[..., :half].addcmul_(x[..., half:], sin[..., :half], value=-1)
        out[..., half:].addcmul_(x[..., :half], sin[..., half:])
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:  # pyright: ignore
        cos, sin = ctx.saved_tensors
        grad = grads[0]
        half = grad.shape[-1] // 2
        d_x = grad * cos
        d_x[..., :half].addcmul_(grad[..., half:], sin[..., half:])
        d_x[..., half:].addcmul_(grad[..., :half], sin[..., :half], value=-1)
        return d_x, None, None


class _Rotary:
    """Stands for a module's function of rotary positions: faster in some threads, as it was in all others.

    What it is to stand for is known once for the module, whichever threads come and go.
    """

    lock: ClassVar = threading.Lock()

    def __init__(self, original: Callable[..., Any]) -> None:
        self.original = original
        self.threads = Counter[int]()

    def __call__(self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *args: Any, **kwargs: Any) -> Any:
        plain = not args and not kwargs and q.ndim == k.ndim == 4 and cos.ndim == 3
        fits = plain and q.shape[-1] == cos.shape[-1] and q.dtype == cos.dtype and q.device.type == "cpu"
        if torch.compiler.is_compiling() or not fits or threading.get_ident() not in self.threads:
            return self.original(q, k, cos, sin, *args, **kwargs)
        cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
        rotated = cast("Any", _Rotated)
        return rotated.apply(q, cos, sin), rotated.apply(k, cos, sin)


@contextmanager
def _rotary_of(home: ModuleType) -> Generator[None]:
    """Have a module's rotary positions be faster within a `with`, in this thread, if they are Llama's."""
    thread = threading.get_ident()
    with _Rotary.lock:
        found = vars(home).get("apply_rotary_pos_emb")
        if found is not None and not isinstance(found, _Rotary) and _rotates_halves(found):
            found = home.apply_rotary_pos_emb = _Rotary(found)  # pyright: ignore[reportAttributeAccessIssue]
        if isinstance(found, _Rotary):
            found.threads[thread] += 1
    try:
        yield
    finally:
        if isinstance(found, _Rotary):
            with _Rotary.lock:
                found.threads -= Counter([thread])
                if not found.threads:
                    home.apply_rotary_pos_emb = found.original  # pyright: ignore[reportAttributeAccessIssue]


def _rotates_halves(apply: Callable[..., Any]) -> bool:
    """Return whether a function rotates queries and keys as Llama does."""
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, heads, 3, 8, dtype=torch.float32, generator=generator) for heads in (2, 1))
    cos, sin = (torch.randn(1, 3, 8, dtype=torch.float32, generator=generator) for _ in range(2))
    try:
        given = apply(q, k, cos, sin)
    except (TypeError, RuntimeError):
        return False
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    own = [cast("Any", _Rotated).apply(x, cos, sin) for x in (q, k)]
    return all(torch.allclose(left, right, atol=1e-6) for left, right in zip(given, own, strict=True))
