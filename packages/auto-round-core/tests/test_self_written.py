"""Text that the model writes: its distribution, how texts begin and end, real models, and what is refused."""

import itertools

import numpy as np
import pytest
import torch
import transformers
from auto_round.config_manager import QuantizationConfig
from auto_round.exceptions import CalibrationError, ConfigurationError
from auto_round.quantization._calibration_choice import calibration_sequences
from auto_round.quantization._next_token import cache_bytes_per_row
from auto_round.quantization._self_written import self_written_tokens
from scipy import stats
from torch import nn

TABLE = torch.tensor(
    [
        [0.0, 1.0, -1.0, 0.5, 0.2],
        [2.0, 0.0, 0.0, -0.5, 1.0],
        [-1.0, 0.3, 0.0, 1.5, 0.0],
        [0.0, 0.0, 0.0, 0.0, 0.0],
        [1.0, -2.0, 0.7, 0.1, -0.3],
    ]
)


class Ids:
    """A tokenizer that tells no more than which ids there are."""

    def __init__(self, length, *, bos=None, eos=None, special=()):
        self.bos_token_id, self.eos_token_id, self.pad_token_id = bos, eos, None
        self.all_special_ids = [*special, *(token for token in (bos, eos) if token is not None)]
        self._length = length

    def __len__(self):
        return self._length


def chain(ids):
    """Logits that depend on the token before and nothing else."""
    return TABLE[ids]


def write(model, **options):
    return self_written_tokens(model, **{"nsamples": 3, "seqlen": 12, "seed": 0, **options})


def built(name, **changes):
    """A small random model, with weights so large that what it writes depends on what went before."""
    settings = {
        "vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
        "intermediate_size": 48, "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2,
        "pad_token_id": 0, **changes,
    }  # fmt: skip
    config = transformers.AutoConfig.for_model(name, **settings)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize(("temperature", "top_k"), [(1.0, None), (0.6, None), (2.0, 3), (1.0, 99)])
def test_tokens_are_drawn_from_the_softmax_of_the_logits(temperature, top_k):
    found = write(
        chain, nsamples=150, seqlen=40, vocab_size=5, greedy_tokens=0, temperature=temperature, top_k=top_k
    )
    counts = np.zeros((5, 5))
    np.add.at(counts, (found[:, :-1].flatten().numpy(), found[:, 1:].flatten().numpy()), 1)
    for token, row in enumerate(TABLE.double().numpy() / temperature):
        weights = np.exp(row)
        if top_k == 3:
            weights[row < np.sort(row)[-3]] = 0
        possible = weights > 0
        assert counts[token][~possible].sum() == 0
        expected = weights[possible] / weights.sum() * counts[token].sum()
        assert expected.min() > 2
        # Of 20 such comparisons one falls below this twice in a thousand seeds.
        assert stats.chisquare(counts[token][possible], expected).pvalue > 1e-4


def test_a_text_begins_with_any_token_then_with_the_likeliest():
    tokenizer = Ids(5, bos=4, special=[3])
    found = write(chain, nsamples=900, seqlen=9, tokenizer=tokenizer, greedy_tokens=3)
    assert (found[:, 0] == 4).all()
    starts = np.bincount(found[:, 1].numpy(), minlength=5)
    assert starts[3:].sum() == 0
    assert stats.chisquare(starts[:3]).pvalue > 1e-3
    for column in (2, 3, 4):
        assert torch.equal(found[:, column], TABLE[found[:, column - 1]].argmax(-1))
    assert not torch.equal(found[:, 5], TABLE[found[:, 4]].argmax(-1))


@pytest.mark.parametrize(("bos", "begin"), [(4, [4]), (None, []), (0, [])])
def test_where_a_text_ends_another_begins(bos, begin):
    """0 ends a text; it is the likeliest token after 1, where the greedy ones leave it out."""
    tokenizer = Ids(5, bos=bos, eos=0)
    rows = write(chain, nsamples=40, seqlen=60, tokenizer=tokenizer, greedy_tokens=2).tolist()
    ends = 0
    for row in rows:
        at = 1 if bos == 0 else 0
        while at < len(row):
            begun = row[at : at + len(begin) + 3]
            assert begun[: len(begin)] == begin[: len(begun)]
            text = begun[len(begin) :]
            assert not text or text[0] not in (0, bos)
            for before, after in itertools.pairwise(text):
                assert after == 1 + int(TABLE[before, 1:].argmax())
            middle = row[at + len(begin) + 3 :]
            if 0 not in middle:
                break
            ends += 1
            at += len(begin) + 3 + middle.index(0) + 1
    assert ends > 40


