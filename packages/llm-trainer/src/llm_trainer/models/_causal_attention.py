"""Causal attention on a CPU: within documents, and in bfloat16 with a faster backward pass than torch's.

Letters: B batch, H heads, N several of them, T tokens, S tokens attended to, C head width, K documents.

The forward pass is torch's flash kernel. The backward of that kernel multiplies small tiles, which leaves
most of a processor's matrix units idle; here whole bands of queries are multiplied at once, with the
attention weights computed anew, so nothing of size T x T outlives a band. Scores are rounded to bfloat16
before the softmax, as they are in an attention written with matrix products. In other dtypes the backward
is the flash kernel's.

Torch's flash kernel cannot drop attention weights. With dropout both passes go by bands, and what is dropped
is drawn anew in the backward pass, from a number that the forward pass drew from torch's own generator.

A row of several documents costs less than one long document, because each is attended to by itself.

All passes are operators of their own (`llm_trainer::causal_attention` and so on), so a compiler takes them as
they are: their loops depend on the data.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

# Queries in a band: fewer leave out more of what causality hides, more make the products larger.
_BAND = 256
# Scores computed at a time, which bounds the memory: in bfloat16 they fit the cache of a core.
_BAND_SCORES = 1 << 20
_LENGTHS = 32

_aten = cast("Any", torch.ops.aten)


def _takes(operator: str, *arguments: str) -> bool:
    """Whether this torch has a private operator with these first arguments."""
    found = getattr(_aten, operator, None)
    if found is None:
        return False
    return tuple(a.name for a in found.default._schema.arguments[: len(arguments)]) == arguments


# As they are in torch 2.9 to 2.15; another may change or drop them.
_QKV, _OPTIONS = ("query", "key", "value"), ("dropout_p", "is_causal")
_HAS_OPERATORS = (
    _takes("_scaled_dot_product_flash_attention_for_cpu", *_QKV, *_OPTIONS)
    and _takes(
        "_scaled_dot_product_flash_attention_for_cpu_backward",
        "grad_out",
        *_QKV,
        "out",
        "logsumexp",
        *_OPTIONS,
    )
    and _takes("_softmax_backward_data", "grad_output", "output", "dim", "input_dtype")
)


def serves(device: torch.device) -> bool:
    """Whether `causal_attention` can be used; else torch's own attention is, with a mask for documents."""
    return _HAS_OPERATORS and device.type == "cpu"


def document_runs(segments_BT: Tensor) -> Tensor | None:
    """Return (row, start, end) of each run of equal numbers, (K, 3), or None if a dense mask suits better.

    It does where a document is not in one piece, and where runs are so short that there are too many.
    """
    B, T = segments_BT.shape
    begins_BT = torch.ones_like(segments_BT, dtype=torch.bool)
    begins_BT[:, 1:] = segments_BT[:, 1:] != segments_BT[:, :-1]
    rows, starts = begins_BT.nonzero(as_tuple=True)
    if 16 * len(starts) > B * T:
        return None
    numbers = segments_BT[rows, starts]
    documents = torch.stack((rows[numbers != 0], numbers[numbers != 0]), dim=-1)
    distinct: Tensor = cast("Any", documents).unique(dim=0)
    if len(distinct) < len(documents):
        return None
    ends = torch.where(rows == rows.roll(-1), starts.roll(-1), T)
    ends[-1] = T
    return torch.stack((rows, starts, ends), dim=-1)


def _groups(documents_K3: Tensor | None, batch: int, tokens: int) -> Iterator[tuple[slice, slice]]:
    """Yield the parts of a batch that are attended to by themselves, as slices of rows and of tokens."""
    if documents_K3 is None:
        yield slice(0, batch), slice(0, tokens)
    else:
        documents = cast("list[list[int]]", cast("Any", documents_K3).tolist())
        for row, start, end in documents:
            yield slice(row, row + 1), slice(start, end)


def _empty_like_heads(x_BHTC: Tensor) -> Tensor:
    """Return an empty tensor with the heads side by side in memory, as the next projection wants them."""
    B, H, T, C = x_BHTC.shape
    return x_BHTC.new_empty(B, T, H, C).transpose(1, 2)


