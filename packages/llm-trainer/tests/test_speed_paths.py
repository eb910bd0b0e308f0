"""What is written out for speed computes what torch's own operations do."""

import pytest
import torch
import torch.nn.functional as F
from llm_trainer.config import ModelConfig, TrainingConfig
from llm_trainer.models import TransformerLM, _attention, _causal_attention, _onednn
from llm_trainer.models._attention import allowed_pairs
from llm_trainer.models._causal_attention import causal_attention, document_runs
from llm_trainer.models._compile import compile_blocks_
from llm_trainer.models._fast_ops import Linear
from llm_trainer.models._flops import flops_per_token
from llm_trainer.models._loss import linear_cross_entropy
from llm_trainer.training._precision import Precision
from llm_trainer.training._step import take_step
from torch.utils.flop_counter import FlopCounterMode

SEGMENTS = torch.tensor([[1] * 30 + [2] * 70 + [3] * 20, [1] * 100 + [0] * 20])


def distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found.double() - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("segments", [None, SEGMENTS], ids=["whole", "documents"])
@pytest.mark.parametrize("band", [256, 48])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_attention_and_its_gradients_equal_a_masked_softmax(dtype, segments, band, dropout, monkeypatch):
    monkeypatch.setattr("llm_trainer.models._causal_attention._BAND", band)
    monkeypatch.setattr("llm_trainer.models._causal_attention._BAND_SCORES", 3 * band * 120)
    # As the attention gives them: heads beside one another, queries and keys a part of a larger tensor.
    wide = torch.randn(2, 120, 12, 16, dtype=dtype).requires_grad_()
    q, k, v = wide.transpose(1, 2).split(4, dim=1)
    direction = torch.randn(2, 4, 120, 16, dtype=dtype)
    documents = None if segments is None else document_runs(segments)

    def attend(values):
        torch.manual_seed(5)
        return causal_attention(q, k, values, documents, dropout)

    found = attend(v)
    (gradient,) = torch.autograd.grad(found, wide, direction)
    # Values that are unit vectors show the weights, some columns at a time.
    columns = F.pad(torch.eye(120, dtype=dtype), (0, 8)).split(16, dim=1)
    kept = torch.cat([attend(x.expand(2, 4, 120, 16)) for x in columns], dim=-1)[..., :120] != 0

    exact = wide.detach().double().requires_grad_()
    q_, k_, v_ = exact.transpose(1, 2).split(4, dim=1)
    mask = allowed_pairs(torch.ones(2, 120) if segments is None else segments + 4 * (segments == 0))
    weights = (q_ @ k_.transpose(-1, -2) / 4).masked_fill(~mask, -torch.inf).softmax(-1)
    expected = (weights * kept / (1 - dropout)) @ v_
    (expected_gradient,) = torch.autograd.grad(expected, exact, direction.double())
    tolerance = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 1e-2}[dtype]
    assert distance(found, expected) < tolerance
    assert distance(gradient, expected_gradient) < tolerance
    pairs = mask.expand_as(kept)
    assert not kept[~pairs].any()
    if not dropout:
        assert kept[pairs].all()
        return
    deviation = (dropout * (1 - dropout) / pairs.sum().item()) ** 0.5
    assert kept[pairs].double().mean().item() == pytest.approx(1 - dropout, abs=4 * deviation)
    # Every head and row has choices of its own.
    assert len({tuple(row.flatten().tolist()) for row in kept[:, :, 30:100, 30:].flatten(0, 1)}) == 8


def test_what_attention_drops_is_drawn_from_torchs_generator():
    q, k, v = torch.randn(3, 1, 2, 64, 8)
    torch.manual_seed(1)
    first, second = (causal_attention(q, k, v, None, 0.5) for _ in range(2))
    assert not torch.equal(first, second)
    torch.manual_seed(1)
    assert torch.equal(causal_attention(q, k, v, None, 0.5), first)
    # As good as always: of a row of weights nothing, or the whole, is left.
    assert torch.equal(causal_attention(q, k, v, None, 1 - 1e-9)[:, :, 0], torch.zeros(1, 2, 8))
    torch.testing.assert_close(causal_attention(q, k, v, None, 1e-9), causal_attention(q, k, v))


def test_dropped_weights_are_the_same_when_a_block_is_computed_again(build):
    ids = torch.randint(0, 61, (2, 24))
    gradients = []
    for again in (False, True):
        torch.manual_seed(2)
        model = build(attention_dropout=0.4, dropout=0.2, gradient_checkpointing=again).train()
        model(ids, labels=ids).loss.backward()
        gradients.append([p.grad for p in model.parameters()])
    torch.testing.assert_close(*gradients)