def test_tokens_that_the_tokenizer_does_not_know_are_never_written():
    wide = torch.cat([TABLE, torch.full((5, 3), 50.0)], 1)
    assert write(lambda ids: wide[ids], nsamples=50, tokenizer=Ids(5)).max() < 5


@pytest.mark.parametrize("batch_size", [1, 4, 7])
def test_the_batch_does_not_matter(batch_size):
    model = built("llama", num_key_value_heads=2)
    whole = write(model, nsamples=7)
    assert torch.equal(write(model, nsamples=7, batch_size=batch_size), whole)
    assert len(whole.unique(dim=0)) == 7


def test_the_seed_alone_decides():
    torch.manual_seed(3)
    state = torch.random.get_rng_state()
    first = write(chain, vocab_size=5)
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.rand(1)
    assert torch.equal(write(chain, vocab_size=5), first)
    assert not torch.equal(write(chain, vocab_size=5, seed=1), first)


SLIDING = ["sliding_attention", "full_attention"]


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("llama", {"num_key_value_heads": 2}),
        ("gpt2", {"n_inner": 48}),
        ("opt", {"ffn_dim": 48, "word_embed_proj_dim": 32}),
        ("gemma3_text", {"head_dim": 8, "sliding_window": 4, "layer_types": SLIDING}),
        ("mixtral", {"num_key_value_heads": 2, "num_local_experts": 4}),
        ("mamba", {"state_size": 4}),
    ],
)  # fmt: skip
def test_models_of_transformers_write_with_a_cache_what_they_write_without(name, changes):
    model = built(name, **changes).eval()
    tokenizer = Ids(61, bos=1, eos=2)
    rows = write(model, seqlen=24, nsamples=6, tokenizer=tokenizer)

    def uncached(ids):
        return model(input_ids=ids, use_cache=False).logits

    whole = write(uncached, seqlen=24, nsamples=6, tokenizer=tokenizer)
    assert torch.equal(rows, whole)
    assert len(rows.unique()) > 4


def test_a_row_that_begins_anew_feeds_all_that_the_model_has_not_seen():
    model = built("llama", eos_token_id=None).eval()
    middle = write(model, seqlen=40, nsamples=1, tokenizer=Ids(61, bos=1))[0, 6:]
    tokenizer = Ids(61, bos=1, eos=int(middle[middle != 1][0]))

    def uncached(ids):
        return model(input_ids=ids, use_cache=False).logits

    row = write(model, seqlen=40, nsamples=1, tokenizer=tokenizer)
    assert (row[0] == 1).sum() > 1
    assert torch.equal(row, write(uncached, seqlen=40, nsamples=1, tokenizer=tokenizer))


def test_prompts_are_continued_as_generate_does():
    model = built("llama", eos_token_id=None).eval()
    prompts = torch.tensor([[5, 6, 7], [20, 30, 40]])
    found = write(model, prompts=prompts, nsamples=3, seqlen=14, top_k=1)
    expected = model.generate(
        prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=11, do_sample=False
    )
    assert torch.equal(found, expected[[0, 1, 0]])


def test_each_step_runs_the_model_over_the_new_token_only():
    model, shapes, kept = built("llama", eos_token_id=None), [], []
    forward = model.forward

    def watched(input_ids, logits_to_keep=0, **options):
        shapes.append(tuple(input_ids.shape))
        kept.append(logits_to_keep)
        return forward(input_ids=input_ids, logits_to_keep=logits_to_keep, **options)

    model.forward = watched
    write(model, nsamples=5, seqlen=10, batch_size=3)
    assert shapes == [(3, 2), *[(3, 1)] * 7, (2, 2), *[(2, 1)] * 7]
    assert set(kept) == {1}


