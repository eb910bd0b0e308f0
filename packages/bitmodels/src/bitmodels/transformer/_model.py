"""The decoder."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from bitcore.config import BitQuantConfig
from bitlayers import BitLinear, SubLN
from bitlayers.utils import evaluating
from torch import Tensor, nn

from bitmodels.base import BitModelBase
from bitmodels.config import ModelConfig
from bitmodels.exceptions import QuantizationError
from bitmodels.registry import register_model
from bitmodels.transformer._block import Block, rotations
from bitmodels.transformer._cache import KVCache
from bitmodels.transformer._config import BitTransformerConfig
from bitmodels.transformer._sampling import chosen

__all__ = ["BitTransformerLM"]


class _Decoder(nn.Module):
    def __init__(self, config: BitTransformerConfig, quant_config: BitQuantConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            Block(config, quant_config, layer) for layer in range(config.num_hidden_layers)
        )
        self.norm = SubLN(config.hidden_size, config.rms_norm_eps)


@register_model("BitTransformerLM")
class BitTransformerLM(BitModelBase):
    """A causal language model with ternary layers: BitNet b1.58 (Ma et al., arXiv 2402.17764 and 2504.12285).

    A Llama whose linear layers are `BitLinear`, with a norm before each pair of them and, with `sub_norm`,
    one before the last of attention and of the gated part. The embedding and the head stay floats, as
    BitNet's do. Parameters have the names that Hugging Face's models give them.
    """

    config_class: ClassVar[type[ModelConfig] | None] = BitTransformerConfig

    def __init__(
        self, config: BitTransformerConfig, quant_config: BitQuantConfig | Mapping[str, Any] | None = None
    ) -> None:
        super().__init__(config, quant_config)
        self.model = _Decoder(config, self.quant_config)
        self.lm_head = (
            None
            if config.tie_word_embeddings
            else nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        )
        self.apply(self._begin)

    def forward(self, input_ids: Tensor, *, cache: KVCache | None = None, last_only: bool = False) -> Tensor:
        """Return the logits of the token after each.

        Args:
            input_ids: int64 [B, T], all sequences of one length.
            cache: Of the tokens before; the new ones are added to it.
            last_only: Only the logits after the last token.

        Returns:
            [B, T, vocab_size], or [B, 1, vocab_size], in the dtype of the weights.

        Raises:
            QuantizationError: `input_ids` is no matrix of whole numbers, or there are more tokens than
                positions or than the cache has room for.
            IndexError: An id is not below `vocab_size`.
        """
        if input_ids.ndim != 2 or input_ids.dtype not in (torch.int32, torch.int64):
            raise QuantizationError(
                f"input_ids is int64 [sequences, tokens]; this is {input_ids.dtype} {list(input_ids.shape)}."
            )
        start = 0 if cache is None else cache.length
        end = start + input_ids.shape[1]
        if end > self.config.max_position_embeddings:
            raise QuantizationError(
                f"{end} tokens are more than the model's {self.config.max_position_embeddings} positions."
            )
        x_BTC = self.model.embed_tokens(input_ids)
        cos_TD, sin_TD = rotations(self.config, torch.arange(start, end, device=input_ids.device))
        cos_TD, sin_TD = cos_TD.to(x_BTC.dtype), sin_TD.to(x_BTC.dtype)
        for block in self.model.layers:
            x_BTC = block(x_BTC, cos_TD, sin_TD, cache)
        if cache is not None:
            cache.length = end
        if last_only:
            x_BTC = x_BTC[:, -1:]
        x_BTC = self.model.norm(x_BTC)
        head = self.model.embed_tokens if self.lm_head is None else self.lm_head
        return F.linear(x_BTC, head.weight)

    def loss(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        """Return the mean cross-entropy of labels, in nats.

        Args:
            input_ids: int64 [B, T].
            labels: int64 [B, T]: the token after each, or -100 where none is asked for.
        """
        logits = self(input_ids)
        return F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten())

    def generate(
        self,
        input_ids: Tensor,
        max_new_tokens: int = 128,
        *,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        eos_token_id: int | tuple[int, ...] | None = None,
        generator: torch.Generator | None = None,
        on_token: Callable[[Tensor], object] | None = None,
    ) -> Tensor:
        """Write on, token by token.

        Args:
            input_ids: int64 [B, T], at least one token, all sequences of one length.
            max_new_tokens: How many at most; fewer where the positions end.
            temperature: By which logits are divided; 0 takes the likeliest token.
            top_k: Choose among that many of the likeliest.
            top_p: Choose among the likeliest that have this probability together.
            eos_token_id: Ends a sequence; the configuration's if None. What follows in it repeats that token.
            generator: Of the random choices.
            on_token: Called with each column of new tokens, int64 [B].

        Returns:
            int64 [B, T + new tokens], with the given ones first.

        Raises:
            QuantizationError: A value is impossible, or there are more tokens than positions.
        """
        if input_ids.ndim != 2 or input_ids.shape[1] == 0:
            raise QuantizationError("input_ids is int64 [sequences, tokens], with one token at least.")
        if max_new_tokens < 0:
            raise QuantizationError(f"max_new_tokens is {max_new_tokens}; it must not be negative.")
        config = self.config
        ends = config.eos_token_id if eos_token_id is None else eos_token_id
        eos = None if ends is None else torch.tensor(ends, device=input_ids.device).view(-1)
        batch, given = input_ids.shape
        room = min(given + max_new_tokens, config.max_position_embeddings)
        if given > room:
            raise QuantizationError(f"{given} tokens are more than the model's {room} positions.")
        weight = self.model.embed_tokens.weight
        with evaluating(self), torch.inference_mode():
            cache = KVCache(config, batch, room, device=weight.device, dtype=weight.dtype)
            ids, ended = input_ids, torch.zeros(batch, dtype=torch.bool, device=input_ids.device)
            step = input_ids
            while ids.shape[1] < room and not bool(ended.all()):
                logits = self(step, cache=cache, last_only=True)[:, 0]
                token = chosen(logits.float(), temperature, top_k, top_p, generator)
                if eos is not None:
                    token = torch.where(ended, ids[:, -1], token)
                    ended |= torch.isin(token, eos)
                ids, step = torch.cat((ids, token[:, None]), 1), token[:, None]
                if on_token is not None:
                    on_token(token)
        return ids.clone()  # A plain tensor, which may be trained on.

    def _begin(self, part: nn.Module) -> None:
        if isinstance(part, nn.Embedding | nn.Linear | BitLinear) and part.weight is not None:
            nn.init.normal_(part.weight, std=self.config.initializer_range)
            if isinstance(part, BitLinear) and part.bias is not None:
                nn.init.zeros_(part.bias)
