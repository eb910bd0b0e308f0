"""Generation from left to right. Letters: B batch, T tokens, V vocabulary."""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from llm_trainer.exceptions import GenerationError

if TYPE_CHECKING:
    from llm_trainer.models._transformer import TransformerLM


_LEAST_TEMPERATURE = 1e-6


@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerationSettings:
    """The checked parameters of `TransformerLM.generate`, where they are documented."""

    max_length: int
    temperature: float
    top_k: int | None
    top_p: float | None
    do_sample: bool | None
    num_beams: int
    repetition_penalty: float
    eos_token_id: int | None
    pad_token_id: int | None
    use_cache: bool

    def __post_init__(self) -> None:
        if self.num_beams != 1:
            raise GenerationError(f"num_beams is {self.num_beams}; only 1 (no beam search) is supported.")
        if not (self.temperature == 0 or _LEAST_TEMPERATURE <= self.temperature < math.inf):
            raise GenerationError(
                f"temperature is {self.temperature}; it must be 0, which is greedy, or at least "
                f"{_LEAST_TEMPERATURE:g}, below which logits divided by it overflow."
            )
        if self.top_k is not None and self.top_k < 1:
            raise GenerationError(f"top_k is {self.top_k}; it must be at least 1, or None.")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise GenerationError(f"top_p is {self.top_p}; it must be above 0 and at most 1, or None.")
        if not 0 < self.repetition_penalty < math.inf:
            raise GenerationError(
                f"repetition_penalty is {self.repetition_penalty}; it must be above 0 and finite."
            )

    @property
    def samples(self) -> bool:
        """Whether tokens are drawn rather than the likeliest taken."""
        if self.temperature == 0 or self.do_sample is not None:
            return bool(self.do_sample) and self.temperature > 0
        return self.temperature != 1 or self.top_k is not None or self.top_p is not None


def generate_tokens(
    model: TransformerLM, input_ids: Tensor, settings: GenerationSettings, generator: torch.Generator | None
) -> Tensor:
    """Continue (B, T) prompts; see `TransformerLM.generate`."""
    if input_ids.dim() != 2 or not input_ids.numel():
        raise GenerationError(
            f"input_ids must have shape (batch, tokens), not empty, but have {tuple(input_ids.shape)}."
        )
    B, T = input_ids.shape
    limit = min(settings.max_length, model.config.max_seq_len)
    if limit <= T:
        raise GenerationError(
            f"The prompt has {T} tokens and leaves no room: max_length is {settings.max_length} "
            f"(it counts the prompt) and the model's max_seq_len {model.config.max_seq_len}."
        )
    eos = settings.eos_token_id
    pad = settings.pad_token_id if settings.pad_token_id is not None else eos
    tokens = input_ids.new_empty((B, limit))
    tokens[:, :T] = input_ids
    finished = torch.zeros(B, dtype=torch.bool, device=input_ids.device)
    cache = model.new_cache(B, limit) if settings.use_cache else None
    end = T
    while end < limit:
        read = tokens[:, cache.length : end] if cache is not None else tokens[:, :end]
        chosen = _choose(model.next_logits(read, cache), tokens[:, :end], settings, generator)
        if eos is not None and pad is not None:
            chosen = torch.where(finished, pad, chosen)
            finished |= chosen == eos
        tokens[:, end] = chosen
        end += 1
        if eos is not None and bool(finished.all()):
            break
    return tokens[:, :end]


def _choose(
    logits_BV: Tensor, tokens_BT: Tensor, settings: GenerationSettings, generator: torch.Generator | None
) -> Tensor:
    if settings.repetition_penalty != 1:
        logits_BV = apply_repetition_penalty(logits_BV, tokens_BT, settings.repetition_penalty)
    if not settings.samples:
        return logits_BV.argmax(dim=-1)
    logits_BV = logits_BV / settings.temperature
    if settings.top_k is not None:
        logits_BV = keep_top_k(logits_BV, settings.top_k)
    if settings.top_p is not None:
        logits_BV = keep_top_p(logits_BV, settings.top_p)
    return torch.multinomial(logits_BV.softmax(dim=-1), 1, generator=generator).squeeze(1)


def keep_top_k(logits: Tensor, k: int) -> Tensor:
    """Set all but the k largest logits of each row to minus infinity; ties with the k-th stay."""
    if k >= logits.size(-1):
        return logits
    return logits.masked_fill(logits < logits.topk(k).values[..., -1:], -torch.inf)


def keep_top_p(logits: Tensor, p: float) -> Tensor:
    """Set all to minus infinity but the fewest largest logits whose probabilities sum to at least p."""
    if p >= 1:
        # Sums of probabilities round, and would drop some of the least likely.
        return logits
    ordered, order = logits.sort(dim=-1, descending=True)
    probabilities = ordered.softmax(dim=-1)
    # A token goes when those before it reach p already; the first has none before it.
    drop = probabilities.cumsum(dim=-1) - probabilities >= p
    return logits.masked_fill(drop.gather(-1, order.argsort(dim=-1)), -torch.inf)


def apply_repetition_penalty(logits: Tensor, input_ids: Tensor, penalty: float) -> Tensor:
    """Divide the positive and multiply the negative logits of the tokens in `input_ids` by `penalty`."""
    seen = logits.gather(-1, input_ids)
    return logits.scatter(-1, input_ids, torch.where(seen > 0, seen / penalty, seen * penalty))
