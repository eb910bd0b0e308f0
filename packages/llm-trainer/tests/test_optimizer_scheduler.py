import io
import math

import pytest
import torch
from llm_trainer.exceptions import ConfigurationError
from llm_trainer.training import create_optimizer, create_scheduler, get_device, set_seed
from llm_trainer.training.utils import choose_device
from torch import nn


@pytest.mark.parametrize(
    ("kind", "shape"),
    [
        ("constant", lambda t: 1),
        ("linear", lambda t: 0.2 + 0.8 * (1 - t)),
        ("cosine", lambda t: 0.2 + 0.4 * (1 + math.cos(math.pi * t))),
        ("polynomial", lambda t: 0.2 + 0.8 * (1 - t) ** 2),
    ],
)
def test_schedules_follow_their_formulas(kind, shape):
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=3.0)
    scheduler = create_scheduler(optimizer, kind, num_training_steps=21, warmup_steps=5, min_lr_ratio=0.2)
    found = []
    for _ in range(21):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    expected = [3 * (step + 1) / 5 for step in range(5)] + [3 * shape(step / 15) for step in range(16)]
    assert found == pytest.approx(expected)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(expected[-1])


def test_warmup_stable_decay_by_hand():
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=2.0)
    scheduler = create_scheduler(optimizer, "warmup_stable_decay", 10, 2, min_lr_ratio=0.2, decay_ratio=0.4)
    found = []
    for _ in range(10):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    # Two updates up, four at the top, four equal steps down to a fifth.
    assert found == pytest.approx([1.0, 2.0, 2.0, 2.0, 2.0, 2.0, 1.6, 1.2, 0.8, 0.4])


@pytest.mark.parametrize("kind", ["cosine", "linear", "polynomial", "constant", "warmup_stable_decay"])
def test_a_schedule_goes_on_where_it_was(kind):
    def rates(updates: int) -> list[float]:
        optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=2.0)
        scheduler = create_scheduler(optimizer, kind, 20, 4, updates=updates)
        found = []
        for _ in range(updates, 20):
            found.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            scheduler.step()
        return found

    assert rates(0)[3:] == rates(3)
    assert rates(0)[11:] == rates(11)


def newton_schulz(matrix: torch.Tensor) -> torch.Tensor:
    """The nearest orthogonal matrix: the exact answer that Muon's iteration is an approximation of."""
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    return left @ right


def test_muon_steps_matrices_along_their_orthogonalised_gradient(build):
    model = build(n_layers=1, tie_embeddings=False)
    optimizer = create_optimizer(
        model, "muon", learning_rate=1e-3, weight_decay=0.0, muon_learning_rate=0.1, muon_momentum=0.0
    )
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    ids = torch.randint(0, 61, (4, 16))
    model(ids, labels=ids).loss.backward()
    gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    optimizer.step()
    for name, parameter in model.named_parameters():
        moved = parameter.detach() - before[name]
        if name.startswith("blocks.") and parameter.dim() == 2:
            rows, columns = parameter.shape
            expected = -0.1 * max(1, rows / columns) ** 0.5 * newton_schulz(gradients[name])
            cosine = (moved * expected).sum() / (moved.norm() * expected.norm())
            assert cosine > 0.95, name
            assert moved.norm() == pytest.approx(expected.norm().item(), rel=0.2), name
        else:
            # Adam's first step is the learning rate in the direction against the gradient.
            torch.testing.assert_close(
                moved, -1e-3 * gradients[name] / (gradients[name].abs() + 1e-8), atol=1e-7, rtol=1e-3
            )


