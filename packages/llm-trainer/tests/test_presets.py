import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from llm_trainer.config import ModelConfig, calculate_parameters, estimate_memory_usage
from llm_trainer.exceptions import ModelConfigurationError
from llm_trainer.models import TransformerLM

SIZES = {"mini": (8192, 20e6), "small": (50257, 124e6), "medium": (50257, 355e6)}


def built_parameters(config):
    with torch.device("meta"):
        return TransformerLM(config).get_num_params()


def test_gpt2_small_is_the_published_model():
    config = ModelConfig.preset("gpt2-small")
    found = (config.vocab_size, config.n_layers, config.n_heads, config.d_model, config.d_ff)
    assert found == (50257, 12, 12, 768, 3072)
    assert (config.max_seq_len, config.positions, config.norm, config.activation) == (
        1024,
        "learned",
        "layernorm",
        "gelu",
    )
    assert (
        config.tie_embeddings,
        config.bias,
        config.dropout,
        config.attention_dropout,
        config.pre_norm,
    ) == (
        True,
        True,
        0.1,
        0.1,
        True,
    )
    # The counts that OpenAI's checkpoints have, 124,439,808 and 354,823,168.
    assert calculate_parameters(config) == 124_439_808
    assert calculate_parameters(ModelConfig.preset("gpt2-medium")) == 354_823_168


def test_families_of_one_size_are_equally_large():
    assert set(ModelConfig.presets()) == {
        f"{family}-{size}" for family in ("gpt2", "llama", "speedrun") for size in SIZES
    }
    for size, (vocab_size, about) in SIZES.items():
        counts = [
            built_parameters(ModelConfig.preset(f"{family}-{size}", vocab_size=vocab_size))
            for family in ("gpt2", "llama", "speedrun")
        ]
        assert counts[0] == pytest.approx(about, rel=0.06)
        for one, other in itertools.combinations(counts, 2):
            assert one == pytest.approx(other, rel=0.02)


@pytest.mark.parametrize("name", ModelConfig.presets())
def test_presets_say_what_their_family_is(name):
    config = ModelConfig.preset(name)
    if name.startswith("gpt2"):
        return
    assert (config.positions, config.norm, config.bias, config.dropout) == ("rope", "rmsnorm", False, 0)
    assert config.vocab_size % 64 == 0
    if name.startswith("llama"):
        assert config.activation == "swiglu"
        assert config.kv_heads < config.n_heads
    else:
        assert (config.activation, config.qk_norm, config.zero_init_projections) == ("relu2", True, True)
        assert config.logit_softcap is not None


def test_changes_to_a_preset():
    config = ModelConfig.preset("llama-mini", vocab_size=1000, n_kv_heads=None)
    assert (config.vocab_size, config.kv_heads, config.activation) == (1000, 6, "swiglu")
    assert ModelConfig.preset("gpt2-mini", positions="rope").use_learned_pos_emb is False
    with pytest.raises(ModelConfigurationError, match="did you mean 'vocab_size'"):
        ModelConfig.preset("llama-mini", vocabsize=1000)
    with pytest.raises(ModelConfigurationError, match="vocab_size is 'many'"):
        ModelConfig.preset("llama-mini", vocab_size="many")


@pytest.mark.parametrize("name", ["lama-small", "llama-smal", "llama small"])
def test_an_unknown_preset_names_the_nearest_and_all(name):
    with pytest.raises(ModelConfigurationError, match="did you mean 'llama-small'") as caught:
        ModelConfig.preset(name)
    assert all(known in str(caught.value) for known in ModelConfig.presets())


@pytest.mark.parametrize("name", ["", "xyz", 7, None, "gpt2-small-small"])
def test_names_like_none(name):
    with pytest.raises(ModelConfigurationError, match="known presets: gpt2-mini"):
        ModelConfig.preset(name)


def test_memory_by_hand():
    # 1000 x 8 embedding; a block of 3*64+64 attention and 2*8*16 feed-forward weights; three norms of 8.
    config = ModelConfig(
        vocab_size=1000,
        d_model=8,
        n_heads=2,
        n_layers=1,
        d_ff=16,
        norm="rmsnorm",
        bias=False,
        positions="rope",
    )
    assert calculate_parameters(config) == 8000 + 256 + 256 + 24
    assert estimate_memory_usage(config) == 8536 * 16 / 1024**3


@given(
    st.fixed_dictionaries(
        {
            "vocab_size": st.integers(1, 300),
            "n_layers": st.integers(1, 3),
            "d_ff": st.integers(1, 70),
            "max_seq_len": st.integers(1, 50),
            "activation": st.sampled_from(["gelu", "relu", "relu2", "silu", "swiglu"]),
            "norm": st.sampled_from(["layernorm", "rmsnorm"]),
            "positions": st.sampled_from(["sinusoidal", "learned", "rope"]),
            "logit_softcap": st.sampled_from([None, 15.0]),
        }
        | {
            flag: st.booleans()
            for flag in (
                "pre_norm",
                "qk_norm",
                "tie_embeddings",
                "bias",
                "zero_init_projections",
                "gradient_checkpointing",
            )
        }
    ),
    st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 6)),
)
@settings(max_examples=150, deadline=None)
def test_the_count_is_that_of_the_built_model(fields, heads):
    kv_heads, group, half_head = heads
    n_heads = kv_heads * group
    config = ModelConfig(**fields, n_heads=n_heads, n_kv_heads=kv_heads, d_model=n_heads * 2 * half_head)
    assert calculate_parameters(config) == built_parameters(config)
