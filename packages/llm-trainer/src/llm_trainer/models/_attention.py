"""Causal self-attention.

Letters: B batch, T tokens, S tokens attended to, D model width, H query heads, K key-value heads, C head
    width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llm_trainer.models._cache import LayerCache
from llm_trainer.models._causal_attention import causal_attention, serves
from llm_trainer.models._fast_ops import Linear, unit_rms
from llm_trainer.models._positions import rotate

_QK_NORM_EPS = 1e-6


class CausalSelfAttention(nn.Module):
    """Multi-head attention with grouped keys and values, queries, keys and values from one projection."""

    def __init__(
        self,
        *,
        d_model: int,
        n_heads: int,
        kv_heads: int,
        bias: bool,
        qk_norm: bool,
        attention_dropout: float,
    ) -> None:
        super().__init__()
        self.n_heads = n_heads
        self.kv_heads = kv_heads
        self.d_head = d_model // n_heads
        self.qk_norm = qk_norm
        self.attention_dropout = attention_dropout
        self.qkv = Linear(d_model, (n_heads + 2 * kv_heads) * self.d_head, bias=bias)
        self.out = Linear(d_model, d_model, bias=bias)

    def forward(
        self,
        x_BTD: Tensor,
        *,
        rope: tuple[Tensor, Tensor] | None = None,
        mask: Tensor | None = None,
        documents: Tensor | None = None,
        cache: LayerCache | None = None,
    ) -> Tensor:
        """Attend to the tokens before and at each one.

        Args:
            x_BTD: Input.
            rope: What `Rope` returns for the tokens' positions.
            mask: Boolean (B, 1, T, S), True where a token may look; None means all that came before.
            documents: Instead of a mask where `serves` allows, what `document_runs` returns.
            cache: Where earlier keys and values are, and these will be.
        """
        B, T, _ = x_BTD.shape
        heads: Tensor = self.qkv(x_BTD).view(B, T, self.n_heads + 2 * self.kv_heads, self.d_head)
        # Queries and keys are normalised and rotated alike, in one go.
        keys_end = self.n_heads + self.kv_heads
        qk, v = heads[:, :, :keys_end], heads[:, :, keys_end:]
        if self.qk_norm:
            qk = unit_rms(qk, _QK_NORM_EPS)
        if rope is not None:
            qk = rotate(qk, (rope[0].to(qk.dtype), rope[1].to(qk.dtype)))
        q, k = qk[:, :, : self.n_heads], qk[:, :, self.n_heads :]
        q_BHTC, k_BKSC, v_BKSC = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        first = cache is None or cache.length == 0
        if cache is not None:
            k_BKSC, v_BKSC = cache.append(k_BKSC, v_BKSC)
        dropout = self.attention_dropout if self.training else 0.0
        if mask is None and cache is None and serves(x_BTD.device):
            groups = self.n_heads // self.kv_heads
            if groups > 1:
                k_BKSC, v_BKSC = (x.repeat_interleave(groups, dim=1) for x in (k_BKSC, v_BKSC))
            y_BHTC = causal_attention(q_BHTC, k_BKSC, v_BKSC, documents, dropout)
        else:
            y_BHTC = F.scaled_dot_product_attention(
                q_BHTC,
                k_BKSC,
                v_BKSC,
                attn_mask=mask,
                dropout_p=dropout,
                is_causal=mask is None and first,
                enable_gqa=self.kv_heads != self.n_heads,
            )
        return self.out(y_BHTC.transpose(1, 2).reshape(B, T, -1))


def allowed_pairs(segments_BT: Tensor) -> Tensor:
    """Return the mask (B, 1, T, T) of tokens that may look at one another: causal, within one segment.

    Segment 0 is padding, which nothing looks at but itself, because a softmax over nothing is not a number.
    """
    T = segments_BT.size(1)
    same = segments_BT[:, :, None] == segments_BT[:, None, :]
    same &= (segments_BT != 0)[:, None, :]
    causal = torch.ones(T, T, dtype=torch.bool, device=segments_BT.device).tril()
    itself = torch.eye(T, dtype=torch.bool, device=segments_BT.device)
    return ((same & causal) | itself)[:, None]
