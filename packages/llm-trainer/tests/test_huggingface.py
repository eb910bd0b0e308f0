import json
import shutil
import warnings

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from llm_trainer.config import ModelConfig
from llm_trainer.exceptions import ConfigurationError, FormatError, ModelConfigurationError
from llm_trainer.models import TransformerLM

with warnings.catch_warnings():
    # It imports torchao, in whose source Python finds an invalid escape when it first compiles it.
    warnings.filterwarnings("ignore", "invalid escape sequence")
    from transformers import (
        AutoModelForCausalLM,
        AutoTokenizer,
        GPT2Config,
        GPT2LMHeadModel,
        LlamaConfig,
        LlamaForCausalLM,
    )

LLAMA = {"norm": "rmsnorm", "positions": "rope", "activation": "swiglu", "bias": False}
GPT2 = {"positions": "learned"}
EXPORTED = {
    "llama": LLAMA,
    "llama, grouped, untied": LLAMA | {"n_kv_heads": 2, "tie_embeddings": False, "rope_theta": 5e5},
    "llama, one key, odd sizes": LLAMA
    | {"n_kv_heads": 1, "n_heads": 3, "d_model": 42, "d_ff": 51, "vocab_size": 67},
    "llama, biases": LLAMA | {"bias": True, "n_layers": 1, "norm_eps": 1e-3, "attention_dropout": 0.2},
    "gpt2": GPT2 | {"dropout": 0.1, "attention_dropout": 0.3},
    "gpt2, untied": GPT2 | {"tie_embeddings": False, "norm_eps": 1e-3},
    "gpt2, odd sizes": GPT2 | {"n_heads": 7, "d_model": 49, "d_ff": 53, "vocab_size": 67, "n_layers": 3},
}
LLAMA_FILE = {
    "model_type": "llama",
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 24,
}
GPT2_FILE = {
    "model_type": "gpt2",
    "vocab_size": 61,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 24,
}


def assert_same_weights(one, other):
    ours, theirs = one.state_dict(), other.state_dict()
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert torch.equal(ours[name], theirs[name]), name


def assert_same_logits(model, peer, ids):
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, peer(input_ids=ids).logits, atol=1e-5, rtol=1e-5)


def shaken(peer):
    """Moves a peer's biases and norms away from zero and one, so that a forgotten one shows."""
    with torch.no_grad():
        for parameter in peer.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return peer.eval()


def llama(**changes):
    fields = {name: value for name, value in LLAMA_FILE.items() if name != "model_type"}
    return shaken(LlamaForCausalLM(LlamaConfig(**fields | changes)))


def gpt2(**changes):
    fields = {name: value for name, value in GPT2_FILE.items() if name != "model_type"}
    return shaken(GPT2LMHeadModel(GPT2Config(**fields | {"bos_token_id": 0, "eos_token_id": 0} | changes)))


@pytest.mark.parametrize("size", ["5GB", 4000], ids=["one file", "shards"])
@pytest.mark.parametrize("changes", EXPORTED.values(), ids=EXPORTED)
def test_transformers_loads_an_export_and_we_read_both_back(build, ids, tmp_path, changes, size):
    model = build(**changes)
    model.export_hf(tmp_path / "export", max_shard_size=size)
    assert (tmp_path / "export" / "model.safetensors").exists() is (size == "5GB")
    peer = AutoModelForCausalLM.from_pretrained(tmp_path / "export")
    assert type(peer) is (LlamaForCausalLM if "rope" in changes.values() else GPT2LMHeadModel)
    assert peer.dtype == torch.float32
    assert_same_logits(model, peer, ids)
    peer.save_pretrained(tmp_path / "theirs", max_shard_size=size)
    for folder in ("export", "theirs"):
        read = TransformerLM.from_hf(tmp_path / folder)
        assert_same_weights(read, model)
        assert read.config == model.config
        assert not read.training
        assert (read.head.weight is read.embedding.weight) is model.config.tie_embeddings


@pytest.mark.parametrize(
    "peer",
    [
        lambda: llama(),
        lambda: llama(
            tie_word_embeddings=True,
            num_key_value_heads=1,
            rope_theta=777.0,
        ),
        lambda: llama(attention_bias=True, mlp_bias=True, rms_norm_eps=1e-3),
        lambda: gpt2(),
        lambda: gpt2(n_inner=50, tie_word_embeddings=False, layer_norm_epsilon=1e-3),
    ],
)
@pytest.mark.parametrize("size", ["5GB", "10KB"])
def test_models_of_transformers_are_read(peer, ids, tmp_path, size):
    peer = peer()
    peer.save_pretrained(tmp_path, max_shard_size=size)
    model = TransformerLM.from_hf(tmp_path)
    assert_same_logits(model, peer, ids)
    assert model.get_num_params() == peer.num_parameters()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_types(build, tmp_path, dtype):
    model = build(**LLAMA).to(dtype)
    model.export_hf(tmp_path)
    assert AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto").dtype == dtype
    assert_same_weights(TransformerLM.from_hf(tmp_path, dtype=None), model)
    assert_same_weights(TransformerLM.from_hf(tmp_path), model.float())