def _forward(
    q_BHTC: Tensor, k_BHTC: Tensor, v_BHTC: Tensor, documents_K3: Tensor | None
) -> tuple[Tensor, Tensor]:
    B, H, T, _ = q_BHTC.shape
    out_BHTC = _empty_like_heads(q_BHTC)
    log_sums_BHT = q_BHTC.new_empty(B, H, T, dtype=torch.promote_types(q_BHTC.dtype, torch.float32))
    for rows, tokens in _groups(documents_K3, B, T):
        part = rows, slice(None), tokens
        q, k, v = (_lengthened(x[part]) for x in (q_BHTC, k_BHTC, v_BHTC))
        out, log_sums = _aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, is_causal=True)
        length = tokens.stop - tokens.start
        out_BHTC[part], log_sums_BHT[part] = out[:, :, :length], log_sums[:, :, :length]
    return out_BHTC, log_sums_BHT


def _lengthened(x_BHTC: Tensor) -> Tensor:
    """Add tokens of zeros up to a multiple of `_LENGTHS`.

    No earlier token attends to them and their gradient is zero, so they change nothing. But for each length
    that occurs the libraries below generate and keep code, which for documents of all lengths would be
    hundreds of megabytes.
    """
    lacking = -x_BHTC.size(2) % _LENGTHS
    return F.pad(x_BHTC, (0, 0, 0, lacking)) if lacking else x_BHTC


def _merged(x_BHTC: Tensor) -> Tensor:
    """Put rows and heads into one dimension, with the tokens lengthened: (B * H, T or more, C)."""
    return _lengthened(x_BHTC).flatten(0, 1).contiguous()


def _unmerged(x_NTC: Tensor, like_BHTC: Tensor) -> Tensor:
    """Undo `_merged`."""
    B, H, T, C = like_BHTC.shape
    return x_NTC.view(B, H, -1, C)[:, :, :T]


