import dataclasses
import errno
import json
import math
import os
import resource
import shutil
import stat
import warnings

import pytest
import torch
import torch.nn.functional as F
from llm_trainer.config import TrainingConfig
from llm_trainer.exceptions import FormatError, ModelConfigurationError, ModelInputError
from llm_trainer.models import TransformerLM
from llm_trainer.models._fast_ops import squared_relu, unit_rms
from llm_trainer.models._loss import linear_cross_entropy
from safetensors.torch import load_file, save_file

with warnings.catch_warnings():
    # It imports torchao, in whose source Python finds an invalid escape when it first compiles it.
    warnings.filterwarnings("ignore", "invalid escape sequence")
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM


def test_equals_llama_of_transformers(ids, build):
    model = build(
        norm="rmsnorm", positions="rope", activation="swiglu", bias=False, tie_embeddings=False, n_kv_heads=2
    )
    peer = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=61,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=24,
            rms_norm_eps=1e-5,
            tie_word_embeddings=False,
        )
    ).eval()
    peer.load_state_dict(
        {
            "model.embed_tokens.weight": model.embedding.weight,
            "model.norm.weight": model.final_norm.weight,
            "lm_head.weight": model.head.weight,
        },
        strict=False,
    )
    for ours, theirs in zip(model.blocks, peer.model.layers, strict=True):
        q, k, v = ours.attention.qkv.weight.split([32, 16, 16])
        gate, up = ours.feed_forward.up.weight.chunk(2)
        copies = {
            "self_attn.q_proj": q,
            "self_attn.k_proj": k,
            "self_attn.v_proj": v,
            "self_attn.o_proj": ours.attention.out.weight,
            "mlp.gate_proj": gate,
            "mlp.up_proj": up,
            "mlp.down_proj": ours.feed_forward.down.weight,
            "input_layernorm": ours.attention_norm.weight,
            "post_attention_layernorm": ours.feed_forward_norm.weight,
        }
        theirs.load_state_dict({f"{name}.weight": value for name, value in copies.items()})
    with torch.no_grad():
        expected = peer(input_ids=ids, labels=ids)
        found = model(ids, labels=ids)
    torch.testing.assert_close(found.logits, expected.logits, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found.loss, expected.loss, atol=1e-5, rtol=1e-5)


def test_equals_gpt2_of_transformers(ids, build):
    model = build(positions="learned")
    peer = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=61,
            n_positions=24,
            n_embd=32,
            n_layer=2,
            n_head=4,
            n_inner=48,
            tie_word_embeddings=True,
        )
    ).eval()
    peer.transformer.wte.weight.data = model.embedding.weight.data
    peer.tie_weights()
    peer.transformer.wpe.weight.data = model.position_embedding.weight.data
    peer.transformer.ln_f.load_state_dict(model.final_norm.state_dict())
    for ours, theirs in zip(model.blocks, peer.transformer.h, strict=True):
        theirs.ln_1.load_state_dict(ours.attention_norm.state_dict())
        theirs.ln_2.load_state_dict(ours.feed_forward_norm.state_dict())
        for linear, conv in (
            (ours.attention.qkv, theirs.attn.c_attn),
            (ours.attention.out, theirs.attn.c_proj),
            (ours.feed_forward.up, theirs.mlp.c_fc),
            (ours.feed_forward.down, theirs.mlp.c_proj),
        ):
            conv.load_state_dict({"weight": linear.weight.T.contiguous(), "bias": linear.bias})
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, peer(input_ids=ids).logits, atol=1e-5, rtol=1e-5)


def test_the_loss_is_the_mean_over_labelled_next_tokens(model, ids):
    labels = ids.clone()
    labels[0, :9] = -100
    labels[2] = -100
    with torch.no_grad():
        output = model(ids, labels=labels)
    log_probabilities = output.logits.double().log_softmax(-1)
    picked = [
        -log_probabilities[row, t - 1, labels[row, t]].item()
        for row in range(3)
        for t in range(1, 17)
        if labels[row, t] != -100
    ]
    assert len(picked) == 8 + 16
    assert output.loss.item() == pytest.approx(sum(picked) / len(picked), abs=1e-5)
    assert model(ids, labels=torch.full_like(ids, -100)).loss.item() == 0


