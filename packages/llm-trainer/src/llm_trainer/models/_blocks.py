"""The blocks that a transformer stacks. Letters: B batch, T tokens, D model width."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llm_trainer.config import ModelConfig
from llm_trainer.models._attention import CausalSelfAttention
from llm_trainer.models._cache import LayerCache
from llm_trainer.models._fast_ops import Linear, RMSNorm, squared_relu


def build_norm(config: ModelConfig) -> nn.Module:
    """Return the normalisation that `config.norm` names."""
    if config.norm == "rmsnorm":
        return RMSNorm(config.d_model, config.norm_eps)
    return nn.LayerNorm(config.d_model, eps=config.norm_eps, bias=config.bias)


def _activate(x: Tensor, activation: str) -> Tensor:
    match activation:
        case "gelu":
            return F.gelu(x, approximate="tanh")
        case "relu":
            return F.relu(x)
        case "relu2":
            return squared_relu(x)
        case _:
            return F.silu(x)


class FeedForward(nn.Module):
    """Two projections with an activation between; `swiglu` multiplies SiLU of one projection with another."""

    def __init__(self, *, d_model: int, d_ff: int, activation: str, bias: bool) -> None:
        super().__init__()
        self.activation = activation
        self.gated = activation == "swiglu"
        self.up = Linear(d_model, d_ff * (2 if self.gated else 1), bias=bias)
        self.down = Linear(d_ff, d_model, bias=bias)

    def forward(self, x_BTD: Tensor) -> Tensor:
        """Apply to each token alone."""
        hidden = self.up(x_BTD)
        if self.gated:
            gate, hidden = hidden.chunk(2, dim=-1)
            return self.down(F.silu(gate) * hidden)
        return self.down(_activate(hidden, self.activation))


class Block(nn.Module):
    """Attention and feed-forward, each added to the residual stream."""

    def __init__(
        self,
        *,
        attention: CausalSelfAttention,
        feed_forward: FeedForward,
        attention_norm: nn.Module,
        feed_forward_norm: nn.Module,
        dropout: float,
        pre_norm: bool,
    ) -> None:
        super().__init__()
        self.attention_norm = attention_norm
        self.attention = attention
        self.feed_forward_norm = feed_forward_norm
        self.feed_forward = feed_forward
        self.dropout = dropout
        self.pre_norm = pre_norm

    def forward(
        self,
        x_BTD: Tensor,
        rope: tuple[Tensor, Tensor] | None = None,
        mask: Tensor | None = None,
        documents: Tensor | None = None,
        cache: LayerCache | None = None,
    ) -> Tensor:
        """See `CausalSelfAttention.forward` for all but `x_BTD`."""
        where = {"rope": rope, "mask": mask, "documents": documents, "cache": cache}
        if self.pre_norm:
            x_BTD = x_BTD + self._drop(self.attention(self.attention_norm(x_BTD), **where))
            return x_BTD + self._drop(self.feed_forward(self.feed_forward_norm(x_BTD)))
        attended = self._drop(self.attention(x_BTD, **where))
        x_BTD = self.attention_norm(x_BTD + attended)
        return self.feed_forward_norm(x_BTD + self._drop(self.feed_forward(x_BTD)))

    def _drop(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout, self.training) if self.dropout else x


def build_block(config: ModelConfig) -> Block:
    """Return one block of the model that `config` describes."""
    return Block(
        attention=CausalSelfAttention(
            d_model=config.d_model,
            n_heads=config.n_heads,
            kv_heads=config.kv_heads,
            bias=config.bias,
            qk_norm=config.qk_norm,
            attention_dropout=config.attention_dropout,
        ),
        feed_forward=FeedForward(
            d_model=config.d_model, d_ff=config.d_ff, activation=config.activation, bias=config.bias
        ),
        attention_norm=build_norm(config),
        feed_forward_norm=build_norm(config),
        dropout=config.dropout,
        pre_norm=config.pre_norm,
    )


@torch.no_grad()
def initialise_block_(block: Block, config: ModelConfig) -> None:
    """Draw a block's weights so that every layer starts with outputs of about the size of its inputs.

    Matrices are normal with variance 1 / fan-in; the projections back to the residual stream are divided by
    the square root of twice the number of layers (as in GPT-2), or are zero.
    """
    for linear in (block.attention.qkv, block.feed_forward.up):
        nn.init.normal_(linear.weight, std=linear.in_features**-0.5)
    for linear in (block.attention.out, block.feed_forward.down):
        if config.zero_init_projections:
            nn.init.zeros_(linear.weight)
        else:
            nn.init.normal_(linear.weight, std=(2 * config.n_layers * linear.in_features) ** -0.5)
    for linear in (block.attention.qkv, block.attention.out, block.feed_forward.up, block.feed_forward.down):
        if config.bias:
            nn.init.zeros_(linear.bias)
