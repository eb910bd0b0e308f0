"""Calibration text that the float model writes itself."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from auto_round._files import shown
from auto_round.exceptions import CalibrationError, ConfigurationError
from auto_round.quantization._calibration import check_count
from auto_round.quantization._next_token import NextToken, evaluating, text_config
from auto_round.quantization._token_rows import rows_of

_ROWS = 16
"""Rows that are drawn at once; one of 150,000 tokens takes 2 MB meanwhile."""


def self_written_tokens(
    model: Any,
    *,
    nsamples: int,
    seqlen: int,
    seed: int,
    tokenizer: Any = None,
    vocab_size: int | None = None,
    prompts: object = None,
    temperature: float = 1.0,
    top_k: int | None = None,
    greedy_tokens: int = 4,
    batch_size: int | None = None,
    device: torch.device | str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Tensor:
    """Let a causal language model write sequences to calibrate with.

    A text begins as in the hybrid strategy of LLM-QAT (arXiv 2305.17888, data-free distillation), which the
    paper found better than drawing all tokens or taking the likeliest each time: the begin token where there
    is one, a token drawn evenly from the vocabulary without its special tokens, the likeliest token
    `greedy_tokens` times (3 to 5 in the paper), and from then on tokens drawn from the model's own
    distribution. Where the model ends a text, another one begins in the same row, as documents follow each
    other in training data. With `prompts` the rows continue those instead.

    Each step runs the model once over the newest token of all rows of a batch, so a model whose weights come
    from disk is read `seqlen` times a batch: the larger the batch, the better. A batch keeps the keys and
    values of its rows; `cache_bytes_per_row` tells how much that is. What a row becomes does not depend on
    the batch it is in, but for the model's own rounding.

    Args:
        model: A causal language model of transformers, whose weights may come by hooks; or a callable as
            described by `NextToken`. It runs without dropout and gradients and is left as it was.
        nsamples: Rows to write.
        seqlen: Tokens in each, the begin token included.
        seed: Of everything drawn; an integer of at least 0. No global random state is read or changed.
        tokenizer: Tells the begin, end and special tokens and how many tokens there are; None takes the
            model's configuration, which may count tokens that no text has.
        vocab_size: Tokens there are, where neither tokenizer nor configuration tells.
        prompts: Token ids [P, length] with a length below `seqlen`, of which row i continues number i mod P.
        temperature: The logits are divided by it; 1 draws from the model's own distribution.
        top_k: Draw from that many of the likeliest tokens; None from all.
        greedy_tokens: Likeliest tokens taken before any is drawn; the end of a text is never among them.
        batch_size: Rows written at once; None means all.
        device: Where the ids go; None means where the weights are, or the CPU if they come when needed.
        progress: Called after each token of a batch with the tokens written so far and in all.

    Returns:
        int64 [nsamples, seqlen] on the CPU.

    Raises:
        CalibrationError: The model predicts no next token (BERT, T5), its logits are not finite or fewer than
            the vocabulary has tokens, or the prompts are no token ids of it.
        ConfigurationError: A number is out of range, or `seqlen` is longer than the model's positions.
    """
    check_count("nsamples", nsamples, least=1)
    check_count("seqlen", seqlen, least=1)
    check_count("seed", seed, least=0)
    check_count("greedy_tokens", greedy_tokens, least=0)
    batch_size = nsamples if batch_size is None else batch_size
    check_count("batch_size", batch_size, least=1)
    choice = _Choice(temperature=temperature, top_k=top_k)
    next_token = NextToken(model, device=device)
    config = text_config(model)
    _check_positions(config, seqlen)
    texts = _Texts.of(config, tokenizer, vocab_size, getattr(model, "generation_config", None), greedy_tokens)
    beginnings = _prompts(prompts, seqlen, texts.vocabulary)
    # One number a token, drawn before all else, makes rows the same in batches of any size.
    generator = torch.Generator().manual_seed(seed)
    uniform = torch.rand(nsamples, seqlen, dtype=torch.float64, generator=generator)
    ids = torch.zeros(nsamples, seqlen, dtype=torch.int64)
    if beginnings is not None:
        ids[:, : beginnings.shape[1]] = beginnings[torch.arange(nsamples) % len(beginnings)]
    given = 0 if beginnings is None else beginnings.shape[1]
    with evaluating(model):
        for start in range(0, nsamples, batch_size):
            rows = slice(start, min(start + batch_size, nsamples))
            next_token.restart()
            age = texts.age_in_the_middle if given else 0
            ages = torch.full((rows.stop - start,), age)
            for column in range(given, seqlen):
                _write_(ids[rows], column, ages, uniform[rows, column], texts, choice, next_token)
                if progress is not None:
                    progress(start * seqlen + (rows.stop - start) * (column + 1), nsamples * seqlen)
        next_token.restart()
    return ids


@dataclass(frozen=True, kw_only=True)
class _Choice:
    """How a token is drawn."""

    temperature: float
    top_k: int | None

    def __post_init__(self) -> None:
        value: object = self.temperature
        if not isinstance(value, int | float) or not math.isfinite(value) or value <= 0:
            raise ConfigurationError(f"temperature is {shown(value)}; it must be a number above 0.")
        if self.top_k is not None:
            check_count("top_k", self.top_k, least=1)

    def draw(self, logits_BV: Tensor, uniform_B: Tensor) -> Tensor:
        """Invert the distribution function at each row's number of [0, 1); returns int64 [B]."""
        scaled = logits_BV / self.temperature
        if self.top_k is not None and self.top_k < scaled.shape[1]:
            least = scaled.topk(self.top_k).values[:, -1:]
            scaled = scaled.masked_fill(scaled < least, -math.inf)
        # The sums of many small numbers need float64; the numbers themselves do not.
        sums = scaled.sub_(scaled.amax(-1, keepdim=True)).exp_().cumsum(-1, dtype=torch.float64)
        found = torch.searchsorted(sums, uniform_B[:, None] * sums[:, -1:], right=True)
        return found[:, 0].clamp(max=scaled.shape[1] - 1)


