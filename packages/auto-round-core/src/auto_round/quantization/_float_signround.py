"""SignRound for formats whose elements are floats themselves: offsets and clipping learned by signs.

The recipe is that of `_signround`; offsets are added in units of the scale, before rounding to an element.
"""

from __future__ import annotations

import torch
from torch import Tensor

from auto_round.config_manager import LayerSettings
from auto_round.quantization._floats import fake_quantize_float, quantize_float
from auto_round.quantization._grouping import grouped
from auto_round.quantization._quantized import QuantizedWeight


class FloatSignRound:
    """The trained quantisation of one matrix of weights.

    Args:
        weight: [rows, in], finite; it is kept, not copied, and never changed.
        settings: Format and groups.
        rate: Step of the offsets at the start.
        range_rate: Step of the range's factors at the start.
    """

    def __init__(self, weight: Tensor, settings: LayerSettings, *, rate: float, range_rate: float) -> None:
        self._weight, self._settings = weight, settings
        self._rate, self._range_rate = rate, range_rate
        shape = grouped(weight, settings.group_size).shape
        self._offset = torch.zeros(shape, dtype=torch.float32, device=weight.device)
        self._factor = torch.ones(shape[:2], dtype=torch.float32, device=weight.device)
        self._best = self._quantized()

    def write(self, target: Tensor, *, keep: bool = False) -> None:
        """Write the quantised weight as it stands into `target`; with `keep`, remember it as best."""
        if keep:
            self._best = self._quantized()
        target.copy_(fake_quantize_float(self._weight, self._settings, self._offset, self._factor))

    def step(self, gradient: Tensor, target: Tensor, factor: float, *, keep: bool) -> None:
        """Take a step against the gradient and write the new weight.

        Args:
            gradient: Of the loss with respect to the weight that was last written.
            target: Where the new weight goes.
            factor: What is left of the rates at this step of the schedule.
            keep: Remember the weight as it was before the step.
        """
        if keep:
            self._best = self._quantized()
        offset, range_factor = self._offset.requires_grad_(), self._factor.requires_grad_()
        with torch.enable_grad():
            weight = fake_quantize_float(self._weight, self._settings, offset, range_factor)
            by_offset, by_factor = torch.autograd.grad(weight, [offset, range_factor], gradient.float())
        self._offset = offset.detach().sub_(by_offset.sign_(), alpha=factor * self._rate)
        self._factor = range_factor.detach().sub_(by_factor.sign_(), alpha=factor * self._range_rate)
        self._factor.clamp_(0, 1)
        self.write(target)

    def result(self) -> QuantizedWeight:
        """Return the best quantisation that was remembered."""
        return self._best

    def _quantized(self) -> QuantizedWeight:
        with torch.no_grad():
            return quantize_float(self._weight, self._settings, offset=self._offset, max_scale=self._factor)
