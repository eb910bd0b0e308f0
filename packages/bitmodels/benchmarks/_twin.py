"""The same model with float layers, to compare a ternary one with."""

from __future__ import annotations

from bitlayers import BitLinear
from torch import nn


def float_twin(model: nn.Module) -> nn.Module:
    """Put a ``torch.nn.Linear`` with the same parameters in the place of each ``BitLinear``."""
    for parent in list(model.modules()):
        for name, part in list(parent.named_children()):
            if isinstance(part, BitLinear):
                linear = nn.Linear(part.in_features, part.out_features, part.bias is not None, device="meta")
                linear.weight = part.weight
                if part.bias is not None:
                    linear.bias = part.bias
                setattr(parent, name, linear)
    return model