@dataclass(frozen=True, kw_only=True)
class _Texts:
    """How texts of a model begin and end. A row's age is the number of tokens since its text began."""

    vocabulary: int
    bos: int | None
    ends: Tensor
    starts: Tensor
    """Tokens with which a text may begin, after `bos`."""
    greedy: int

    @classmethod
    def of(cls, config: Any, tokenizer: Any, vocab_size: int | None, generation: Any, greedy: int) -> _Texts:
        """Take from the tokenizer what it tells, else from the configurations."""
        known: list[int] = [vocab_size] if vocab_size is not None else []
        if hasattr(tokenizer, "__len__"):
            known.append(len(tokenizer))
        if getattr(config, "vocab_size", None) is not None:
            known.append(config.vocab_size)
        if not known:
            raise CalibrationError(
                "Neither a tokenizer nor a configuration of the model tells how many tokens there are; give "
                "vocab_size."
            )
        vocabulary = min(known)
        check_count("vocab_size", vocabulary, least=1)
        # A tokenizer without a begin token knows better than the configuration, where it is often a default.
        told = config if tokenizer is None else tokenizer
        # Defaults may also lie outside a small vocabulary.
        begins = _ids([getattr(told, "bos_token_id", None)], vocabulary)
        parts = (tokenizer, config, generation)
        ends = _ids([getattr(part, "eos_token_id", None) for part in parts], vocabulary)
        special = {*begins, *ends, *_ids([getattr(told, "pad_token_id", None)], vocabulary)}
        special |= set(getattr(tokenizer, "all_special_ids", ()))
        starts = [token for token in range(vocabulary) if token not in special] or list(range(vocabulary))
        return cls(
            vocabulary=vocabulary,
            bos=begins[0] if begins else None,
            ends=torch.tensor(ends, dtype=torch.int64),
            starts=torch.tensor(starts),
            greedy=greedy,
        )

    @property
    def age_at_start(self) -> int:
        return 0 if self.bos is None else 1

    @property
    def age_in_the_middle(self) -> int:
        return self.age_at_start + 1 + self.greedy


def _ids(values: list[Any], vocabulary: int) -> list[int]:
    """Return the ids among `values`, each of which is an id, a list of them, or None."""
    found: set[int] = set()
    for value in values:
        several = isinstance(value, list | tuple)
        for token in cast("list[object]", value if several else [value]):
            if isinstance(token, int) and 0 <= token < vocabulary:
                found.add(token)
    return sorted(found)


def _write_(
    ids_BT: Tensor,
    column: int,
    ages_B: Tensor,
    uniform_B: Tensor,
    texts: _Texts,
    choice: _Choice,
    next_token: NextToken,
) -> None:
    """Write one column of `ids_BT`, and bring `ages_B` up to date."""
    start = texts.age_at_start
    tokens = texts.starts[(uniform_B * len(texts.starts)).long()]
    if bool((ages_B > start).any()):
        logits_BV = next_token.logits(ids_BT[:, :column])
        if logits_BV.shape[1] < texts.vocabulary:
            raise CalibrationError(
                f"The model gives logits for {logits_BV.shape[1]} tokens, but the vocabulary has "
                f"{texts.vocabulary}; the tokenizer belongs to another model."
            )
        # Rows beyond the tokenizer's length only fill the matrix up, and stand for no text.
        logits_BV = logits_BV[:, : texts.vocabulary]
        is_greedy = (ages_B > start) & (ages_B < texts.age_in_the_middle)
        for first in range(0, len(ids_BT), _ROWS):
            rows = slice(first, first + _ROWS)
            drawn = choice.draw(logits_BV[rows], uniform_B[rows])
            tokens[rows] = torch.where(ages_B[rows] >= texts.age_in_the_middle, drawn, tokens[rows])
        if bool(is_greedy.any()):
            likeliest = logits_BV.index_fill(1, texts.ends, -math.inf).argmax(-1)
            tokens = torch.where(is_greedy, likeliest, tokens)
    if texts.bos is not None:
        tokens[ages_B == 0] = texts.bos
    ids_BT[:, column] = tokens
    ages_B += 1
    # Only a token that was drawn ends a text. The end of many models is their begin token as well.
    ended = torch.isin(tokens, texts.ends) & (ages_B > texts.age_in_the_middle)
    ages_B[ended] = 0
    if texts.bos is not None:
        ages_B[ended & (tokens == texts.bos)] = start


def _check_positions(config: Any, seqlen: int) -> None:
    most = getattr(config, "max_position_embeddings", None)
    if isinstance(most, int) and 0 < most < seqlen:
        raise ConfigurationError(
            f"seqlen is {seqlen}, but the model knows {most} positions; set "
            f"quantization.seqlen to at most {most}."
        )


def _prompts(prompts: object, seqlen: int, vocabulary: int) -> Tensor | None:
    if prompts is None:
        return None
    rows = rows_of(prompts, "the prompts", vocab_size=vocabulary)
    lengths = sorted({len(row) for row in rows})
    if len(lengths) != 1 or not 0 < lengths[0] < seqlen:
        raise CalibrationError(
            f"The prompts have lengths {shown(lengths)}; all must have the same, from 1 to {seqlen - 1}, so "
            "that there is something to write."
        )
    return torch.stack(rows)
