"""Layers with quantised weights in plain buffers, so that torch.export can follow them and store them."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

from hamerspace._imports import need


def replace_layers(module: Any, kind: Any, make: Callable[[Any], Any]) -> int:
    """Put ``make(layer)`` in the place of each layer of this very class, and return how many there were.

    A layer for which ``make`` gives None stays.
    """
    made: dict[int, Any] = {}
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is kind:
                if id(child) not in made:
                    made[id(child)] = make(child)
                if made[id(child)] is not None:
                    setattr(parent, name, made[id(child)])
    return sum(one is not None for one in made.values())


def embeddings_in_place(module: Any) -> int:
    """Store embeddings as int8 with a scale a row; only the rows that are looked up become floats again."""
    torch = need("torch")
    return replace_layers(
        module, torch.nn.Embedding, lambda table: int8_embedding(table) if table.max_norm is None else None
    )


def int8_embedding(table: Any) -> Any:
    """Return an embedding's int8 form."""
    weight = table.weight.detach().float()
    scale = (weight.abs().amax(dim=1) / 127).clamp_min(1e-12)
    return _int8_embedding()((weight / scale[:, None]).round().to(need("torch").int8), scale)


@cache
def _int8_embedding() -> Any:
    torch = need("torch")

    class Int8Embedding(torch.nn.Module):
        """Rows of int8, each with its scale."""

        def __init__(self, weight: Any, scale: Any) -> None:
            super().__init__()  # pyright: ignore[reportUnknownMemberType]
            self.register_buffer("weight", weight)
            self.register_buffer("scale", scale)

        def forward(self, ids: Any) -> Any:
            return self.weight[ids].to(self.scale.dtype) * self.scale[ids].unsqueeze(-1)

    return Int8Embedding
