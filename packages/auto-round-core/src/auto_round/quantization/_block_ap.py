"""Training of weights and scales, for `quality="best"`: Block-AP in units of the scale.

Source: Chen et al., "EfficientQAT: Efficient Quantization-Aware Training for Large Language Models"
(arXiv 2407.11062), whose first phase trains all weights and quantisation parameters of a block with Adam
against the block's own float output. It differs here in three ways, all so that one learning rate fits every
layer and every format of integers can hold the result: weights are trained as `u = w / scale`, in units of
the first scale; scales relative to it, and rounded to the dtype in which they are stored; zero points stay as
they are. Norms stay as they are too.

    q = round(u)          centred codes, u being held within their range; the weight becomes scale * q

The gradients (straight through the rounding) and the steps of Adam are written out, in one pass over pieces
that stay in the processor's cache.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from auto_round.config_manager import LayerSettings
from auto_round.quantization._grouping import grouped
from auto_round.quantization._growth import FIRST, SECOND, TINY, grown_scale, step_growth
from auto_round.quantization._integers import asymmetric_scale, group_range, symmetric_scale
from auto_round.quantization._pieces import Scratch
from auto_round.quantization._quantized import QuantizedWeight

_REACH = 0.49
"""How far beyond the last code a weight may go; half would round to the next, which is none."""


class IntegerBlockAP:
    """The trained quantisation of one matrix of weights.

    Letters: R rows, G groups of a row, K values of a group.

    Args:
        weight: fp32 [R, G*K], finite; it is overwritten.
        settings: Bits, group size, symmetric or not.
        scale_dtype: In which scales are rounded, in training as in the result.
        scratch: Buffers for one piece, which all layers of a block can share.
        rate: Adam's learning rate of the weights at the start, in units of the scale.
        scale_rate: That of the scales, relative to the scale.
    """

    def __init__(
        self,
        weight: Tensor,
        settings: LayerSettings,
        scale_dtype: torch.dtype,
        scratch: Scratch,
        *,
        rate: float,
        scale_rate: float,
    ) -> None:
        self._settings, self._scale_dtype, self._scratch = settings, scale_dtype, scratch
        self._rate, self._scale_rate = rate, scale_rate
        self._u_RGK = grouped(weight, settings.group_size)
        low, high = group_range(self._u_RGK)
        self._zero_RG: Tensor | None = None
        if settings.symmetric:
            self._start_RG = symmetric_scale(low, high, settings.bits, scale_dtype)
        else:
            self._start_RG, self._zero_RG = asymmetric_scale(low, high, settings.bits, scale_dtype)
        self._scale_RG = self._start_RG
        self._u_RGK.div_(self._start_RG.unsqueeze(-1))
        for rows in scratch.pieces(self._u_RGK):
            self._hold(rows)
        self._mean_RGK, self._square_RGK = torch.zeros_like(self._u_RGK), torch.zeros_like(self._u_RGK)
        self._growth_RG = torch.zeros_like(low)
        self._growth_mean_RG, self._growth_square_RG = torch.zeros_like(low), torch.zeros_like(low)
        self._steps = 0
        self._best_codes_RGK = torch.empty_like(self._u_RGK, dtype=torch.uint8)
        self._best_scale_RG = self._scale_RG

    def write(self, target: Tensor, *, keep: bool = False) -> None:
        """Write the quantised weight as it stands into `target` [R, G*K]; `keep` remembers it as best."""
        for rows in self._scratch.pieces(self._u_RGK):
            code = self._round(rows)
            if keep:
                self._keep_codes(rows, code)
            self._write_piece(target, rows, code)
        if keep:
            self._best_scale_RG = self._scale_RG

    def step(self, gradient: Tensor, target: Tensor, factor: float, *, keep: bool) -> None:
        """Take a step of Adam and write the new weight.

        Args:
            gradient: Of the loss with respect to the weight that was last written, [R, G*K].
            target: Where the new weight goes, [R, G*K].
            factor: What is left of the rates at this step of the schedule.
            keep: Remember the weight as it was before the step.
        """
        self._steps += 1
        by_scale_RG = torch.empty_like(self._scale_RG)
        sign_RG1 = self._scale_RG.sign().unsqueeze(-1)
        root = math.sqrt(1 - SECOND**self._steps)
        rate = factor * self._rate / (1 - FIRST**self._steps)
        for rows in self._scratch.pieces(self._u_RGK):
            code = self._round(rows)
            if keep:
                self._keep_codes(rows, code)
            grad = self._scratch.take(1, code)
            grad.copy_(gradient[rows].view(code.shape))
            torch.sum(code.mul_(grad), -1, out=by_scale_RG[rows])
            # The scale's size is the same for all values of a group but for slow changes, and Adam is blind
            # to such a factor; its sign is what counts.
            grad.mul_(sign_RG1[rows])
            mean, square, u = self._mean_RGK[rows], self._square_RGK[rows], self._u_RGK[rows]
            mean.lerp_(grad, 1 - FIRST)
            square.mul_(SECOND).addcmul_(grad, grad, value=1 - SECOND)
            size = torch.sqrt(square, out=code).div_(root).add_(TINY)
            u.addcdiv_(mean, size, value=-rate)
            self._hold(rows)
        if keep:
            self._best_scale_RG = self._scale_RG
        self._step_scale(by_scale_RG * self._start_RG, factor)
        self.write(target)

    def result(self) -> QuantizedWeight:
        """Return the best quantisation that was remembered."""
        rows, groups, size = self._u_RGK.shape
        return QuantizedWeight(
            settings=self._settings,
            codes=self._best_codes_RGK.view(rows, groups * size),
            scale=self._best_scale_RG.to(self._scale_dtype),
            zero=None if self._zero_RG is None else self._zero_RG.to(torch.uint8),
        )

    def _round(self, rows: slice) -> Tensor:
        """Return centred codes."""
        u = self._u_RGK[rows]
        return torch.round(u, out=self._scratch.take(0, u))

    def _hold(self, rows: slice) -> None:
        """Keep weights where they round to codes, so that all get a gradient and none is lost outside."""
        u, bits = self._u_RGK[rows], self._settings.bits
        if self._zero_RG is None:
            u.clamp_(-(1 << bits - 1) - _REACH, (1 << bits - 1) - 1 + _REACH)
        else:
            # Scalar bounds: torch clamps by tensors that are broadcast ten times as slowly.
            zero = self._zero_RG[rows].unsqueeze(-1)
            u.add_(zero).clamp_(-_REACH, (1 << bits) - 1 + _REACH).sub_(zero)

    def _keep_codes(self, rows: slice, code: Tensor) -> None:
        zero = 1 << self._settings.bits - 1 if self._zero_RG is None else self._zero_RG[rows].unsqueeze(-1)
        self._best_codes_RGK[rows].copy_(torch.add(code, zero, out=self._scratch.take(2, code)))

    def _write_piece(self, target: Tensor, rows: slice, code: Tensor) -> None:
        code.mul_(self._scale_RG[rows].unsqueeze(-1))
        target[rows].copy_(code.view(len(code), -1))

    def _step_scale(self, gradient_RG: Tensor, factor: float) -> None:
        step_growth(
            self._growth_RG,
            self._growth_mean_RG,
            self._growth_square_RG,
            gradient_RG,
            rate=factor * self._scale_rate,
            count=self._steps,
        )
        self._scale_RG = grown_scale(self._start_RG, self._growth_RG, self._scale_dtype).float()