def test_the_tokenizer_comes_along(build, tokenizer, tmp_path):
    model = build(**LLAMA, vocab_size=tokenizer.vocab_size)
    model.export_hf(tmp_path, tokenizer)
    text = "def function_1(value): größe 🎉"
    peer = AutoModelForCausalLM.from_pretrained(tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    assert theirs(text)["input_ids"] == tokenizer.encode(text)
    for config in (peer.config, peer.generation_config, theirs):
        assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (
            tokenizer.bos_token_id,
            tokenizer.eos_token_id,
            tokenizer.pad_token_id,
        )
    prompt = torch.tensor([tokenizer.encode("def f")])
    assert torch.equal(
        peer.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=8, do_sample=False),
        model.generate(prompt, max_new_tokens=8, eos_token_id=tokenizer.eos_token_id, temperature=0),
    )


def test_without_a_tokenizer_no_token_is_special(build, tmp_path):
    build(**LLAMA).export_hf(tmp_path)
    peer = AutoModelForCausalLM.from_pretrained(tmp_path)
    # The defaults of Llama's configuration are 1 and 2, which would end texts at an ordinary token.
    assert (peer.config.bos_token_id, peer.config.eos_token_id, peer.generation_config.eos_token_id) == (
        None,
        None,
        None,
    )


def test_the_file_spells_for_transformers_4_and_5(build, tmp_path):
    build(**LLAMA, rope_theta=123.0).export_hf(tmp_path)
    content = json.loads((tmp_path / "config.json").read_text())
    assert content["rope_theta"] == content["rope_parameters"]["rope_theta"] == 123.0
    assert content["torch_dtype"] == content["dtype"] == "float32"


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({}, ["positions='rope' (it is 'sinusoidal')", "positions='learned'", "norm='rmsnorm'"]),
        (LLAMA | {"qk_norm": True}, ["Llama needs qk_norm=False (it is True);"]),
        (LLAMA | {"logit_softcap": 9.0}, ["Llama needs logit_softcap=None (it is 9.0);"]),
        (LLAMA | {"pre_norm": False}, ["Llama needs pre_norm=True (it is False);"]),
        (LLAMA | {"activation": "silu"}, ["Llama needs activation='swiglu' (it is 'silu');"]),
        (GPT2 | {"bias": False}, ["GPT-2 needs bias=True (it is False)."]),
        (GPT2 | {"n_kv_heads": 2}, ["GPT-2 needs n_kv_heads=None (it is 2)."]),
        (GPT2 | {"activation": "relu"}, ["GPT-2 needs activation='gelu' (it is 'relu')."]),
    ],
)
def test_what_cannot_be_exported_says_why(build, tmp_path, changes, named):
    with pytest.raises(ModelConfigurationError, match='presets "llama-small" or "gpt2-small"') as caught:
        build(**changes).export_hf(tmp_path / "new")
    for text in named:
        assert text in str(caught.value)
    assert not (tmp_path / "new").exists()


def test_the_presets_that_are_named_can_be_exported(tmp_path):
    for name in ("llama-mini", "gpt2-mini"):
        config = ModelConfig.preset(name, n_layers=1, vocab_size=50, d_model=24, d_ff=30)
        TransformerLM(config).export_hf(tmp_path / name)
        assert TransformerLM.from_hf(tmp_path / name).config == config


def test_neither_kind_of_model_replaces_the_other(build, tokenizer, tmp_path):
    model = build(**LLAMA)
    model.save_pretrained(tmp_path)
    with pytest.raises(FileExistsError, match=r"holds a 'llm_trainer' model.*choose another folder"):
        model.export_hf(tmp_path)
    model.export_hf(tmp_path / "export")
    with pytest.raises(FileExistsError, match=r"holds a 'llama' model.*choose another folder"):
        model.save_pretrained(tmp_path / "export")
    assert_same_weights(TransformerLM.from_hf(tmp_path / "export"), model)
    # What is there is no model: it is replaced.
    (tmp_path / "export" / "config.json").write_text("{")
    model.export_hf(tmp_path / "export")
    assert_same_weights(TransformerLM.from_hf(tmp_path / "export"), model)
    assert_same_weights(TransformerLM.from_pretrained(tmp_path), model)
    with pytest.raises(
        ModelConfigurationError, match=r"tokenizer has 3.. tokens, but the model's vocab_size is 61"
    ):
        model.export_hf(tmp_path / "new", tokenizer)
    with pytest.raises(ConfigurationError, match="max_shard_size"):
        model.export_hf(tmp_path / "new", max_shard_size="much")
    assert not (tmp_path / "new").exists()


