"""The decoder against transformers' BitNet, its cache against no cache, and sampling by hand."""

import pytest
import torch
from bitmodels import BitTransformerConfig, BitTransformerLM
from bitmodels.exceptions import QuantizationError
from bitmodels.transformer import KVCache
from bitmodels.transformer._sampling import chosen


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def small(**given):
    values = {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 40,
        "initializer_range": 0.3,
    }
    return BitTransformerLM(BitTransformerConfig(**(values | given))).eval()


@pytest.mark.parametrize(
    "given", [{}, {"sub_norm": False, "hidden_act": "silu", "tie_word_embeddings": False}]
)
def test_with_a_cache_the_logits_are_the_same(given):
    model, ids = small(**given).deploy(), torch.randint(64, (2, 13))
    with torch.no_grad():
        whole = model(ids)
        cache = KVCache(model.config, 2, 13)
        parts = [model(part, cache=cache) for part in ids.split([5, 1, 1, 4, 2], 1)]
        torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-4, atol=1e-4)
        assert cache.length == 13
        torch.testing.assert_close(model(ids, last_only=True), whole[:, -1:])


def test_later_tokens_change_nothing_before_them():
    model, ids = small(), torch.randint(64, (1, 12))
    other = ids.clone()
    other[:, 7:] = (other[:, 7:] + 1) % 64
    with torch.no_grad():
        first, second = model(ids), model(other)
    torch.testing.assert_close(first[:, :7], second[:, :7])
    assert not torch.allclose(first[:, 7:], second[:, 7:])


def test_loss_is_the_mean_over_labels():
    model, ids = small(), torch.randint(64, (2, 9))
    labels = torch.cat((ids[:, 1:], torch.full((2, 1), -100)), 1)
    logits = model(ids)[:, :-1].log_softmax(-1)
    expected = -logits.gather(2, ids[:, 1:, None]).mean()
    torch.testing.assert_close(model.loss(ids, labels), expected)


def test_greedy_text_is_the_likeliest_token_after_token():
    model, ids = small(), torch.randint(64, (2, 5))
    out = model.generate(ids, 12, temperature=0)
    assert out.shape == (2, 17)
    assert torch.equal(out[:, :5], ids)
    with torch.no_grad():
        for end in range(5, 17):
            assert torch.equal(model(out[:, :end])[:, -1].argmax(-1), out[:, end])


def test_generation_ends_at_the_end():
    model, ids = small(), torch.randint(64, (1, 5))
    free = model.generate(ids, 20, temperature=0)[0, 5:].tolist()
    stop = next(token for token in free if token != free[0])
    seen = []
    out = model.generate(ids, 20, temperature=0, eos_token_id=stop, on_token=lambda t: seen.append(t.item()))
    expected = free[: free.index(stop) + 1]
    assert out[0, 5:].tolist() == seen == expected
    both = model.generate(ids, 20, temperature=0, eos_token_id=(stop, free[0]))
    assert both[0, 5:].tolist() == free[:1]
    # A sequence that has ended repeats its end while the other goes on.
    pair = torch.cat((ids, torch.randint(64, (1, 5))))
    out = model.generate(pair, 20, temperature=0, eos_token_id=stop)
    assert out[0, 5 : 5 + len(expected)].tolist() == expected
    assert set(out[0, 5 + len(expected) :].tolist()) <= {stop}
    assert model.generate(ids, 100, temperature=0).shape[1] == 40
    assert torch.equal(model.generate(ids, 0), ids)


def test_generation_leaves_the_model_as_it_was_and_repeats_with_a_seed():
    model, ids = small().train(), torch.randint(64, (1, 4))
    outs = [model.generate(ids, 8, generator=torch.Generator().manual_seed(s)) for s in (1, 1, 2)]
    assert model.training
    assert model.model.layers[0].mlp.up_proj.training
    assert torch.equal(outs[0], outs[1])
    assert not torch.equal(outs[0], outs[2])
    model.loss(outs[0][:, :-1], outs[0][:, 1:]).backward()
    assert model.model.layers[0].mlp.up_proj.weight.grad.any()


def test_sampling_by_hand():
    logits = torch.tensor([[0.5, 0.25, 0.15, 0.1]]).log().repeat(4000, 1)
    generator = torch.Generator().manual_seed(0)

    def shares(*arguments):
        found = chosen(logits, *arguments, generator).bincount(minlength=4) / len(logits)
        return pytest.approx(found.tolist(), abs=0.03)

    assert shares(1.0, None, None) == [0.5, 0.25, 0.15, 0.1]
    assert shares(1.0, 2, None) == [2 / 3, 1 / 3, 0, 0]
    # 0.5 and 0.25 are not yet 0.8, so the third belongs to them.
    assert shares(1.0, None, 0.8) == [0.5 / 0.9, 0.25 / 0.9, 0.15 / 0.9, 0]
    assert shares(1.0, None, 0.4) == [1, 0, 0, 0]
    assert shares(0.5, None, None) == [share / 0.345 for share in (0.25, 0.0625, 0.0225, 0.01)]
    assert chosen(logits, 0, None, None, None).unique().tolist() == [0]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"temperature": -1}, "temperature is -1"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"top_k": 0}, "top_k is 0"),
        ({"top_p": 0.0}, "top_p is 0.0"),
        ({"max_new_tokens": -1}, "max_new_tokens is -1"),
    ],
)
def test_settings_that_are_refused(given, message):
    with pytest.raises(QuantizationError, match=message):
        small().generate(torch.tensor([[1]]), **given)


def test_inputs_that_are_refused():
    model = small()
    for bad in (torch.tensor([1]), torch.randn(1, 3), torch.ones(1, 41, dtype=torch.int64)):
        with pytest.raises(QuantizationError):
            model(bad)
    with pytest.raises(QuantizationError, match="41 tokens are more"):
        model.generate(torch.ones(1, 41, dtype=torch.int64))
    with pytest.raises(QuantizationError, match="one token at least"):
        model.generate(torch.empty(1, 0, dtype=torch.int64))
    with pytest.raises(QuantizationError, match="room for 3 tokens, not for 4"):
        model(torch.ones(1, 4, dtype=torch.int64), cache=KVCache(model.config, 1, 3))
    with pytest.raises(IndexError):
        model(torch.tensor([[64]]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_halves(dtype):
    model, ids = small().deploy(), torch.randint(64, (1, 8))
    with torch.no_grad():
        expected = model(ids)
        out = model.to(dtype)(ids)
        assert out.dtype == dtype
        assert (out.float() - expected).norm() < 0.1 * expected.norm()
        assert model.generate(ids, 3).shape == (1, 11)