def _backward(
    grad_BHTC: Tensor,
    q_BHTC: Tensor,
    k_BHTC: Tensor,
    v_BHTC: Tensor,
    out_BHTC: Tensor,
    log_sums_BHT: Tensor,
    documents_K3: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    inputs = q_BHTC, k_BHTC, v_BHTC
    if q_BHTC.dtype == torch.bfloat16:
        return _backward_by_bands(grad_BHTC, *inputs, documents_K3)
    grads = _contiguous_like(*inputs)
    for rows, tokens in _groups(documents_K3, q_BHTC.size(0), q_BHTC.size(2)):
        part = rows, slice(None), tokens
        given = (x[part] for x in (grad_BHTC, *inputs, out_BHTC, log_sums_BHT))
        found = cast(
            "list[Tensor]",
            _aten._scaled_dot_product_flash_attention_for_cpu_backward(*given, 0.0, True),
        )
        for whole, piece in zip(grads, found, strict=True):
            whole[part] = piece
    return grads


def _backward_by_bands(
    grad_BHTC: Tensor,
    q_BHTC: Tensor,
    k_BHTC: Tensor,
    v_BHTC: Tensor,
    documents_K3: Tensor | None,
    dropout: _Dropout | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    inputs = q_BHTC, k_BHTC, v_BHTC
    grads = _contiguous_like(*inputs)
    for rows, tokens in _groups(documents_K3, q_BHTC.size(0), q_BHTC.size(2)):
        part = rows, slice(None), tokens
        grad, q, k, v = (_merged(x[part]) for x in (grad_BHTC, *inputs))
        for whole, found in zip(grads, _banded_backward(grad, q, k, v, dropout), strict=True):
            whole[part] = _unmerged(found, whole[part])
    return grads


def _contiguous_like(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return empty tensors for their gradients."""
    empty = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    return next(empty), next(empty), next(empty)


class _Dropout:
    """Draws which attention weights are dropped; the same ones again from the same number."""

    def __init__(self, probability: float, seed: Tensor) -> None:
        # A quarter of a random number decides each, so probabilities are multiples of 2^-16.
        self._threshold = min(round(probability * 2**16), 2**16 - 1) - 2**15
        self._generator = torch.Generator().manual_seed(int(seed))
        self.scale = 1 / (1 - probability)

    def kept_like(self, weights: Tensor) -> Tensor:
        """Return 1 for each weight that is kept and 0 for each that is not."""
        numbers = torch.empty(-(-weights.numel() // 4), dtype=torch.int64)
        numbers.random_(-(2**63), None, generator=self._generator)
        quarters = numbers.view(torch.int16)[: weights.numel()]
        return (quarters >= self._threshold).to(weights.dtype).view_as(weights)


def _bands(heads: int, tokens: int) -> Iterator[tuple[slice, slice]]:
    """Yield heads and queries that are computed at once; of some heads the last queries come first."""
    count = max(1, _BAND_SCORES // (min(_BAND, tokens) * tokens))
    for first in range(0, heads, count):
        for end in range(tokens, 0, -_BAND):
            yield slice(first, first + count), slice(max(0, end - _BAND), end)


def _banded_forward(scaled_q_NTC: Tensor, k_NTC: Tensor, v_NTC: Tensor, dropout: _Dropout) -> Tensor:
    out_NTC = torch.empty_like(v_NTC)
    for n, queries in _bands(*k_NTC.shape[:2]):
        keys = n, slice(queries.stop)
        weights = _weights_(scaled_q_NTC[n, queries] @ k_NTC[keys].transpose(1, 2))
        weights *= dropout.kept_like(weights)
        torch.mul(weights @ v_NTC[keys], dropout.scale, out=out_NTC[n, queries])
    return out_NTC


def _banded_backward(
    grad_NTC: Tensor, q_NTC: Tensor, k_NTC: Tensor, v_NTC: Tensor, dropout: _Dropout | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    _, T, C = q_NTC.shape
    scale = C**-0.5
    scaled_q_NTC = q_NTC * scale
    if dropout is not None:
        grad_NTC = grad_NTC * dropout.scale
    grad_q_NTC, grad_k_NTC, grad_v_NTC = (torch.empty_like(x) for x in (q_NTC, k_NTC, v_NTC))
    for n, queries in _bands(*k_NTC.shape[:2]):
        keys = n, slice(queries.stop)
        q, grad = scaled_q_NTC[n, queries], grad_NTC[n, queries]
        weights = _weights_(q @ k_NTC[keys].transpose(1, 2))
        grad_weights = grad @ v_NTC[keys].transpose(1, 2)
        used = weights
        if dropout is not None:
            kept = dropout.kept_like(weights)
            used = weights * kept
            grad_weights *= kept
        slopes = _aten._softmax_backward_data(grad_weights, weights, -1, weights.dtype)
        torch.mul(slopes @ k_NTC[keys], scale, out=grad_q_NTC[n, queries])
        # The last queries, which come first, alone concern every key.
        if queries.stop == T:
            torch.bmm(slopes.transpose(1, 2), q, out=grad_k_NTC[n])
            torch.bmm(used.transpose(1, 2), grad, out=grad_v_NTC[n])
        else:
            grad_k_NTC[keys] += slopes.transpose(1, 2) @ q
            grad_v_NTC[keys] += used.transpose(1, 2) @ grad
    return grad_q_NTC, grad_k_NTC, grad_v_NTC


def _weights_(scores_NTS: Tensor) -> Tensor:
    """Return the attention weights; overwrite the scores."""
    T, S = scores_NTS.shape[-2:]
    # Only the last T columns hold a token after a query.
    later = scores_NTS.new_full((T, T), -torch.inf).triu_(1)
    scores_NTS[..., S - T :] += later
    return scores_NTS.softmax(-1)


def _forward_with_dropout(
    q_BHTC: Tensor, k_BHTC: Tensor, v_BHTC: Tensor, documents_K3: Tensor | None, probability: float
) -> tuple[Tensor, Tensor]:
    seed = torch.randint(2**62, ())
    dropout = _Dropout(probability, seed)
    out_BHTC = _empty_like_heads(q_BHTC)
    for rows, tokens in _groups(documents_K3, q_BHTC.size(0), q_BHTC.size(2)):
        part = rows, slice(None), tokens
        q, k, v = (_merged(x[part]) for x in (q_BHTC, k_BHTC, v_BHTC))
        out_BHTC[part] = _unmerged(_banded_forward(q * q.size(2) ** -0.5, k, v, dropout), out_BHTC[part])
    return out_BHTC, seed


def _backward_with_dropout(
    grad_BHTC: Tensor,
    q_BHTC: Tensor,
    k_BHTC: Tensor,
    v_BHTC: Tensor,
    seed: Tensor,
    documents_K3: Tensor | None,
    probability: float,
) -> tuple[Tensor, Tensor, Tensor]:
    dropout = _Dropout(probability, seed)
    return _backward_by_bands(grad_BHTC, q_BHTC, k_BHTC, v_BHTC, documents_K3, dropout)


_library = cast("Any", torch.library.Library("llm_trainer", "FRAGMENT"))
_library.define("causal_attention(Tensor q, Tensor k, Tensor v, Tensor? documents) -> (Tensor, Tensor)")
_library.define(
    "causal_attention_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor out, Tensor log_sums, "
    "Tensor? documents) -> (Tensor, Tensor, Tensor)"
)
_library.define(
    "causal_attention_dropout(Tensor q, Tensor k, Tensor v, Tensor? documents, float p) -> (Tensor, Tensor)",
    tags=(torch.Tag.nondeterministic_seeded,),
)
_library.define(
    "causal_attention_dropout_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor seed, "
    "Tensor? documents, float p) -> (Tensor, Tensor, Tensor)"
)
_library.impl("causal_attention", _forward, "CPU")
_library.impl("causal_attention_backward", _backward, "CPU")
_library.impl("causal_attention_dropout", _forward_with_dropout, "CPU")
_library.impl("causal_attention_dropout_backward", _backward_with_dropout, "CPU")


def _describe_forward(q: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    return _empty_like_heads(q), q.new_empty(q.shape[:3], dtype=torch.promote_types(q.dtype, torch.float32))


def _describe_forward_with_dropout(q: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    return _empty_like_heads(q), q.new_empty((), dtype=torch.int64)


def _describe_backward(_: Tensor, q: Tensor, k: Tensor, v: Tensor, *__: object) -> tuple[Tensor, ...]:
    return _contiguous_like(q, k, v)


_register_fake = cast("Any", torch.library).register_fake
_register_fake("llm_trainer::causal_attention", _describe_forward, lib=_library)
_register_fake("llm_trainer::causal_attention_backward", _describe_backward, lib=_library)
_register_fake("llm_trainer::causal_attention_dropout", _describe_forward_with_dropout, lib=_library)
_register_fake("llm_trainer::causal_attention_dropout_backward", _describe_backward, lib=_library)
_ops = cast("Any", torch.ops.llm_trainer)


class _CausalAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, documents: Tensor | None) -> Tensor:
        out, log_sums = _ops.causal_attention(q, k, v, documents)
        ctx.save_for_backward(q, k, v, out, log_sums, documents)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return (*_ops.causal_attention_backward(grad, *ctx.saved_tensors), None)


class _CausalAttentionWithDropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, documents: Tensor | None, p: float) -> Tensor:
        out, seed = _ops.causal_attention_dropout(q, k, v, documents, p)
        ctx.save_for_backward(q, k, v, seed, documents)
        ctx.p = p
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return (*_ops.causal_attention_dropout_backward(grad, *ctx.saved_tensors, ctx.p), None, None)


def causal_attention(
    q_BHTC: Tensor,
    k_BHTC: Tensor,
    v_BHTC: Tensor,
    documents_K3: Tensor | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """Attend to all tokens before and at each one, or to those of its document: see `document_runs`.

    `dropout` is the probability of dropping an attention weight, rounded to a multiple of 2^-16. A second
    derivative raises `RuntimeError`.
    """
    if dropout:
        return cast(
            "Tensor", _CausalAttentionWithDropout.apply(q_BHTC, k_BHTC, v_BHTC, documents_K3, dropout)
        )
    return cast("Tensor", _CausalAttention.apply(q_BHTC, k_BHTC, v_BHTC, documents_K3))
