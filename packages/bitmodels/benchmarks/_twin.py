"""The same model with float layers, to compare a ternary one with."""

from __future__ import annotations

from bitlayers import BitConv2d, BitLinear
from torch import nn


def float_twin(model: nn.Module) -> nn.Module:
    """Put torch's layer with the same parameters in the place of each ternary one; norms stay."""
    for parent in list(model.modules()):
        for name, part in list(parent.named_children()):
            if isinstance(part, BitLinear):
                linear = nn.Linear(part.in_features, part.out_features, part.bias is not None, device="meta")
                new: nn.Module = linear if part.norm is None else nn.Sequential(part.norm, linear)
            elif isinstance(part, BitConv2d):
                linear = new = nn.Conv2d(
                    part.in_channels,
                    part.out_channels,
                    part.kernel_size,
                    padding=part.kernel_size[0] // 2,
                    bias=part.bias is not None,
                    device="meta",
                )
            else:
                continue
            linear.weight, linear.bias = part.weight, part.bias
            setattr(parent, name, new)
    return model
