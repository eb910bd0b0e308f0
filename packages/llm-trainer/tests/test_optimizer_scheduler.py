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
