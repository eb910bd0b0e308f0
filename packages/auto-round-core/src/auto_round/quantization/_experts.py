"""Products with many experts at once, in few shapes, so that memory does not grow with each batch.

How many rows an expert is given changes from batch to batch. For each shape that it has not met, torch's
library for products on a CPU makes and keeps code and buffers: with bfloat16 some hundred MB after a few
hundred batches, which no limit on memory foresees. Rows are filled up to a few sizes here.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

GROUPED_PRODUCTS = ("_grouped_mm", "grouped_mm", "grouped_mm_fallback")
"""Functions of (rows, weights, offs): torch's own, and what transformers has where torch lacks it."""
_ROWS = 64


class FewShapes(TorchFunctionMode):
    """Computes products of groups of rows on a CPU in few shapes, within a `with` in this thread.

    Those that torch or transformers computes for all experts at once, and those of single experts.
    """

    def __torch_function__(
        self,
        func: Any,
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__name__", "") in GROUPED_PRODUCTS and len(args) == 2:
            rows, weights = args
            others = {name for name, value in kwargs.items() if value is not None}
            if others == {"offs"} and rows.ndim == 2 and weights.ndim == 3 and rows.device.type == "cpu":
                return cast("Any", _Grouped).apply(rows, weights, kwargs["offs"].tolist())
        if func is F.linear and _is_an_experts(*args, **kwargs):
            count = len(args[0])
            return func(_filled(args[0]), *args[1:], **kwargs)[:count]
        return func(*args, **kwargs)


def _is_an_experts(rows: object = None, *_: object, **__: object) -> bool:
    """Return whether a layer is given rows out of sequences, in a type for which torch keeps what it made."""
    return (
        isinstance(rows, Tensor)
        and rows.ndim == 2
        and rows.device.type == "cpu"
        and rows.dtype in (torch.bfloat16, torch.float16)
    )


class _Grouped(torch.autograd.Function):
    """Rows [S, in] times the weights [E, in, out] of their groups, which end at `ends`; gives [S, out]."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weights: Tensor, ends: list[int]) -> Tensor:  # pyright: ignore
        ctx.save_for_backward(rows, weights)
        ctx.ends = ends
        out = rows.new_zeros(len(rows), weights.shape[2])
        for expert, part in _parts(ends):
            out[part] = torch.mm(_filled(rows[part]), weights[expert])[: part.stop - part.start]
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None]:  # pyright: ignore
        rows, weights = ctx.saved_tensors
        d_rows = torch.zeros_like(rows) if ctx.needs_input_grad[0] else None
        d_weights = torch.zeros_like(weights) if ctx.needs_input_grad[1] else None
        for expert, part in _parts(ctx.ends):
            grad = _filled(grads[0][part])
            if d_rows is not None:
                d_rows[part] = torch.mm(grad, weights[expert].t())[: part.stop - part.start]
            if d_weights is not None:
                d_weights[expert] = torch.mm(_filled(rows[part]).t(), grad)
        return d_rows, d_weights, None


def _parts(ends: list[int]) -> Iterator[tuple[int, slice]]:
    """Yield the experts that have rows, and which."""
    start = 0
    for expert, end in enumerate(ends):
        if end > start:
            yield expert, slice(start, end)
        start = end


def _filled(rows: Tensor) -> Tensor:
    """Return rows followed by zeros up to one of few counts, an eighth more at most where there are many."""
    step = max(_ROWS, 1 << max(0, len(rows).bit_length() - 4))
    return F.pad(rows, (0, 0, 0, -len(rows) % step))
