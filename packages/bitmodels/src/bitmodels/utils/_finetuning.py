"""Training of a model that was converted."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterable, Sized
from contextlib import contextmanager
from itertools import islice
from typing import Any, cast

import torch
import torch.nn.functional as F
from bitlayers import TernaryLayer
from bitlayers.utils import check_finite, evaluating, ternary_layers
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn

from bitmodels.exceptions import QuantizationError
from bitmodels.utils._batches import answer_of, device_of, is_shifted, output_of, split_batch, usual_loss

__all__ = ["finetune"]

_RISE = 0.05
"""The share of the steps in which the learning rate rises."""


def finetune(
    model: nn.Module,
    data: Iterable[Any],
    *,
    epochs: int = 1,
    steps: int | None = None,
    learning_rate: float = 1e-3,
    warmup: float = 0.5,
    teacher: nn.Module | None = None,
    distillation: float = 0.5,
    temperature: float = 2.0,
    loss: Callable[[Tensor, Tensor], Tensor] | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    max_grad_norm: float = 1.0,
    show_progress: bool = True,
) -> dict[str, list[float]]:
    """Train a model with ternary layers, in place, so that it gets used to their rounding.

    Rounding comes little by little: its strength rises from 0 to 1 over the first steps and stays there,
    which a model that was trained with floats takes better than all at once. The learning rate rises over
    the first twentieth of the steps and falls as a cosine to a tenth. An exception, Ctrl-C among them,
    leaves the model trained that far, and rounding fully.

    Args:
        model: With ternary layers, none of them deployed.
        data: Batches: inputs, or pairs of inputs and targets, or mappings with `labels`. Gone through once
            for each epoch, so a list or a `DataLoader` rather than an iterator where there are several.
        epochs: How often.
        steps: How many batches in all, where `data` cannot tell its length or fewer are wanted.
        learning_rate: The highest.
        warmup: The share of the steps in which the strength rises; 0 rounds fully from the start.
        teacher: The float model, whose outputs are learnt as well (Hinton et al., arXiv 1503.02531). Needed
            where batches have no targets.
        distillation: The weight of the teacher's outputs against that of the targets, from 0 to 1; where
            there are no targets it is 1.
        temperature: By which both models' logits are divided for the teacher's part.
        loss: Of outputs and targets; by default the model's own where it has one, as models of transformers
            have, else cross-entropy for classes and the mean square error for numbers.
        optimizer: Of the parameters that are trained; AdamW without decay of all if None. Its learning rates
            are scaled by the schedule, and left as they were at the end.
        max_grad_norm: To which gradients are scaled down.
        show_progress: Whether to show a bar on standard error.

    Returns:
        `loss`, `strength` and `learning_rate`, a number for each step.

    Raises:
        QuantizationError: A value is impossible, a weight holds NaN or infinity, there is nothing to train or
            to learn from, or the loss is no number.
    """
    total = _steps_in(data, epochs, steps)
    _check(warmup=warmup, distillation=distillation)
    if not 0 <= learning_rate < math.inf:
        raise QuantizationError(f"learning_rate is {learning_rate!r}; it must be a number from 0 on.")
    for name, value in (("temperature", temperature), ("max_grad_norm", max_grad_norm)):
        if not value > 0:
            raise QuantizationError(f"{name} is {value!r}; it must be above zero.")
    layers = list(ternary_layers(model).values())
    if not layers or any(layer.is_deployed for layer in layers):
        state = "none" if not layers else "some that are deployed"
        raise QuantizationError(
            f"finetune needs ternary layers with float weights, but the model has {state}."
        )
    check_finite(model)
    device = device_of(model)
    own = optimizer or torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], learning_rate, weight_decay=0.0
    )
    trained = [parameter for group in own.param_groups for parameter in group["params"]]
    history: dict[str, list[float]] = {"loss": [], "strength": [], "learning_rate": []}
    model.train()
    with (
        _rounding_little_by_little(layers) as round_by,
        _scaled_rates(own) as scale_rates,
        evaluating(*([] if teacher is None else [teacher])),
        _progress(total, show_progress) as advance,
    ):
        for step, batch in enumerate(islice(_endless(data, epochs, steps), total)):
            strength = min(1.0, step / (warmup * total)) if warmup else 1.0
            round_by(strength)
            rate = scale_rates(_schedule(step, total))
            inputs, targets = split_batch(batch, device)
            value = _loss(model, inputs, targets, teacher, distillation, temperature, loss)
            number = value.item()
            if not math.isfinite(number):
                raise QuantizationError(f"the loss is {number} at step {step}; lower the learning rate.")
            model.zero_grad(set_to_none=True)
            torch.autograd.backward(value)
            nn.utils.clip_grad_norm_(trained, max_grad_norm)
            cast("Any", own).step()
            for name, found in (("loss", number), ("strength", strength), ("learning_rate", rate)):
                history[name].append(found)
            advance(number)
        model.zero_grad(set_to_none=True)
    done = len(history["loss"])
    if done < total:
        raise QuantizationError(
            f"data ended after {done} of {total} steps; give what can be gone through again, or fewer steps."
            if done
            else "data has no batches."
        )
    return history


def _loss(
    model: nn.Module,
    inputs: Any,
    targets: Tensor | None,
    teacher: nn.Module | None,
    distillation: float,
    temperature: float,
    criterion: Callable[[Tensor, Tensor], Tensor] | None,
) -> Tensor:
    out, own = answer_of(model, inputs, targets)
    if targets is None:
        asked = None
    elif own is not None and criterion is None:
        asked = own
    else:
        shifted = is_shifted(out, targets, own)
        pair = (out[:, :-1], targets[:, 1:]) if shifted else (out, targets)
        asked = (criterion or usual_loss)(*pair)
    if teacher is None:
        if asked is None:
            raise QuantizationError("batches have no targets; give a teacher to learn from.")
        return asked
    with torch.no_grad():
        wanted = output_of(teacher, inputs)
    if wanted.shape != out.shape:
        raise QuantizationError(
            f"the teacher's outputs have the shape {list(wanted.shape)}, the model's {list(out.shape)}."
        )
    if out.shape[-1] == 1 or (targets is not None and targets.is_floating_point()):
        taught = F.mse_loss(out.float(), wanted.float())
    else:
        student, other = (x.flatten(0, -2).float() / temperature for x in (out, wanted))
        # The square keeps gradients of one size whatever the temperature.
        taught = temperature**2 * F.kl_div(
            student.log_softmax(-1), other.log_softmax(-1), reduction="batchmean", log_target=True
        )
    return taught if asked is None else distillation * taught + (1 - distillation) * asked


@contextmanager
def _rounding_little_by_little(layers: list[TernaryLayer]) -> Generator[Callable[[float], None]]:
    def set_strength(strength: float) -> None:
        for layer in layers:
            layer.strength = strength

    try:
        yield set_strength
    finally:
        set_strength(1.0)


@contextmanager
def _scaled_rates(optimizer: torch.optim.Optimizer) -> Generator[Callable[[float], float]]:
    highest = [group["lr"] for group in optimizer.param_groups]

    def scale(factor: float) -> float:
        for group, rate in zip(optimizer.param_groups, highest, strict=True):
            group["lr"] = rate * factor
        return optimizer.param_groups[0]["lr"]

    try:
        yield scale
    finally:
        scale(1.0)


def _schedule(step: int, total: int) -> float:
    """Return the share of the highest learning rate."""
    rise = max(1, round(total * _RISE))
    if step < rise:
        return (step + 1) / rise
    along = (step - rise) / max(1, total - rise)
    return 0.1 + 0.45 * (1 + math.cos(math.pi * along))


def _steps_in(data: Iterable[Any], epochs: int, steps: int | None) -> int:
    if epochs < 1 or (steps is not None and steps < 1):
        raise QuantizationError(f"epochs is {epochs} and steps is {steps}; they must be 1 or more.")
    try:
        length = len(cast("Sized", data))
    except TypeError as error:  # Also loaders have none, of datasets that have none.
        if steps is None:
            raise QuantizationError("data cannot tell its length; say how many steps there are.") from error
        return steps
    if length == 0:
        raise QuantizationError("data has no batches.")
    return length * epochs if steps is None else steps


def _endless(data: Iterable[Any], epochs: int, steps: int | None) -> Generator[Any]:
    """Go through data once for each epoch, or as often as the steps need it."""
    epoch = 0
    while steps is not None or epoch < epochs:
        batch = None
        for batch in data:
            yield batch
        if batch is None:
            return
        epoch += 1


def _check(**shares: float) -> None:
    for name, share in shares.items():
        if not 0 <= share <= 1:
            raise QuantizationError(f"{name} is {share!r}; it must be from 0 to 1.")


@contextmanager
def _progress(total: int, show: bool) -> Generator[Callable[[float], None]]:
    columns = (
        TextColumn("finetune"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.4f}"),
        TimeRemainingColumn(),
    )
    console = Console(stderr=True)
    with Progress(*columns, console=console, disable=not (show and console.is_terminal)) as bar:
        task = bar.add_task("finetune", total=total, loss=math.nan)
        yield lambda loss: bar.update(task, advance=1, loss=loss)
