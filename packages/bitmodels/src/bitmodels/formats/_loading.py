"""What is asked of a model before it is stored, and of tensors before they are put in one."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from bitlayers.utils import ternary_layers
from torch import Tensor, nn

from bitmodels.exceptions import CheckpointError

__all__ = ["fill", "is_packed"]


def is_packed(model: nn.Module) -> bool:
    """Return whether a model's ternary layers hold packed codes alone.

    Raises:
        CheckpointError: Some do and others do not.
    """
    forms = {layer.is_deployed for layer in ternary_layers(model).values()}
    if len(forms) > 1:
        raise CheckpointError("some layers are deployed and others are not; call deploy() on the model.")
    return forms == {True}


def fill(model: nn.Module, tensors: dict[str, Tensor], path: Path, *, shared: Collection[str] = ()) -> None:
    """Put tensors in a model, all of them and of the right shapes.

    They take the place of the model's own without a copy; where some are shared, they are copied into its
    own, for a tensor that has two names stays one only so.

    Args:
        model: On any device.
        tensors: By the names of the model's state dict.
        path: What they were read from, for messages.
        shared: Names of the model's that are others' second ones, and not among the tensors.

    Raises:
        CheckpointError: A tensor is missing, is of nothing, or has another shape.
    """
    own = model.state_dict()
    for name, tensor in tensors.items():
        if name in own and own[name].shape != tensor.shape:
            raise CheckpointError(
                f"{path}: {name} has the shape {list(tensor.shape)}, but the configuration needs "
                f"{list(own[name].shape)}."
            )
    wrong = sorted((own.keys() - set(shared)) ^ tensors.keys())
    if wrong:
        raise CheckpointError(f"{path} does not fit the model in {', '.join(wrong[:5])}.")
    model.load_state_dict(tensors, strict=False, assign=not shared)