def test_a_model_whose_weights_come_by_hooks_writes_the_same():
    model = built("llama")
    expected = write(model)
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}

    def bring(prefix):
        def hook(module, _):
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    module._parameters[name] = nn.Parameter(weights[prefix + name], requires_grad=False)

        return hook

    def clean(module, *_):
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = nn.Parameter(parameter.to("meta"), requires_grad=False)

    for prefix, module in model.named_modules():
        if module._parameters:
            clean(module)
            module.register_forward_pre_hook(bring(f"{prefix}."))
            module.register_forward_hook(clean)
    assert all(parameter.is_meta for parameter in model.parameters())
    assert torch.equal(write(model), expected)
    assert all(parameter.is_meta for parameter in model.parameters())


def test_dropout_is_off_and_the_modes_come_back():
    model = built("gpt2", embd_pdrop=0.5, resid_pdrop=0.5, attn_pdrop=0.5).train()
    model.transformer.h[0].eval()
    before = [module.training for module in model.modules()]
    found = write(model)
    assert [module.training for module in model.modules()] == before
    assert torch.equal(found, write(model.eval()))
    model.train()
    with torch.no_grad():
        model.lm_head.weight.fill_(torch.nan)
    with pytest.raises(CalibrationError):
        write(model)
    assert model.training


def test_progress_counts_the_tokens():
    calls = []
    write(chain, vocab_size=5, nsamples=5, seqlen=4, batch_size=2, progress=lambda *call: calls.append(call))
    assert [done for done, _ in calls] == [2, 4, 6, 8, 10, 12, 14, 16, 17, 18, 19, 20]
    assert {total for _, total in calls} == {20}


@pytest.mark.parametrize(
    ("name", "changes", "dtype"),
    [
        ("llama", {"num_key_value_heads": 2}, torch.float32),
        ("gpt2", {}, torch.bfloat16),
        ("gemma3_text", {"head_dim": 16, "num_key_value_heads": 2}, torch.float32),
    ],
)
def test_the_bytes_of_the_cache(name, changes, dtype):
    model = built(name, **changes).to(dtype).eval()
    cache = model(input_ids=torch.ones(2, 9, dtype=torch.int64), use_cache=True).past_key_values
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert 2 * cache_bytes_per_row(model.config, seqlen=9, dtype=dtype) == held


BERT = {
    "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 48,
    "vocab_size": 61,
}  # fmt: skip


def test_models_that_predict_no_next_token_are_refused():
    config = transformers.BertConfig(**BERT)
    for kind in (transformers.BertModel, transformers.BertForMaskedLM):
        with pytest.raises(CalibrationError, match=f"{kind.__name__} has no head that predicts"):
            write(kind(config))
    for seed in range(3):
        torch.manual_seed(seed)
        with pytest.raises(CalibrationError, match="change with the tokens after it"):
            write(transformers.BertLMHeadModel(config))
    t5 = transformers.T5Config(vocab_size=61, d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=2)
    with pytest.raises(CalibrationError, match="T5ForConditionalGeneration answers an input"):
        write(transformers.T5ForConditionalGeneration(t5))
    with pytest.raises(CalibrationError, match="cannot be called"):
        write(None, vocab_size=5)
    decoder = transformers.BertLMHeadModel(transformers.BertConfig(**BERT, is_decoder=True))
    assert write(decoder).shape == (3, 12)


def test_a_callable_that_sees_the_future_is_refused():
    def reversed_chain(ids):
        return TABLE[ids.flip(1)]

    with pytest.raises(CalibrationError, match="looks at the whole text"):
        write(reversed_chain, vocab_size=5)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_logits_that_are_not_finite_are_refused(value):
    def damaged(ids):
        logits = TABLE[ids].clone()
        if ids.shape[1] == 7:
            logits[1, -1, 2] = value
        return logits

    with pytest.raises(CalibrationError, match=f"logits after token 7 of row 1 are {value}"):
        write(damaged, vocab_size=5)


