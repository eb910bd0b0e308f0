"""What a kernel is: it packs weights, and multiplies by them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import ClassVar, final

import torch
from torch import Tensor

from bitcore._weights import quantize_weight
from bitcore.config import BitQuantConfig
from bitcore.exceptions import QuantizationError
from bitcore.packing import tiles

__all__ = ["BitKernelBase"]


class BitKernelBase(ABC):
    """Multiplies activations by packed ternary weights.

    All kernels compute on the layout of `bitcore.packing.tiles`, so that what one packed, another runs: a
    model that was packed on one machine runs on all.
    """

    name: ClassVar[str]
    """What the registry knows it by."""
    priority: ClassVar[int] = 0
    """Of those that can serve, the kernel with the highest is chosen."""

    @property
    def has_cpp_backend(self) -> bool:
        """Whether compiled code does the work."""
        return False

    @abstractmethod
    def why_not(
        self,
        config: BitQuantConfig,
        device: torch.device,
        shape: tuple[int, int] | None = None,
    ) -> str | None:
        """Return why this kernel cannot serve, or None if it can.

        Args:
            config: How weights and activations are quantised.
            device: Where they are.
            shape: Rows and columns of the weight, where they are known.
        """

    @final
    def is_compatible_with(
        self,
        config: BitQuantConfig,
        device: torch.device | str = "cpu",
        shape: tuple[int, int] | None = None,
    ) -> bool:
        """Return whether this kernel can serve; `why_not` has the reason."""
        return self.why_not(config, torch.device(device), shape) is None

    def prepare_weights(self, weight: Tensor, config: BitQuantConfig) -> tuple[Tensor, Tensor]:
        """Quantise a weight and pack it.

        Args:
            weight: Floating, [rows, columns].
            config: One scale for the weight, or one for each row.

        Returns:
            The scale of each row, fp32 [rows], and the packed codes, uint8.

        Raises:
            QuantizationError: The weight is no matrix, or holds NaN or infinity.
        """
        if weight.ndim != 2:
            raise QuantizationError(
                f"a linear layer's weight is a matrix [rows, columns], not {list(weight.shape)}."
            )
        scale, codes = quantize_weight(weight.detach(), config.weight_granularity)
        return scale.reshape(-1).expand(len(codes)).contiguous(), tiles.pack(codes)

    @abstractmethod
    def __call__(
        self,
        x: Tensor,
        qweight_scale: Tensor,
        qweight: Tensor,
        bias: Tensor | None = None,
        config: BitQuantConfig | None = None,
    ) -> Tensor:
        """Return the layer's output: `x` times the dequantised weight, transposed, plus the bias.

        With 8-bit activations that is, exactly and in this order: the integers' product, as fp32, times the
        product of both scales; plus the bias, rounded to x's dtype; rounded to x's dtype.

        Args:
            x: Floating, [..., columns].
            qweight_scale: fp32 [rows].
            qweight: What `prepare_weights` packed.
            bias: [rows].
            config: How activations are quantised; the default of `BitQuantConfig` if None.

        Returns:
            [..., rows], in x's dtype.

        Raises:
            QuantizationError: Shapes, dtypes or devices do not fit one another.
        """

    def bind(
        self,
        qweight_scale: Tensor,
        qweight: Tensor,
        bias: Tensor | None = None,
        config: BitQuantConfig | None = None,
    ) -> Callable[[Tensor], Tensor]:
        """Return what takes inputs and gives a layer's outputs, for many calls with the same weight.

        It may keep the tensors, and what it knows of them: after they were changed or moved, bind again.
        """
        return lambda x: self(x, qweight_scale, qweight, bias, config)
