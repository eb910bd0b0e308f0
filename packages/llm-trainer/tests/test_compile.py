import dataclasses

import pytest
import torch
from llm_trainer.exceptions import TrainingError
from llm_trainer.models import TransformerLM
from llm_trainer.models._compile import compile_blocks_
from torch._dynamo.utils import counters

pytestmark = [
    # torch's own access, when it traces a function that defines its own gradient.
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"),
    # The same in torch 2.9, and the compiler's imports and its view of Python 3.13.0 in torch 2.11.
    pytest.mark.filterwarnings("ignore:.*autograd.function.Function.* should not be instantiated"),
    pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:Guards may run slower on Python 3.13.0:RuntimeWarning"),
]


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def losses_and_gradients(model, batches, seed=3):
    torch.manual_seed(seed)
    losses = []
    for ids, mask in batches:
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(ids, mask, ids, return_logits=False).loss
        loss.backward()
        losses.append(loss.item())
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    return losses, gradients


def batches(tiny):
    def draw(rows, tokens):
        return torch.randint(0, tiny.vocab_size, (rows, tokens))

    packed = torch.tensor([[1] * 5 + [2] * 12, [1] * 17, [1] * 9 + [0] * 8])
    return [(draw(3, 17), None), (draw(2, 24), None), (draw(3, 17), packed), (draw(1, 11), None)]


def test_compiled_blocks_compute_what_the_others_do_at_any_shape(build, tiny):
    model = build(
        norm="rmsnorm", positions="rope", activation="swiglu", n_kv_heads=2, gradient_checkpointing=True
    ).train()
    work = batches(tiny)
    names = list(model.state_dict())
    expected_losses, expected = losses_and_gradients(model, work)
    compile_blocks_(model)
    found_losses, found = losses_and_gradients(model, work)
    assert found_losses == pytest.approx(expected_losses, rel=5e-3)
    for name, gradient in found.items():
        error = (gradient - expected[name]).norm() / expected[name].norm()
        assert error < 0.03, name
    assert list(model.state_dict()) == names

    counters.clear()
    losses_and_gradients(model, [(torch.randint(0, 61, (rows, rows * 3)), None) for rows in range(2, 8)])
    assert counters["stats"]["unique_graphs"] == 0

    prompt = model.generate(work[0][0][:, :5], 12)
    plain = TransformerLM(model.config).eval()
    plain.load_state_dict(model.state_dict())
    assert torch.equal(plain.generate(work[0][0][:, :5], 12), prompt)
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(prompt).logits, plain(prompt).logits, atol=1e-5, rtol=1e-5)


def test_dropout_of_compiled_blocks_continues_from_a_saved_state_to_the_bit(tiny):
    work = [batch for batch in batches(tiny) if batch[1] is None]
    torch.manual_seed(5)
    config = dataclasses.replace(tiny, dropout=0.3, attention_dropout=0.2, n_layers=1)
    weights = TransformerLM(config).state_dict()

    def start():
        torch.compiler.reset()
        model = TransformerLM(config).train()
        model.load_state_dict(weights)
        compile_blocks_(model)
        return model

    def run(model, batches):
        for ids, mask in batches:
            model(ids, mask, ids, return_logits=False).loss.backward()
        return [p.grad.clone() for p in model.parameters()]

    model = start()
    torch.manual_seed(7)
    run(model, work[:1])
    model.zero_grad()
    state = torch.get_rng_state()
    whole = run(model, work[1:])
    resumed = start()
    torch.set_rng_state(state)
    for expected, found in zip(whole, run(resumed, work[1:]), strict=True):
        assert torch.equal(expected, found)
    model.zero_grad()
    assert not all(map(torch.equal, whole, run(model, work[1:])))


def test_a_missing_compiler_is_found_at_the_start(build, monkeypatch, tmp_path):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr("torch._inductor.config.cpp.cxx", (None, str(tmp_path / "no-compiler")))
    with pytest.raises(TrainingError, match=r"C\+\+ compiler.*CXX.*compile_model=False"):
        compile_blocks_(build())
