"""What users give as data, and what models give as outputs."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bitmodels.exceptions import QuantizationError

__all__ = ["answer_of", "device_of", "is_shifted", "output_of", "split_batch", "usual_loss"]


def split_batch(batch: Any, device: torch.device) -> tuple[Any, Tensor | None]:
    """Return a batch's inputs, and its targets if it has any, on a device.

    Args:
        batch: Inputs; or a pair of inputs and targets; or a mapping, whose `labels` are the targets and whose
            rest the model takes by name.
        device: Where both go.

    Raises:
        QuantizationError: It is something else.
    """
    if isinstance(batch, Tensor):
        return batch.to(device), None
    if isinstance(batch, Mapping):
        given = {str(k): v.to(device) if isinstance(v, Tensor) else v for k, v in cast("Any", batch).items()}
        targets = given.pop("labels", None)
        return given, targets
    if isinstance(batch, tuple | list) and len(cast("Sequence[Any]", batch)) == 2:
        inputs, targets = cast("Sequence[Any]", batch)
        if isinstance(inputs, Tensor) and isinstance(targets, Tensor):
            return inputs.to(device), targets.to(device)
    kind = type(cast("object", batch)).__name__
    raise QuantizationError(
        f"a batch is a tensor of inputs, a pair of inputs and targets, or a mapping; this is a {kind}."
    )


def output_of(model: nn.Module, inputs: Any) -> Tensor:
    """Return a model's output: a tensor, the first of several, or what is called logits.

    Raises:
        QuantizationError: There is no tensor in it.
    """
    return _tensor_of(model(**inputs) if isinstance(inputs, dict) else model(inputs))


def _tensor_of(out: Any) -> Tensor:
    logits = getattr(out, "logits", None)
    logits = getattr(out, "last_hidden_state", None) if logits is None else logits
    if logits is None and isinstance(out, Mapping):
        logits = cast("Mapping[str, Any]", out).get("logits")
    if logits is not None:
        out = logits
    elif isinstance(out, tuple | list) and len(cast("Sequence[Any]", out)):
        out = cast("Sequence[Any]", out)[0]
    if not isinstance(out, Tensor):
        kind = type(cast("object", out)).__name__
        raise QuantizationError(f"the model returns a {kind}, in which there is no tensor.")
    return out


def answer_of(model: nn.Module, inputs: Any, targets: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Return a model's output, and its own loss if it takes `labels` and says one, as in transformers."""
    if targets is None or not isinstance(inputs, dict) or not _takes_labels(model):
        return output_of(model, inputs), None
    found = model(**inputs, labels=targets)
    loss = getattr(found, "loss", None)
    return _tensor_of(found), loss if isinstance(loss, Tensor) else None


@torch.no_grad()
def is_shifted(out: Tensor, targets: Tensor, own: Tensor | None) -> bool:
    """Return whether each target is of the output before it, which nothing but the model's own loss tells.

    Most models of transformers that write text set the labels off by one themselves: of both readings the one
    that fits their loss is taken.
    """
    if own is None or targets.is_floating_point() or targets.ndim < 2 or out.shape[:-1] != targets.shape:
        return False
    readings = (out, targets), (out[:, :-1], targets[:, 1:])
    beside, before = (abs(float(usual_loss(*pair) - own)) for pair in readings)
    return before < beside


def _takes_labels(model: nn.Module) -> bool:
    return "labels" in inspect.signature(model.forward).parameters


def device_of(model: nn.Module) -> torch.device:
    """Return where a model's parameters and buffers are."""
    for tensor in (*model.parameters(), *model.buffers()):
        return tensor.device
    return torch.device("cpu")


def usual_loss(out: Tensor, targets: Tensor) -> Tensor:
    """Return the cross-entropy where targets are classes (-100 is none), else the mean square error.

    Raises:
        QuantizationError: The shapes do not fit.
    """
    if targets.is_floating_point():
        if out.shape != targets.shape:
            raise QuantizationError(
                f"outputs of shape {list(out.shape)} and targets of {list(targets.shape)} do not fit."
            )
        return F.mse_loss(out.float(), targets.float())
    if out.shape[:-1] != targets.shape:
        raise QuantizationError(
            f"outputs of shape {list(out.shape)} tell {list(out.shape[:-1])} classes, but the targets have "
            f"the shape {list(targets.shape)}."
        )
    return F.cross_entropy(out.flatten(0, -2).float(), targets.flatten())