def test_muon_with_adamw_resumes_to_the_bit_and_is_scheduled_whole(build):
    ids = torch.randint(0, 61, (4, 16))

    def train(model, optimizer, steps):
        for _ in range(steps):
            model(ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    model = build()
    optimizer = create_optimizer(model, "muon")
    train(model, optimizer, 2)
    weights, state = {k: v.clone() for k, v in model.state_dict().items()}, optimizer.state_dict()
    state = torch.load(_saved(state), weights_only=True)
    train(model, optimizer, 2)
    other = build()
    other.load_state_dict(weights)
    resumed = create_optimizer(other, "muon")
    resumed.load_state_dict(state)
    train(other, resumed, 2)
    for name, parameter in model.state_dict().items():
        assert torch.equal(parameter, other.state_dict()[name]), name
    scheduler = create_scheduler(resumed, "linear", 4, 0, min_lr_ratio=0.0, updates=2)
    assert [group["lr"] for group in resumed.param_groups] == pytest.approx([0.02 / 3, 1e-4 / 3, 1e-4 / 3])
    assert [group["lr"] for part in resumed.parts.values() for group in part.param_groups] == [
        group["lr"] for group in resumed.param_groups
    ]
    assert scheduler.last_epoch == 2
    with pytest.raises(ValueError, match="not \\['adamw', 'muon'\\]"):
        resumed.load_state_dict(create_optimizer(model, "adamw").state_dict())


def _saved(value):
    buffer = io.BytesIO()
    torch.save(value, buffer)
    buffer.seek(0)
    return buffer


def one_step(kind, **settings):
    model = nn.Linear(2, 1)
    with torch.no_grad():
        model.weight.fill_(2.0)
        model.bias.fill_(3.0)
    optimizer = create_optimizer(model, kind, learning_rate=0.1, **settings)
    (model.weight.sum() * 4 + model.bias.sum()).backward()
    optimizer.step()
    return model.weight[0, 0].item(), model.bias[0].item()


def test_first_steps_by_hand():
    # Adam's first step is the learning rate whatever the gradient; decay takes 0.1 * 0.5 of the weight, not
    # the bias.
    assert one_step("adamw", weight_decay=0.5) == pytest.approx((2 - 0.1 * 0.5 * 2 - 0.1, 3 - 0.1))
    # Adam's L2 penalty is part of the gradient, so its first step is as long whatever the penalty.
    assert one_step("adam", weight_decay=0.5) == pytest.approx((2 - 0.1, 3 - 0.1))
    assert one_step("adam", weight_decay=0.0) == pytest.approx((2 - 0.1, 3 - 0.1))
    assert one_step("sgd", weight_decay=0.5) == pytest.approx((2 - 0.1 * (4 + 0.5 * 2), 3 - 0.1 * 1))


def test_adam_penalises_the_square_of_the_weights():
    # torch.optim.Adam with an explicit penalty in the loss is the same by definition.
    ours = nn.Linear(3, 2, bias=False)
    theirs = nn.Linear(3, 2, bias=False)
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(5, 3)
    optimizers = create_optimizer(ours, "adam", learning_rate=0.1, weight_decay=0.5), torch.optim.Adam(
        theirs.parameters(), lr=0.1
    )  # fmt: skip
    for _ in range(4):
        for model, optimizer, penalty in zip((ours, theirs), optimizers, (0.0, 0.25), strict=True):
            optimizer.zero_grad()
            (model(x).square().sum() + penalty * model.weight.square().sum()).backward()
            optimizer.step()
    torch.testing.assert_close(ours.weight, theirs.weight)


def test_every_parameter_is_optimised_once(build):
    model = build()
    groups = create_optimizer(model).param_groups
    found = [id(parameter) for group in groups for parameter in group["params"]]
    assert sorted(found) == sorted(id(parameter) for parameter in model.parameters())
    assert {parameter.dim() for parameter in groups[0]["params"]} == {2}
    assert {parameter.dim() for parameter in groups[1]["params"]} == {1}


@pytest.mark.parametrize("kind", ["adamw", "adam", "sgd", "muon"])
def test_updates_are_fused(build, kind):
    optimizer = create_optimizer(build(), kind)
    # Muon has no fused form; the AdamW beside it has.
    fused = optimizer.parts["adamw"] if kind == "muon" else optimizer
    assert fused.defaults["fused"] is True
    assert [group["fused"] for group in fused.param_groups] == [True, True]


def test_wrong_names_and_numbers():
    model = nn.Linear(2, 1)
    with pytest.raises(ConfigurationError, match="'adamz'"):
        create_optimizer(model, "adamz")
    with pytest.raises(ConfigurationError, match="nothing to optimise"):
        create_optimizer(model.requires_grad_(False))
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    with pytest.raises(ConfigurationError, match="'cosinus'"):
        create_scheduler(optimizer, "cosinus")
    with pytest.raises(ConfigurationError, match="no more warm-up than steps"):
        create_scheduler(optimizer, num_training_steps=5, warmup_steps=6)


def test_seed_and_device():
    set_seed(3)
    first = torch.rand(2)
    set_seed(3)
    assert torch.equal(torch.rand(2), first)
    device, reason = choose_device()
    assert device == get_device()
    assert reason.startswith(f"{device.type}, because")
    assert (device.type == "cuda") == torch.cuda.is_available()
