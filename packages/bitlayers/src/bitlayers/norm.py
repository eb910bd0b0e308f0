"""The norm that stands before a ternary layer."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from bitcore.exceptions import QuantizationError
from torch import Tensor, nn

__all__ = ["SubLN"]


class SubLN(nn.RMSNorm):
    """The norm of BitNet b1.58 before its ternary layers: by the root of the mean square, with a gain.

    Rounding to 8 bits needs inputs of a steady size, so each layer has one of its own, and the block has none
    before it. The name is that of Wang et al., arXiv 2210.06423, whose norm also takes the mean away;
    BitNet's does not.

    Args:
        features: Size of the last dimension.
        eps: Added to the mean square.
        device: Of the gain.
        dtype: Of the gain.
    """

    def __init__(
        self,
        features: int,
        eps: float = 1e-5,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(features, eps=eps, device=device, dtype=dtype)  # pyright: ignore

    def forward(self, x: Tensor) -> Tensor:
        """Return x over the root of its mean square along the last dimension, times the gain, in x's dtype.

        The gain may have another dtype, as it has under autocast.

        Raises:
            QuantizationError: x is not floating.
        """
        if not x.is_floating_point():
            raise QuantizationError(f"a norm takes floating inputs, but was given {x.dtype}.")
        return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), self.eps)