def test_a_token_may_be_impossible_but_not_all():
    without_2 = TABLE.index_fill(1, torch.tensor([2]), -torch.inf)
    found = write(lambda ids: without_2[ids], vocab_size=5, nsamples=50)
    assert not (found[:, 1:] == 2).any()
    with pytest.raises(CalibrationError, match="are -inf"):
        write(lambda ids: torch.full((*ids.shape, 5), -torch.inf), vocab_size=5)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"vocab_size": None}, CalibrationError, "give vocab_size"),
        ({"vocab_size": 6, "prompts": [[1, 2]]}, CalibrationError, "for 5 tokens, .* vocabulary has 6"),
        ({"tokenizer": Ids(0)}, ConfigurationError, "vocab_size is 0"),
        ({"prompts": torch.tensor([[1, 5]])}, CalibrationError, "token id 5 at place 1"),
        ({"prompts": torch.ones(1, 12, dtype=torch.int64)}, CalibrationError, r"lengths \[12\].* 1 to 11"),
        ({"prompts": torch.rand(1, 2)}, CalibrationError, "float32"),
        ({"temperature": 0}, ConfigurationError, "temperature is 0"),
        ({"temperature": float("nan")}, ConfigurationError, "temperature is nan"),
        ({"top_k": 0}, ConfigurationError, "top_k is 0"),
        ({"greedy_tokens": -1}, ConfigurationError, "greedy_tokens is -1"),
        ({"batch_size": 0}, ConfigurationError, "batch_size is 0"),
        ({"nsamples": 0}, ConfigurationError, "nsamples is 0"),
        ({"seqlen": 1.5}, ConfigurationError, r"seqlen is 1\.5"),
        ({"seed": -1}, ConfigurationError, "seed is -1"),
    ],
)
def test_what_cannot_be_is_refused(options, error, message):
    with pytest.raises(error, match=message):
        write(chain, **{"vocab_size": 5, **options})


def test_more_tokens_than_positions_are_refused():
    with pytest.raises(ConfigurationError, match="seqlen is 65, but the model knows 64 positions"):
        write(built("gpt2"), seqlen=65)
    assert write(built("gpt2"), seqlen=64, nsamples=1).shape == (1, 64)


@pytest.mark.parametrize("returned", [torch.zeros(5), torch.zeros(2, 3, 5), "logits"])
def test_a_callable_that_returns_no_logits_is_refused(returned):
    with pytest.raises(CalibrationError, match=r"must return logits \[B, T, V\] or \[B, V\]"):
        write(lambda ids: returned, vocab_size=5)


def test_the_ids_go_to_the_device():
    seen = []

    def model(ids):
        seen.append(ids.device.type)
        return torch.zeros(len(ids), 5)

    write(model, vocab_size=5)
    write(model, vocab_size=5, device="meta")
    settings = QuantizationConfig(calibration="self", nsamples=2, seqlen=2)
    calibration_sequences(model, None, None, settings, vocab_size=5, device="meta")
    assert seen == ["cpu"] * 11 + ["meta"] * 12


def test_logits_of_the_last_token_alone_will_do():
    assert torch.equal(write(lambda ids: chain(ids)[:, -1], vocab_size=5), write(chain, vocab_size=5))


USER = torch.arange(1000, 1000 + 64).reshape(8, 8)


@pytest.mark.parametrize(("calibration", "own"), [("user", 0), ("mixed", 3), ("self", 7)])
def test_whose_text(calibration, own):
    settings = QuantizationConfig(calibration=calibration, nsamples=7, seqlen=8, seed=3)
    calls = []

    def model(ids):
        calls.append(len(ids))
        return chain(ids)

    data = None if calibration == "self" else USER
    found = calibration_sequences(padded(model), None, data, settings, vocab_size=2000)
    is_user = (found >= 1000).all(1)
    assert found.shape == (7, 8)
    assert int(is_user.sum()) == 7 - own
    assert all(row in USER.tolist() for row in found[is_user].tolist())
    if calibration == "mixed":
        assert is_user.tolist() == [True, False, True, False, True, False, True]
    assert bool(calls) is bool(own)


def padded(model):
    """Logits for 2000 tokens, of which all but 5 are impossible."""

    def wide(ids):
        logits = torch.full((*ids.shape, 2000), -torch.inf)
        logits[..., :5] = model(ids.clamp(max=4))
        return logits

    return wide


def test_whose_text_is_refused_where_it_says_nothing():
    settings = QuantizationConfig(calibration="self", nsamples=4, seqlen=8)
    with pytest.raises(ConfigurationError, match="'self', which reads no data"):
        calibration_sequences(chain, None, USER, settings)
    settings = QuantizationConfig(calibration="mixed", nsamples=1, seqlen=8)
    with pytest.raises(ConfigurationError, match="nsamples to at least 2"):
        calibration_sequences(chain, None, USER, settings)
    settings = QuantizationConfig(calibration="mixed", nsamples=4, seqlen=8)
    with pytest.raises(CalibrationError, match="no calibration data"):
        calibration_sequences(None, None, None, settings)