def test_an_interrupted_export_is_not_a_model(build, tmp_path, monkeypatch):
    class KilledError(BaseException):
        pass

    def die(*args, **kwargs):
        raise KilledError

    old, new = build(**LLAMA), build(**GPT2)
    old.export_hf(tmp_path, max_shard_size="10KB")
    monkeypatch.setattr("llm_trainer._tensor_files.save_file", die)
    with pytest.raises(KilledError):
        new.export_hf(tmp_path)
    assert_same_weights(TransformerLM.from_hf(tmp_path), old)
    monkeypatch.undo()
    monkeypatch.setattr("llm_trainer.models._hf_files.write_json", die)
    with pytest.raises(KilledError):
        new.export_hf(tmp_path)
    monkeypatch.undo()
    with pytest.raises(FormatError, match=r"config.json does not exist"):
        TransformerLM.from_hf(tmp_path)
    with pytest.raises((OSError, ValueError), match=r"config\.json"):
        AutoModelForCausalLM.from_pretrained(tmp_path)
    new.export_hf(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
    ]
    assert_same_weights(TransformerLM.from_hf(tmp_path), new)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """One folder for each architecture, as transformers saves it."""
    made = {}
    for name, peer in (("llama", llama()), ("gpt2", gpt2())):
        made[name] = tmp_path_factory.mktemp(name)
        peer.save_pretrained(made[name], max_shard_size="20KB")
    return made


@pytest.mark.parametrize(
    ("architecture", "changes", "message"),
    [
        ("llama", {"model_type": "qwen2"}, "model_type is 'qwen2'; from_hf reads 'llama' and 'gpt2'"),
        ("llama", {"model_type": None}, "model_type is None"),
        ("llama", {"rope_scaling": {"type": "linear", "factor": 2.0}}, "type is 'linear'"),
        ("llama", {"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4}}, "rope_type is 'llama3'"),
        (
            "llama",
            {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}},
            "partial_rotary_factor is 0.5",
        ),
        (
            "llama",
            {"rope_parameters": {"rope_theta": 1e4, "attention_factor": 2.0}},
            "'attention_factor' is 2.0",
        ),
        (
            "llama",
            {"rope_theta": 5.0, "rope_parameters": {"rope_theta": 1e4}},
            "rope_theta is 5.0, but rope_parameters says 10000.0",
        ),
        ("llama", {"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ("llama", {"attention_bias": True}, "attention_bias is True, but mlp_bias is not"),
        ("llama", {"head_dim": 16}, "head_dim is 16"),
        ("llama", {"pretraining_tp": 2}, "pretraining_tp is 2"),
        ("llama", {"sliding_window": 512}, "'sliding_window' is 512"),
        ("llama", {"quantization_config": {"bits": 4}}, "'quantization_config' is {'bits': 4}"),
        ("llama", {"auto_map": {"AutoConfig": "x.X"}}, "'auto_map' is"),
        ("gpt2", {"activation_function": "gelu"}, "activation_function is 'gelu'"),
        ("gpt2", {"scale_attn_weights": False}, "scale_attn_weights is False"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx is True"),
        ("gpt2", {"reorder_and_upcast_attn": True}, "reorder_and_upcast_attn is True"),
        ("gpt2", {"add_cross_attention": True}, "add_cross_attention is True"),
        ("gpt2", {"embd_pdrop": 0.7}, "embd_pdrop is 0.7, but resid_pdrop is 0.1"),
        ("gpt2", {"n_ctx": 12}, "n_ctx is 12"),
    ],
)
def test_what_cannot_be_read_is_named(folders, tmp_path, architecture, changes, message):
    folder = tmp_path / "model"
    shutil.copytree(folders[architecture], folder)
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(ModelConfigurationError) as caught:
        TransformerLM.from_hf(folder)
    assert message in str(caught.value)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("architecture", "content"),
    [
        (
            "llama",
            LLAMA_FILE
            | {"rope_scaling": None, "rope_interleaved": False, "torch_dtype": "bfloat16", "use_cache": True},
        ),
        (
            "llama",
            LLAMA_FILE
            | {"rope_theta": 10000, "_name_or_path": "x", "num_key_value_heads": 4, "pretraining_tp": 1},
        ),
        ("gpt2", GPT2_FILE | {"n_ctx": 24, "task_specific_params": {"text-generation": {"do_sample": True}}}),
    ],
)
def test_configurations_as_older_releases_wrote_them(folders, ids, tmp_path, architecture, content):
    shutil.copytree(folders[architecture], tmp_path / "model")
    (tmp_path / "model" / "config.json").write_text(json.dumps(content))
    peer = AutoModelForCausalLM.from_pretrained(folders[architecture])
    assert_same_logits(TransformerLM.from_hf(tmp_path / "model"), peer, ids)


def test_names_as_older_releases_wrote_them(tmp_path, ids):
    """GPT-2's published file has no prefix, and the causal masks; older Llamas have their frequencies."""
    from safetensors.torch import load_file, save_file

    peers = {"gpt2": gpt2(), "llama": llama()}
    for name, peer in peers.items():
        folder = tmp_path / name
        peer.save_pretrained(folder)
        tensors = load_file(folder / "model.safetensors")
        if name == "gpt2":
            tensors = {key.removeprefix("transformer."): value for key, value in tensors.items()}
            tensors |= {f"h.{layer}.attn.bias": torch.ones(1, 1, 24, 24) for layer in range(2)}
            tensors["lm_head.weight"] = tensors["wte.weight"].clone()
        else:
            tensors |= {
                f"model.layers.{layer}.self_attn.rotary_emb.inv_freq": torch.ones(4) for layer in range(2)
            }
        save_file(tensors, folder / "model.safetensors")
        assert_same_logits(TransformerLM.from_hf(folder), peer, ids)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + 1
    save_file(tensors, tmp_path / "llama" / "model.safetensors")
    path = tmp_path / "llama" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"tie_word_embeddings": True}))
    with pytest.raises(FormatError, match=r"lm_head.weight is not the embedding, but config.json says"):
        TransformerLM.from_hf(tmp_path / "llama")


