"""Ways to tell a transformer where a token stands.

Letters: B batch, T tokens, D model width, N heads, C head width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


def _angles(positions: Tensor, frequencies: Tensor) -> Tensor:
    return positions[..., None].to(torch.float32) * frequencies


class SinusoidalPositions(nn.Module):
    """Fixed sines and cosines of geometrically spaced wavelengths (Vaswani et al., 2017, section 3.5).

    Sines fill the first half of the width and cosines the second; they are scaled by `scale`, because token
    embeddings of a small initial spread would drown in values of order one. They are computed as they are
    needed, so that a long `max_seq_len` costs nothing.
    """

    def __init__(self, d_model: int, scale: float) -> None:
        super().__init__()
        self.d_model = d_model
        self.scale = scale

    def forward(self, positions: Tensor) -> Tensor:
        """Return the vectors to add for positions (T) or (B, T), in float32."""
        half = (self.d_model + 1) // 2
        frequencies = 10000.0 ** (-torch.arange(half, dtype=torch.float32, device=positions.device) / half)
        angles = _angles(positions, frequencies)
        return torch.cat((angles.sin(), angles.cos()), dim=-1)[..., : self.d_model] * self.scale


class Rope(nn.Module):
    """Cosines and sines of the rotary embedding (Su et al., 2021), halves rotated as Llama does."""

    def __init__(self, d_head: int, theta: float) -> None:
        super().__init__()
        self.d_head = d_head
        self.theta = theta

    def forward(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return cosines and sines for positions (T) or (B, T), shaped to multiply (B, T, N, C/2)."""
        pairs = torch.arange(0, self.d_head, 2, dtype=torch.float32, device=positions.device)
        angles = _angles(positions, self.theta ** (-pairs / self.d_head)).unsqueeze(-2)
        return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x_BTNC: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate each pair (i, i + C/2) of every head by its position's angle."""
    cos, sin = rope
    first, second = x_BTNC.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