@pytest.mark.parametrize("cap", [None, 3.0])
@pytest.mark.parametrize("rows_in_chunk", [1, 5, 1000])
def test_chunked_loss_and_gradients_equal_torch(cap, rows_in_chunk, monkeypatch):
    monkeypatch.setattr("llm_trainer.models._loss._CHUNK_LOGITS", rows_in_chunk * 19)
    x = torch.randn(13, 8, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(19, 8, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(0, 19, (13,))
    targets[4] = -100
    logits = x @ weight.T
    expected = F.cross_entropy(logits if cap is None else cap * torch.tanh(logits / cap), targets)
    found = linear_cross_entropy(x, weight, targets, cap)
    for ours, theirs in zip(
        (found, *torch.autograd.grad(found * 3, (x, weight))),
        (expected, *torch.autograd.grad(expected * 3, (x, weight))),
        strict=True,
    ):
        # The softmax is in float32 whatever the input.
        torch.testing.assert_close(ours.double(), theirs, atol=2e-6, rtol=2e-6)


def test_no_gradients_are_computed_where_none_are_wanted(build, ids, monkeypatch):
    model = build()
    with torch.no_grad():
        expected = F.cross_entropy(model(ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    made = []
    original = torch.zeros_like
    monkeypatch.setattr(torch, "zeros_like", lambda *a, **k: made.append(a[0].shape) or original(*a, **k))
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            torch.testing.assert_close(model(ids, labels=ids).loss, expected)
    assert made == []
    model(ids, labels=ids)
    assert made == [model.head.weight.shape]


def test_a_second_derivative_of_the_loss_is_refused():
    x = torch.randn(5, 4, requires_grad=True)
    loss = linear_cross_entropy(x, torch.randn(9, 4), torch.arange(5)) ** 2
    (gradient,) = torch.autograd.grad(loss, x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.square().sum().backward()


def test_float64_models_are_computed_in_float64(model, ids):
    single = model(ids).logits
    double = model.double()
    torch.testing.assert_close(double(ids).logits, single, atol=1e-4, rtol=1e-4)
    double(ids, labels=ids).loss.backward()
    assert {parameter.grad.dtype for parameter in double.parameters()} == {torch.float64}
    x = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: unit_rms(x, 1e-5), (x,))


def test_a_hole_in_the_mask_is_as_if_it_were_not_there(model, ids):
    mask = torch.ones_like(ids)
    mask[:, 4] = mask[:, 9:11] = 0
    kept = mask[0].nonzero().flatten()
    with torch.no_grad():
        found = model(ids, mask).logits[:, kept]
        torch.testing.assert_close(found, model(ids[:, kept]).logits, atol=1e-5, rtol=1e-5)
    # The same where two documents take turns.
    turns = torch.arange(17) % 2 + 1
    with torch.no_grad():
        found = model(ids, turns.expand(3, -1)).logits[:, ::2]
        torch.testing.assert_close(found, model(ids[:, ::2]).logits, atol=1e-5, rtol=1e-5)


def test_the_loss_keeps_float32_under_autocast():
    x, weight, targets = torch.randn(64, 16), torch.randn(50, 16), torch.randint(0, 50, (64,))
    with torch.autocast("cpu", torch.bfloat16):
        found = linear_cross_entropy(x, weight, targets)
    expected = F.cross_entropy((x.bfloat16() @ weight.bfloat16().T).float(), targets)
    assert found.dtype == torch.float32
    assert found.item() == pytest.approx(expected.item(), abs=1e-6)


def test_written_out_gradients():
    x = torch.randn(5, 7, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(squared_relu(x), F.relu(x).square())
    assert torch.autograd.gradcheck(squared_relu, (x,))
    y = torch.randn(5, 7, requires_grad=True)
    g = torch.randn(5, 7)
    ours = torch.autograd.grad(unit_rms(y, 1e-5), y, g)[0]
    theirs = torch.autograd.grad(F.rms_norm(y, (7,), eps=1e-5), y, g)[0]
    torch.testing.assert_close(unit_rms(y, 1e-5), F.rms_norm(y, (7,), eps=1e-5), atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-6)


def test_later_tokens_do_not_reach_earlier_ones(model, ids, tiny):
    changed = ids.clone()
    changed[:, 10:] = (changed[:, 10:] + 1) % tiny.vocab_size
    with torch.no_grad():
        before, after = model(ids).logits, model(changed).logits
    assert torch.equal(before[:, :10], after[:, :10])
    assert not torch.allclose(before[:, 10:], after[:, 10:])


def test_packed_documents_do_not_see_one_another(model, ids, tiny):
    segments = torch.tensor([[1] * 6 + [2] * 8 + [0] * 3] * 3)
    changed = ids.clone()
    changed[:, :6] = (changed[:, :6] + 1) % tiny.vocab_size
    with torch.no_grad():
        before, after = model(ids, segments).logits, model(changed, segments).logits
        alone = model(ids[:, 6:14]).logits
    assert torch.equal(before[:, 6:14], after[:, 6:14])
    assert not torch.allclose(before[:, :6], after[:, :6])
    # Rotations of different absolute positions round differently, so equal only to rounding.
    torch.testing.assert_close(before[:, 6:14], alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(model, ids, side):
    pad = (5, 0) if side == "left" else (0, 5)
    mask = F.pad(torch.ones_like(ids), pad)
    kept = slice(5, None) if side == "left" else slice(0, 17)
    with torch.no_grad():
        padded = model(F.pad(ids, pad, value=1), mask).logits
        torch.testing.assert_close(padded[:, kept], model(ids).logits, atol=1e-5, rtol=1e-5)
    assert padded.isfinite().all()


def test_checkpointing_gives_the_same_gradients(ids, tiny):
    gradients = []
    for checkpointing in (False, True):
        torch.manual_seed(1)
        model = TransformerLM(
            dataclasses.replace(tiny, dropout=0.3, gradient_checkpointing=checkpointing)
        ).train()
        torch.manual_seed(2)
        model(ids, labels=ids).loss.backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, recomputed, atol=0, rtol=0)


def test_dropout_only_in_training(ids, tiny):
    model = TransformerLM(dataclasses.replace(tiny, dropout=0.5)).eval()
    assert torch.equal(model(ids).logits, model(ids).logits)
    model.train()
    assert not torch.equal(model(ids).logits, model(ids).logits)
    model = TransformerLM(dataclasses.replace(tiny, attention_dropout=0.5)).train()
    assert not torch.equal(model(ids).logits, model(ids).logits)


def test_initial_state(tiny):
    config = dataclasses.replace(tiny, d_model=256, vocab_size=4096, zero_init_projections=True)
    model = TransformerLM(config)
    ids = torch.randint(0, 4096, (4, 24))
    # An untrained model is nearly uniform; and with zero projections it is its embedding, block by block.
    assert model(ids, labels=ids).loss.item() == pytest.approx(math.log(4096), abs=0.3)
    x = torch.randn(1, 5, 256)
    assert torch.equal(model.blocks[0](x), x)
    # The spread of sublayer outputs is of order one for inputs of order one.
    plain = TransformerLM(dataclasses.replace(config, zero_init_projections=False))
    assert plain.blocks[0].attention.qkv(x).std().item() == pytest.approx(1, abs=0.2)


def test_sizes_match_the_formula(tiny):
    c = tiny
    block = c.d_model * 3 * c.d_model + 3 * c.d_model + c.d_model * c.d_model + c.d_model
    block += 2 * c.d_model * c.d_ff + c.d_ff + c.d_model + 4 * c.d_model
    expected = c.vocab_size * c.d_model + c.n_layers * block + 2 * c.d_model
    model = TransformerLM(c)
    assert model.get_num_params() == expected
    assert model.get_model_size_mb() == expected * 4 / 2**20
    untied = TransformerLM(dataclasses.replace(c, tie_embeddings=False, positions="learned"))
    assert untied.get_num_params() == expected + c.vocab_size * c.d_model + c.max_seq_len * c.d_model


def test_output_reads_like_an_object_a_mapping_and_a_tuple(ids, build):
    output = build()(ids, labels=ids)
    loss, logits = output
    assert loss is output.loss is output["loss"] is output[0]
    assert logits is output.logits is output["logits"] is output[1]
    with pytest.raises(KeyError, match="'loss' and 'logits'"):
        output["hidden"]
    assert build()(ids, labels=ids, return_logits=False).logits is None


def test_wrong_inputs(ids, build):
    model = build()
    cache = model.new_cache(3, 24)
    for arguments, message in (
        ({"input_ids": torch.zeros(1, 25, dtype=torch.long)}, r"25 tokens, more than max_seq_len \(24\)"),
        ({"input_ids": ids[0]}, r"\(batch, tokens\)"),
        ({"input_ids": ids.float()}, "must be int64 or int32, not torch.float32"),
        ({"input_ids": ids + 61}, r"ids from 6\d to 1\d\d, the model has a vocabulary of 61"),
        ({"input_ids": ids - 61}, r"ids from -6\d to -\d+, the model"),
        ({"labels": ids[:, 1:]}, "labels have shape"),
        ({"attention_mask": ids[:, 1:]}, "attention_mask has shape"),
        ({"labels": ids, "cache": cache}, "labels and cache cannot be used together"),
        ({"attention_mask": ids, "cache": cache}, "attention_mask and cache cannot be used together"),
    ):
        with pytest.raises(ModelInputError, match=message) as caught:
            model(**{"input_ids": ids, **arguments})
        assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize("wrong", [{"vocab_size": 61}, TrainingConfig(), None])
def test_what_is_no_configuration_is_refused(wrong):
    with pytest.raises(ModelConfigurationError, match="config must be a ModelConfig, but is of type"):
        TransformerLM(wrong)


def test_a_configuration_that_was_made_impossible_is_refused(tiny):
    config = dataclasses.replace(tiny)
    config.n_heads = 5
    with pytest.raises(ModelConfigurationError):
        TransformerLM(config)


def test_a_saved_model_loads_equal(model, ids, tmp_path):
    model.save_pretrained(tmp_path / "run" / "model")
    loaded = TransformerLM.from_pretrained(tmp_path / "run" / "model")
    assert loaded.config == model.config
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    assert not loaded.training
    names = set(load_file(tmp_path / "run" / "model" / "model.safetensors"))
    assert ("head.weight" in names) is not model.config.tie_embeddings
    assert (loaded.head.weight is loaded.embedding.weight) is model.config.tie_embeddings
    assert sorted(path.name for path in (tmp_path / "run" / "model").iterdir()) == [
        "config.json",
        "model.safetensors",
    ]


def test_a_failed_save_leaves_the_old_model(tmp_path, ids, monkeypatch, build):
    model = build()
    model.save_pretrained(tmp_path)
    expected = model(ids).logits

    def full_disk(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("llm_trainer._tensor_files.save_file", full_disk)
    with pytest.raises(OSError, match="No space"):
        build().save_pretrained(tmp_path)
    assert torch.equal(TransformerLM.from_pretrained(tmp_path)(ids).logits, expected)
    assert len(list(tmp_path.iterdir())) == 2


def test_damaged_models_are_refused(tmp_path, build):
    build().save_pretrained(tmp_path)
    config_path, weights_path = tmp_path / "config.json", tmp_path / "model.safetensors"
    config, weights = config_path.read_text(), weights_path.read_bytes()

    def load_with(change):
        content = json.loads(config)
        change(content)
        config_path.write_text(json.dumps(content))
        # Without the hash of the configuration, which would tell that it was changed.
        save_file(load_file(weights_path), weights_path)
        return TransformerLM.from_pretrained(tmp_path)

    with pytest.raises(FormatError, match=r"version 2.*up to 1; upgrade"):
        load_with(lambda content: content.update(format_version=2))
    with pytest.raises(FormatError, match="'gpt2' model"):
        load_with(lambda content: content.update(model_type="gpt2"))
    with pytest.raises(FormatError, match="d_model"):
        load_with(lambda content: content["model"].update(d_model=33))
    with pytest.raises(FormatError, match=r"lacks tensor 'blocks.2"):
        load_with(lambda content: content["model"].update(n_layers=3))
    with pytest.raises(FormatError, match=r"27 tensors, too few for the 1000000000 layers"):
        load_with(lambda content: content["model"].update(n_layers=10**9))
    for positions in ("sinusoidal", "rope"):
        # Positions are in no tensor, so a length that none could be as long as must take no memory.
        long = load_with(
            lambda content, positions=positions: content["model"].update(
                max_seq_len=2**31 - 1, positions=positions
            )
        )
        assert long.config.max_seq_len == 2**31 - 1
    with pytest.raises(FormatError, match=r"shape \(48, 32\).*calls for floating point of shape \(50, 32\)"):
        load_with(lambda content: content["model"].update(d_ff=50, bias=True))
    config_path.write_text(config)
    weights_path.write_bytes(weights[:-10])
    with pytest.raises(FormatError, match="is damaged"):
        TransformerLM.from_pretrained(tmp_path)
    tensors = {"extra": torch.zeros(1)}
    weights_path.write_bytes(weights)
    save_file(load_file(weights_path) | tensors, weights_path)
    with pytest.raises(FormatError, match="unexpected tensor 'extra'"):
        TransformerLM.from_pretrained(tmp_path)
    weights_path.unlink()
    with pytest.raises(FormatError, match="does not exist"):
        TransformerLM.from_pretrained(tmp_path)


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600)])
def test_saved_files_have_the_permissions_of_new_ones(tmp_path, build, umask, mode):
    before = os.umask(umask)
    try:
        build().save_pretrained(tmp_path)
    finally:
        os.umask(before)
    assert {path.name: stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()} == {
        "config.json": mode,
        "model.safetensors": mode,
    }


def test_files_of_two_saves_do_not_load(tmp_path, build, monkeypatch):
    class KilledError(BaseException):
        pass

    def die(*args, **kwargs):
        raise KilledError

    old, new = build(n_heads=4), build(n_heads=2, norm_eps=1e-3)
    old.save_pretrained(tmp_path / "cut")
    monkeypatch.setattr("llm_trainer.models._model_files.write_json", die)
    with pytest.raises(KilledError):
        new.save_pretrained(tmp_path / "cut")
    monkeypatch.undo()
    with pytest.raises(FormatError, match=r"cut short.*Take both files from one save"):
        TransformerLM.from_pretrained(tmp_path / "cut")
    new.save_pretrained(tmp_path / "cut")
    assert TransformerLM.from_pretrained(tmp_path / "cut").config == new.config
    old.save_pretrained(tmp_path / "old")
    shutil.copy(tmp_path / "old" / "config.json", tmp_path / "cut")
    with pytest.raises(FormatError, match="mixed"):
        TransformerLM.from_pretrained(tmp_path / "cut")


@pytest.mark.parametrize(("free", "number"), [(10, errno.ENOSPC), (1 << 40, errno.EIO)])
def test_weights_that_cannot_be_written_are_an_os_error(tmp_path, build, monkeypatch, free, number):
    usage = shutil.disk_usage(tmp_path)._replace(free=free)
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage)
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limit[1]))
    try:
        with pytest.raises(OSError, match="cannot be written") as caught:
            build().save_pretrained(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert caught.value.errno == number
    assert caught.value.filename == str(tmp_path / "model.safetensors")
    assert list(tmp_path.iterdir()) == []