def test_files_that_are_missing_or_pickled(folders, build, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(folders["llama"], folder)
    shard = sorted(folder.glob("model-*"))[1]
    shard.unlink()
    with pytest.raises(FormatError, match=f"{shard.name} does not exist"):
        TransformerLM.from_hf(folder)
    for path in folder.glob("model*"):
        path.unlink()
    with pytest.raises(FormatError, match=r"model.safetensors does not exist"):
        TransformerLM.from_hf(folder)
    (folder / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(FormatError, match=r"pytorch_model.bin is pickled.*Load it with transformers"):
        TransformerLM.from_hf(folder)
    with pytest.raises(FormatError, match=r"config.json does not exist"):
        TransformerLM.from_hf(tmp_path / "nothing")
    build().save_pretrained(tmp_path / "ours")
    with pytest.raises(FormatError, match="read it with from_pretrained"):
        TransformerLM.from_hf(tmp_path / "ours")
    with pytest.raises(FormatError, match=r"from_hf reads those of Llama"):
        TransformerLM.from_pretrained(folders["llama"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": None}, "has no field 'hidden_size'"),
        ({"hidden_size": "wide"}, "d_model is 'wide'"),
        ({"hidden_size": 10**30}, "d_model is 1000"),
        ({"num_hidden_layers": 10**9}, "too few for the 1000000000 layers"),
        ({"num_hidden_layers": 3}, "lacks tensor 'model.layers.2"),
        ({"num_hidden_layers": 1}, "unexpected tensor 'model.layers.1"),
        ({"intermediate_size": 50}, r"shape \(32, 48\).*calls for floating point of shape \(32, 50\)"),
        (
            {"intermediate_size": 2**31 - 1, "hidden_size": 2**31 - 8, "head_dim": None},
            "asks for an impossible size",
        ),
        ({"num_key_value_heads": 3}, "n_heads .4. must be a multiple"),
        ({"rope_parameters": [1]}, "rope_parameters is"),
        ({"rope_theta": None, "rope_parameters": {"rope_theta": "big"}}, "rope_theta is nan"),
        ({"rms_norm_eps": float("nan")}, "norm_eps is nan"),
        ({"tie_word_embeddings": "yes"}, "tie_embeddings is 'yes'"),
        ({"tie_word_embeddings": True}, "lm_head.weight is not the embedding"),
    ],
)
def test_a_hostile_configuration_is_a_clear_error(folders, tmp_path, changes, message):
    folder = tmp_path / "model"
    shutil.copytree(folders["llama"], folder)
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(FormatError, match=message):
        TransformerLM.from_hf(folder)


values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(-(10**400), 10**400)
    | st.floats()
    | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=5), inner, max_size=2),
    max_leaves=3,
)


@given(st.data())
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_value_of_any_field_loads_or_is_refused(folders, tmp_path, data):
    architecture = data.draw(st.sampled_from(sorted(folders)))
    content = json.loads((folders[architecture] / "config.json").read_text())
    content[data.draw(st.sampled_from([*sorted(content), "sliding_window"]))] = data.draw(values)
    if not (tmp_path / architecture).exists():
        shutil.copytree(folders[architecture], tmp_path / architecture)
    (tmp_path / architecture / "config.json").write_text(json.dumps(content))
    try:
        model = TransformerLM.from_hf(tmp_path / architecture)
    except (FormatError, ModelConfigurationError):
        return
    assert model.get_num_params() > 0