def test_documents_are_the_runs_of_equal_numbers():
    expected = [[0, 0, 30], [0, 30, 100], [0, 100, 120], [1, 0, 100], [1, 100, 120]]
    assert document_runs(SEGMENTS).tolist() == expected
    # In two pieces, and too short to be worth a call each.
    assert document_runs(torch.tensor([[1] * 40 + [2] * 40 + [1] * 40])) is None
    assert document_runs(torch.arange(1, 121)[None]) is None
    # Padding in two places is no document.
    assert document_runs(torch.tensor([[0] * 40 + [2] * 40 + [0] * 40])).size(0) == 3


@pytest.mark.parametrize("segments", [None, SEGMENTS], ids=["whole", "documents"])
def test_a_torch_without_the_operators_computes_the_same(build, segments, monkeypatch):
    model = build(max_seq_len=120, n_kv_heads=2)
    ids = torch.randint(0, 61, (2, 120))
    # What padding attends to differs, and is of no consequence.
    labels = ids if segments is None else ids.where(segments > 0, -100)

    def step():
        loss = model(ids, segments, labels).loss
        return loss, *torch.autograd.grad(loss, list(model.parameters()))

    expected = step()
    monkeypatch.setattr(_causal_attention, "_HAS_OPERATORS", False)
    monkeypatch.setattr(_attention, "causal_attention", lambda *_: pytest.fail("it was used"))
    for found, before in zip(step(), expected, strict=True):
        torch.testing.assert_close(found, before, rtol=1e-4, atol=1e-5)


def test_an_operator_is_known_by_its_arguments():
    assert _causal_attention._HAS_OPERATORS
    assert _causal_attention._takes("relu", "self")
    assert not _causal_attention._takes("relu", "input")
    assert not _causal_attention._takes("no_such_operator")


@pytest.mark.parametrize(("inputs", "outputs"), [(8, 24), (24, 8)])
@pytest.mark.parametrize("bias", [True, False])
def test_half_linear_has_the_gradients_of_autocast(inputs, outputs, bias):
    ours, theirs = Linear(inputs, outputs, bias=bias), torch.nn.Linear(inputs, outputs, bias=bias)
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(3, 5, inputs)
    results = []
    for linear in (ours, theirs):
        leaf = x.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            y = linear(leaf)
        y.square().sum().backward()
        results.append([y, leaf.grad, *(p.grad for p in linear.parameters())])
    for found, expected in zip(*results, strict=True):
        assert found.dtype == expected.dtype
        # The order of a sum may differ, so the last of bfloat16's 8 bits may as well.
        torch.testing.assert_close(found, expected, rtol=1e-2, atol=1e-2)
    # And what has no gradient is not computed.
    for parameter in ours.parameters():
        parameter.requires_grad_(False)
    with torch.autocast("cpu", torch.bfloat16):
        (gradient,) = torch.autograd.grad(ours(leaf).square().sum(), leaf)
    torch.testing.assert_close(gradient, results[1][1], rtol=1e-2, atol=1e-2)


def test_float16_gradients_of_the_loss_do_not_vanish_in_the_mean():
    x, weight = torch.randn(4096, 8), torch.randn(16, 8)
    targets = torch.randint(0, 16, (4096,))
    found, exact = weight.clone().requires_grad_(), weight.clone().requires_grad_()
    with torch.autocast("cpu", torch.float16):
        loss = linear_cross_entropy(x, found, targets)
    loss.backward()
    F.cross_entropy(x @ exact.T, targets).backward()
    assert distance(found.grad, exact.grad.double()) < 2e-3


def train(config: ModelConfig, segments: torch.Tensor | None, *, half: bool, steps: int) -> list[float]:
    torch.manual_seed(0)
    model = TransformerLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    device = torch.device("cpu")
    precision = Precision(TrainingConfig(use_amp=half), device)
    ids = torch.randint(0, 50, (2, 120)).sort(dim=1).values
    batch = {"input_ids": ids, "labels": ids}
    if segments is not None:
        batch["attention_mask"] = segments
    return [take_step(model, [batch], optimizer, precision, device, 1.0).loss for _ in range(steps)]


@pytest.mark.parametrize("segments", [None, SEGMENTS], ids=["whole", "documents"])
def test_half_precision_learns_as_float32_does(tiny, segments):
    config = tiny.__class__.from_dict(
        tiny.to_dict() | {"max_seq_len": 120, "norm": "rmsnorm", "positions": "rope", "activation": "swiglu"}
    )
    half, single = (train(config, segments, half=half, steps=40) for half in (True, False))
    assert single[-1] < 0.5 * single[0]
    assert half == pytest.approx(single, rel=0.03)


