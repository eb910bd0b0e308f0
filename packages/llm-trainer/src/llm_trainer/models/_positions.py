"""Ways to tell a transformer where a token stands.

Letters: B batch, T tokens, D model width, N heads, C head width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class SinusoidalPositions(nn.Module):
    """Fixed sines and cosines of geometrically spaced wavelengths (Vaswani et al., 2017, section 3.5).

    Sines fill the first half of the width and cosines the second; they are scaled by `scale`, because token
    embeddings of a small initial spread would drown in values of order one.
    """

    def __init__(self, max_seq_len: int, d_model: int, scale: float) -> None:
        super().__init__()
        half = (d_model + 1) // 2
        frequencies = 10000.0 ** (-torch.arange(half, dtype=torch.float32) / half)
        angles = torch.arange(max_seq_len, dtype=torch.float32)[:, None] * frequencies
        table = torch.cat((angles.sin(), angles.cos()), dim=-1)[:, :d_model]
        self.table: Tensor
        self.register_buffer("table", table * scale, persistent=False)

    def forward(self, positions: Tensor) -> Tensor:
        """Return the vectors to add for `positions` of any shape."""
        return self.table[positions]


class Rope(nn.Module):
    """Cosines and sines of the rotary embedding (Su et al., 2021), halves rotated as Llama does."""

    def __init__(self, max_seq_len: int, d_head: int, theta: float) -> None:
        super().__init__()
        frequencies = theta ** (-torch.arange(0, d_head, 2, dtype=torch.float32) / d_head)
        angles = torch.arange(max_seq_len, dtype=torch.float32)[:, None] * frequencies
        self.cos_TC: Tensor
        self.sin_TC: Tensor
        self.register_buffer("cos_TC", angles.cos(), persistent=False)
        self.register_buffer("sin_TC", angles.sin(), persistent=False)

    def forward(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return cosines and sines for positions (T) or (B, T), shaped to multiply (B, T, N, C/2)."""
        return self.cos_TC[positions].to(dtype).unsqueeze(-2), self.sin_TC[positions].to(dtype).unsqueeze(-2)


def rotate(x_BTNC: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate each pair (i, i + C/2) of every head by its position's angle."""
    cos, sin = rope
    first, second = x_BTNC.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
