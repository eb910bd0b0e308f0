import warnings

import pytest
import torch
from llm_trainer.exceptions import GenerationError
from llm_trainer.models import apply_repetition_penalty, keep_top_k, keep_top_p

with warnings.catch_warnings():
    # It imports torchao, in whose source Python finds an invalid escape when it first compiles it.
    warnings.filterwarnings("ignore", "invalid escape sequence")
    from transformers import RepetitionPenaltyLogitsProcessor, TopKLogitsWarper, TopPLogitsWarper


def test_greedy_equals_a_loop_over_full_forward_passes(model, ids):
    prompt = ids[:, :5]
    expected = prompt
    with torch.no_grad():
        for _ in range(12):
            expected = torch.cat((expected, model(expected).logits[:, -1:].argmax(-1)), dim=1)
    assert torch.equal(model.generate(prompt, max_length=17), expected)
    assert torch.equal(model.generate(prompt, max_new_tokens=12, use_cache=False), expected)


def test_a_cache_filled_in_parts_gives_the_same_logits(model, ids):
    with torch.no_grad():
        expected = model(ids).logits
        cache = model.new_cache(3, 17)
        parts = [model(ids[:, a:b], cache=cache).logits for a, b in ((0, 4), (4, 5), (5, 11), (11, 17))]
    torch.testing.assert_close(torch.cat(parts, dim=1), expected, atol=1e-5, rtol=1e-5)


def test_sampling_follows_the_distribution(build):
    model = build()
    prompt = torch.zeros(4000, 1, dtype=torch.long)
    generator = torch.Generator().manual_seed(0)
    drawn = model.generate(prompt, max_new_tokens=1, temperature=0.7, generator=generator)[:, 1]
    with torch.no_grad():
        expected = (model(prompt[:1]).logits[0, -1] / 0.7).softmax(-1)
    found = torch.bincount(drawn, minlength=61) / 4000
    # The expected total variation distance of n draws over m outcomes is below sqrt(m / n) / 2 = 0.062.
    assert (found - expected).abs().sum() / 2 < 0.08


def test_a_seed_repeats_a_sample(build, ids):
    model = build()
    first, second, other = (
        model.generate(ids, max_length=24, do_sample=True, generator=torch.Generator().manual_seed(seed))
        for seed in (5, 5, 6)
    )
    assert torch.equal(first, second)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("k", [1, 3, 61, 100])
def test_top_k_equals_transformers(k):
    logits = torch.randn(4, 61)
    assert torch.equal(keep_top_k(logits, k), TopKLogitsWarper(k)(torch.zeros(4, 1), logits))


@pytest.mark.parametrize("p", [0.01, 0.5, 0.9, 1.0])
def test_top_p_equals_transformers(p):
    logits = torch.randn(4, 61) * 3
    assert torch.equal(keep_top_p(logits, p), TopPLogitsWarper(p)(torch.zeros(4, 1), logits))


def test_top_p_of_one_keeps_everything():
    logits = torch.randn(4, 200_000)
    # In float32 the probabilities sum to one, or more, before the last of them.
    sums = logits.sort(descending=True).values.softmax(-1).cumsum(-1)
    assert (sums[:, :-1] >= 1).any()
    assert torch.equal(keep_top_p(logits, 1.0), logits)


def test_the_least_temperature_is_almost_greedy(build, ids):
    model = build()
    assert torch.equal(model.generate(ids, 24, temperature=1e-6), model.generate(ids, 24))


def test_results_can_be_trained_on(build, ids):
    model = build()
    tokens = model.generate(ids, 24)
    assert not tokens.is_inference()
    model(tokens, labels=tokens).loss.backward()
    assert model.embedding.weight.grad.isfinite().all()


def test_what_a_cache_cannot_do_is_refused(build, ids):
    model = build()
    cache = model.new_cache(3, 17)
    with torch.no_grad():
        model(ids, cache=cache)
        with pytest.raises(ValueError, match="room for 17 tokens, but 18"):
            model(ids[:, :1], cache=cache)
    with pytest.raises(ValueError, match="labels and cache"):
        model(ids, labels=ids, cache=model.new_cache(3, 17))
    model = build(gradient_checkpointing=True).train()
    with pytest.raises(ValueError, match="gradient_checkpointing"):
        model(ids, cache=model.new_cache(3, 17))
    with torch.no_grad():
        model(ids, cache=model.new_cache(3, 17))


def test_repetition_penalty_equals_transformers():
    logits, seen = torch.randn(4, 61), torch.randint(0, 61, (4, 9))
    expected = RepetitionPenaltyLogitsProcessor(1.7)(seen, logits)
    assert torch.equal(apply_repetition_penalty(logits, seen, 1.7), expected)


def test_filters_and_penalty_are_applied(build, ids):
    model = build()
    greedy = model.generate(ids, max_length=24)
    assert torch.equal(model.generate(ids, max_length=24, top_k=1), greedy)
    assert torch.equal(model.generate(ids, max_length=24, top_p=1e-6), greedy)
    assert torch.equal(model.generate(ids, max_length=24, temperature=0), greedy)
    assert torch.equal(model.generate(ids, max_length=24, temperature=2.0, do_sample=False), greedy)
    punished = model.generate(ids[:, :1], max_length=24, repetition_penalty=1e6)
    # 24 of 61 tokens, each at most once while others are to be had.
    assert all(len(set(row)) == 24 for row in punished.tolist())


def test_finished_rows_are_padded(build, ids):
    model = build()
    free = model.generate(ids, max_length=24)
    eos = int(free[0, 18])
    stopped = model.generate(ids, max_length=24, eos_token_id=eos, pad_token_id=60)
    for row, full in zip(stopped.tolist(), free.tolist(), strict=True):
        new = full[17:]
        end = 17 + new.index(eos) + 1 if eos in new else 24
        assert row[:end] == full[:end][: len(row)]
        assert all(token == 60 for token in row[end:])
    alone = model.generate(ids[:1], max_length=24, eos_token_id=eos)
    assert alone.size(1) == 17 + free[0, 17:].tolist().index(eos) + 1


def test_length_is_bounded_by_the_model(build, ids):
    model = build().train()
    assert model.generate(ids).shape == (3, 24)
    assert model.training
    with pytest.raises(GenerationError, match=r"24 tokens and leaves no room.*max_seq_len 24"):
        model.generate(torch.zeros(1, 24, dtype=torch.long))
    with pytest.raises(GenerationError, match="max_length is 17"):
        model.generate(ids, max_length=17)


@pytest.mark.parametrize(
    ("parameter", "message"),
    [
        ({"num_beams": 2}, "num_beams is 2; only 1"),
        ({"temperature": -1.0}, "temperature is -1"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"temperature": 1e-30}, "must be 0, which is greedy, or at least 1e-06"),
        ({"repetition_penalty": float("nan")}, "repetition_penalty is nan"),
        ({"top_k": 0}, "top_k is 0"),
        ({"top_p": 1.5}, "top_p is 1.5"),
        ({"repetition_penalty": 0.0}, "repetition_penalty is 0"),
    ],
)
def test_impossible_parameters(build, ids, parameter, message):
    with pytest.raises(GenerationError, match=message) as caught:
        build().generate(ids, **parameter)
    assert isinstance(caught.value, ValueError)