def test_clipping_equals_torchs(tiny):
    norms = {}
    for limit in (None, 1e-3, 1e3):
        torch.manual_seed(0)
        model = TransformerLM(tiny)
        before = [p.detach().clone() for p in model.parameters()]
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        ids = torch.randint(0, 61, (2, 20), generator=torch.Generator().manual_seed(1))
        device = torch.device("cpu")
        precision = Precision(TrainingConfig(use_amp=False), device)
        result = take_step(model, [{"input_ids": ids, "labels": ids}], optimizer, precision, device, limit)
        moved = torch.cat([(p - b).flatten() for p, b in zip(model.parameters(), before, strict=True)])
        norms[limit] = result.grad_norm, moved.norm().item()
    assert norms[None] == pytest.approx((norms[None][0],) * 2, rel=1e-3)
    assert norms[1e3] == norms[None]
    assert norms[1e-3] == pytest.approx((norms[None][0], 1e-3), rel=1e-2)


@pytest.mark.parametrize("changes", [{"bias": False}, {"activation": "swiglu", "n_kv_heads": 2}])
def test_flops_are_those_of_the_products(tiny, changes, monkeypatch):
    monkeypatch.setattr(_onednn, "PREFERS_ONEDNN", False)  # whose products torch does not count
    config = ModelConfig.from_dict(tiny.to_dict() | changes)
    model = TransformerLM(config)
    ids = torch.randint(0, 61, (1, 24))
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        model(ids)
    # torch counts the forward pass, and the attention of all pairs: 4 T D a token and layer.
    pairs = 4 * 24 * config.d_model * config.n_layers
    counts = {str(op): n for op, n in counter.get_flop_counts()["Global"].items()}
    products = sum(n for op, n in counts.items() if "mm" in op)
    attention = pairs * (24 + 1) / (2 * 24)
    assert flops_per_token(config, 24) == pytest.approx(3 * (products / 24 + attention))


@pytest.fixture
def onednn(monkeypatch):
    """As on a processor of AMD, and for few rows as well; returns how many products oneDNN made."""
    calls = []
    product = _onednn._onednn_linear

    def counted(*arguments):
        calls.append(arguments)
        return product(*arguments)

    monkeypatch.setattr(_onednn, "PREFERS_ONEDNN", True)
    monkeypatch.setattr(_onednn, "_FEWEST_ROWS", 1)
    monkeypatch.setattr(_onednn, "_onednn_linear", counted)
    return lambda: len(calls)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(3, 5, 8), (7, 8), (1, 1, 8)])
def test_products_by_onednn_equal_torchs_own(bias, shape, onednn):
    ours, theirs = Linear(8, 6, bias=bias), torch.nn.Linear(8, 6, bias=bias)
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(shape)
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    slope = torch.randn(*shape[:-1], 6)
    for layer, given in zip((ours, theirs), inputs, strict=True):
        layer(given).backward(slope)
    assert onednn() == 3
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad)
    for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs(x))
    assert onednn() == 4
    # A frozen layer hands a gradient on.
    given = x.clone().requires_grad_()
    ours.requires_grad_(False)(given).backward(slope)
    torch.testing.assert_close(given.grad, inputs[1].grad)


# torch's own access, when it traces a function that defines its own gradient.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.filterwarnings("ignore:.*autograd.function.Function.* should not be instantiated")
@pytest.mark.parametrize("compiled", [False, True])
def test_every_large_product_of_a_model_is_made_by_onednn(build, compiled, monkeypatch, onednn):
    model = build(n_layers=1, logit_softcap=5.0).train()
    ids = torch.randint(0, 61, (2, 24))

    def step():
        model.zero_grad()
        model(ids, labels=ids, return_logits=False).loss.backward()
        return [p.grad.clone() for p in model.parameters()]

    with monkeypatch.context() as here:
        here.setattr(_onednn, "PREFERS_ONEDNN", False)
        expected = step()
        assert onednn() == 0
    if compiled:
        torch.compiler.reset()
        compile_blocks_(model)
    for found, before in zip(step(), expected, strict=True):
        torch.testing.assert_close(found, before, rtol=1e-4, atol=1e-6)
    # Four in the block, and the vocabulary's: each forward, and backward to what comes in and to the weight.
    assert onednn() == 15
    with torch.no_grad():
        model.eval()(ids)
    assert onednn() == 20


def test_few_rows_are_not_worth_what_onednn_prepares(monkeypatch, onednn):
    monkeypatch.setattr(_onednn, "_FEWEST_ROWS", 64)
    layer = Linear(8, 6)
    for rows, products in ((1, 0), (63, 0), (64, 1)):
        with torch.no_grad():
            layer(torch.randn(rows, 8))
        assert onednn() == products


@pytest.mark.parametrize(("vendor", "expected"), [("AuthenticAMD", True), ("GenuineIntel", False)])
def test_onednn_is_chosen_by_the_processor(vendor, expected, monkeypatch):
    monkeypatch.setattr(_onednn.Path, "read_text", lambda *_, **__: f"vendor_id\t: {vendor}\n")
    assert _onednn._prefers_onednn() is expected
