"""A block of the decoder.

Letters of shapes: B sequences, T new tokens, S all tokens so far, H heads of queries, D size of a head,
C size of the residual stream.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from bitcore.config import BitQuantConfig
from bitlayers import BitLinear, SubLN
from torch import Tensor, nn

from bitmodels.transformer._cache import KVCache
from bitmodels.transformer._config import BitTransformerConfig

__all__ = ["Block", "rotations"]


def rotations(config: BitTransformerConfig, positions_T: Tensor) -> tuple[Tensor, Tensor]:
    """Return the cosines and sines [T, D] by which positions are turned (RoFormer, arXiv 2104.09864)."""
    size = config.head_size
    exponents = torch.arange(0, size, 2, device=positions_T.device, dtype=torch.float32) / size
    angles = positions_T.float().unsqueeze(-1) * config.rope_theta**-exponents
    angles = torch.cat((angles, angles), -1)
    return angles.cos(), angles.sin()


def _turned(x_BHTD: Tensor, cos_TD: Tensor, sin_TD: Tensor) -> Tensor:
    first, second = x_BHTD.chunk(2, -1)
    return x_BHTD * cos_TD + torch.cat((-second, first), -1) * sin_TD


class _Attention(nn.Module):
    def __init__(self, config: BitTransformerConfig, quant_config: BitQuantConfig, layer: int) -> None:
        super().__init__()
        self.layer, self.head_size = layer, config.head_size
        self.heads, self.key_value_heads = config.num_attention_heads, config.key_value_heads
        queries, keys = self.heads * self.head_size, self.key_value_heads * self.head_size
        bias = config.attention_bias
        self.q_proj = BitLinear(config.hidden_size, queries, bias, quant_config=quant_config)
        self.k_proj = BitLinear(config.hidden_size, keys, bias, quant_config=quant_config)
        self.v_proj = BitLinear(config.hidden_size, keys, bias, quant_config=quant_config)
        self.attn_sub_norm = SubLN(queries, config.rms_norm_eps) if config.sub_norm else nn.Identity()
        self.o_proj = BitLinear(queries, config.hidden_size, bias, quant_config=quant_config)

    def forward(self, x_BTC: Tensor, cos_TD: Tensor, sin_TD: Tensor, cache: KVCache | None) -> Tensor:
        tokens = x_BTC.shape[:2]
        q_BHTD = self.q_proj(x_BTC).view(*tokens, self.heads, self.head_size).transpose(1, 2)
        k_BHTD = self.k_proj(x_BTC).view(*tokens, self.key_value_heads, self.head_size).transpose(1, 2)
        v_BHSD = self.v_proj(x_BTC).view(*tokens, self.key_value_heads, self.head_size).transpose(1, 2)
        q_BHTD = _turned(q_BHTD, cos_TD, sin_TD)
        k_BHSD = _turned(k_BHTD, cos_TD, sin_TD)
        new = q_BHTD.shape[2]
        if cache is not None:
            k_BHSD, v_BHSD = cache.extend(self.layer, k_BHSD, v_BHSD)
        known = k_BHSD.shape[2]
        mask = None
        if 1 < new < known:
            ones = torch.ones(new, known, dtype=torch.bool, device=x_BTC.device)
            mask = ones.tril(known - new)
        out_BHTD = F.scaled_dot_product_attention(
            q_BHTD,
            k_BHSD,
            v_BHSD,
            mask,
            is_causal=1 < new == known,
            enable_gqa=self.heads != self.key_value_heads,
        )
        out_BTC = out_BHTD.transpose(1, 2).flatten(2)
        return self.o_proj(self.attn_sub_norm(out_BTC))


class _GatedMLP(nn.Module):
    def __init__(self, config: BitTransformerConfig, quant_config: BitQuantConfig) -> None:
        super().__init__()
        size, inner = config.hidden_size, config.intermediate_size
        self.gate_proj = BitLinear(size, inner, bias=False, quant_config=quant_config)
        self.up_proj = BitLinear(size, inner, bias=False, quant_config=quant_config)
        self.ffn_sub_norm = SubLN(inner, config.rms_norm_eps) if config.sub_norm else nn.Identity()
        self.down_proj = BitLinear(inner, size, bias=False, quant_config=quant_config)
        self.squares = config.hidden_act == "relu2"

    def forward(self, x_BTC: Tensor) -> Tensor:
        gate = self.gate_proj(x_BTC)
        gate = gate.relu().square() if self.squares else F.silu(gate)
        return self.down_proj(self.ffn_sub_norm(gate * self.up_proj(x_BTC)))


class Block(nn.Module):
    """Attention and a gated layer, each after a norm and added to the residual stream."""

    def __init__(self, config: BitTransformerConfig, quant_config: BitQuantConfig, layer: int) -> None:
        super().__init__()
        self.input_layernorm = SubLN(config.hidden_size, config.rms_norm_eps)
        self.self_attn = _Attention(config, quant_config, layer)
        self.post_attention_layernorm = SubLN(config.hidden_size, config.rms_norm_eps)
        self.mlp = _GatedMLP(config, quant_config)

    def forward(self, x_BTC: Tensor, cos_TD: Tensor, sin_TD: Tensor, cache: KVCache | None) -> Tensor:
        """Return the residual stream after the block."""
        x_BTC = x_BTC + self.self_attn(self.input_layernorm(x_BTC), cos_TD, sin_TD, cache)
        return x_BTC + self.mlp(self.post_attention_layernorm(x_BTC))
