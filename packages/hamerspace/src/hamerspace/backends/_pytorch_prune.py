"""Unstructured pruning: the smallest weights become zero."""

from __future__ import annotations

from typing import Any

from hamerspace._imports import need
from hamerspace.exceptions import ConstraintError, UnsupportedError


def prune_in_place(module: Any, share: float) -> str:
    """Set the smallest weights of each linear and convolutional layer to zero, by L1 norm.

    Args:
        module: its weights are changed.
        share: of a layer's weights, between 0 and 1.

    Raises:
        ConstraintError: ``share`` is out of range.
        UnsupportedError: there are no such layers.
    """
    torch = need("torch")
    if not 0 < share < 1:
        raise ConstraintError(f"amount is {share!r}; give the share of weights to zero, between 0 and 1")
    nn = torch.nn
    kinds = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
    weights = {id(one.weight): one.weight for one in module.modules() if isinstance(one, kinds)}
    if not weights:
        raise UnsupportedError("the model has no linear or convolutional layers to prune")
    zeroed = total = 0
    with torch.no_grad():
        for weight in weights.values():
            count = int(share * weight.numel())
            if count:
                smallest = weight.abs().flatten().topk(count, largest=False, sorted=False).indices
                weight.view(-1)[smallest] = 0
            zeroed += int((weight == 0).sum())
            total += weight.numel()
    return (
        f"{zeroed:,} of {total:,} weights in {len(weights)} layers are zero; zeros are stored and multiplied "
        "as any other number, so that the file is no smaller and the model no faster by itself"
    )
