"""SignRound for integers: rounding offsets and clipping learned by the sign of their gradients.

Source: Cheng et al., "Optimize Weight Rounding via Signed Gradient Descent for the Quantization of LLMs"
(arXiv 2309.05516). Of a weight `w` in a group with the range `low <= 0 <= high` it trains an offset `V` for
each value and two factors in [0, 1] for each group:

    scale, zero = range_to_scale(low * a, high * b)
    q = clamp(round(w / scale + V), least, most)          centred codes; the weight becomes scale * q

The gradients of these few formulas are written out here, with the straight-through estimator for rounding.
They are worked out together with the step and the next weight in one pass over pieces that stay in the
processor's cache, so that a step costs a few reads of the weights and no graph of autograd.
"""

from __future__ import annotations

import torch
from torch import Tensor

from auto_round.config_manager import LayerSettings
from auto_round.quantization._grouping import grouped
from auto_round.quantization._integers import asymmetric_scale, group_range, symmetric_scale
from auto_round.quantization._pieces import Scratch
from auto_round.quantization._quantized import QuantizedWeight


class IntegerSignRound:
    """The trained quantisation of one matrix of weights.

    Letters: R rows, G groups of a row, K values of a group.

    Args:
        weight: fp32 [R, G*K], finite; it is kept, not copied, and never changed.
        settings: Bits, group size, symmetric or not.
        scale_dtype: In which scales are rounded, in training as in the result.
        scratch: Buffers for one piece, which all layers of a block can share.
        rate: Step of the offsets at the start.
        range_rate: Step of the range's factors at the start.
    """

    def __init__(
        self,
        weight: Tensor,
        settings: LayerSettings,
        scale_dtype: torch.dtype,
        scratch: Scratch,
        *,
        rate: float,
        range_rate: float,
    ) -> None:
        self._settings, self._scale_dtype, self._scratch = settings, scale_dtype, scratch
        self._rate, self._range_rate = rate, range_rate
        self._w_RGK = grouped(weight, settings.group_size)
        self._offset_RGK = torch.zeros_like(self._w_RGK)
        self._low_RG, self._high_RG = group_range(self._w_RGK)
        self._low_factor_RG = torch.ones_like(self._low_RG)
        self._high_factor_RG = torch.ones_like(self._low_RG)
        self._best_codes_RGK = torch.empty_like(self._w_RGK, dtype=torch.uint8)
        self._set_scale()
        self._best_scale_RG, self._best_zero_RG = self._scale_RG, self._zero_RG

    def write(self, target: Tensor, *, keep: bool = False) -> None:
        """Write the quantised weight as it stands into `target` [R, G*K]; `keep` remembers it as best."""
        for rows in self._scratch.pieces(self._w_RGK):
            code, _, _ = self._round(rows)
            if keep:
                self._keep_codes(rows, code)
            self._write_piece(target, rows, code)
        if keep:
            self._best_scale_RG, self._best_zero_RG = self._scale_RG, self._zero_RG

    def step(self, gradient: Tensor, target: Tensor, factor: float, *, keep: bool) -> None:
        """Take a step against the gradient and write the new weight.

        Args:
            gradient: Of the loss with respect to the weight that was last written, [R, G*K].
            target: Where the new weight goes, [R, G*K].
            factor: What is left of the rates at this step of the schedule.
            keep: Remember the weight as it was before the step.
        """
        by_scale_RG = torch.empty_like(self._scale_RG)
        clipped_RG = torch.empty_like(self._scale_RG) if self._zero_RG is not None else None
        sign_RG1 = self._scale_RG.sign().unsqueeze(-1)
        for rows in self._scratch.pieces(self._w_RGK):
            code, unclipped, ratio = self._round(rows)
            if keep:
                self._keep_codes(rows, code)
            grad = self._scratch.take(3, code)
            grad.copy_(gradient[rows].view(code.shape))
            # d scale: sum of g * (q - (w / s) * [not clipped])
            inner = torch.mul(ratio, unclipped, out=ratio)
            torch.sub(code, inner, out=inner).mul_(grad)
            torch.sum(inner, -1, out=by_scale_RG[rows])
            if clipped_RG is not None:
                torch.sum(grad, -1, out=clipped_RG[rows])
            grad.mul_(unclipped)
            if clipped_RG is not None:
                clipped_RG[rows] -= torch.sum(grad, -1)
            torch.sign(grad, out=grad).mul_(sign_RG1[rows])
            self._offset_RGK[rows].add_(grad, alpha=-factor * self._rate)
        if keep:
            self._best_scale_RG, self._best_zero_RG = self._scale_RG, self._zero_RG
        self._step_range(by_scale_RG, clipped_RG, factor * self._range_rate)
        self.write(target)

    def result(self) -> QuantizedWeight:
        """Return the best quantisation that was remembered."""
        rows, groups, size = self._w_RGK.shape
        return QuantizedWeight(
            settings=self._settings,
            codes=self._best_codes_RGK.view(rows, groups * size),
            scale=self._best_scale_RG.to(self._scale_dtype),
            zero=None if self._best_zero_RG is None else self._best_zero_RG.to(torch.uint8),
        )

    def _set_scale(self) -> None:
        low, high = self._low_RG * self._low_factor_RG, self._high_RG * self._high_factor_RG
        bits = self._settings.bits
        if self._settings.symmetric:
            self._scale_RG, self._zero_RG = symmetric_scale(low, high, bits, self._scale_dtype), None
        else:
            self._scale_RG, self._zero_RG = asymmetric_scale(low, high, bits, self._scale_dtype)

    def _round(self, rows: slice) -> tuple[Tensor, Tensor, Tensor]:
        """Return centred codes, 1 where nothing was clipped and 0 elsewhere, and weight / scale."""
        w = self._w_RGK[rows]
        ratio, unclipped, code = (self._scratch.take(index, w) for index in range(3))
        torch.div(w, self._scale_RG[rows].unsqueeze(-1), out=ratio)
        torch.add(ratio, self._offset_RGK[rows], out=unclipped).round_()
        bits = self._settings.bits
        if self._zero_RG is None:
            torch.clamp(unclipped, -(1 << bits - 1), (1 << bits - 1) - 1, out=code)
        else:
            # Scalar bounds: torch clamps by tensors that are broadcast ten times as slowly.
            zero = self._zero_RG[rows].unsqueeze(-1)
            torch.add(unclipped, zero, out=code).clamp_(0, (1 << bits) - 1).sub_(zero)
        torch.eq(unclipped, code, out=unclipped)
        return code, unclipped, ratio

    def _keep_codes(self, rows: slice, code: Tensor) -> None:
        zero: Tensor | int = 1 << self._settings.bits - 1
        if self._zero_RG is not None:
            zero = self._zero_RG[rows].unsqueeze(-1)
        self._best_codes_RGK[rows].copy_(torch.add(code, zero, out=self._scratch.take(4, code)))

    def _write_piece(self, target: Tensor, rows: slice, code: Tensor) -> None:
        code.mul_(self._scale_RG[rows].unsqueeze(-1))
        target[rows].copy_(code.view(len(code), -1))

    def _step_range(self, by_scale_RG: Tensor, clipped_RG: Tensor | None, rate: float) -> None:
        """Turn the gradient of the scales into that of the range's factors, and step."""
        if clipped_RG is None:
            # scale = +-max(-low a, high b) / 2**(bits - 1): only the larger side matters, both in a tie.
            below, above = -self._low_RG * self._low_factor_RG, self._high_RG * self._high_factor_RG
            towards_low = by_scale_RG * -self._low_RG * self._scale_RG.sign() * (below >= above)
            towards_high = by_scale_RG * self._high_RG * self._scale_RG.sign() * (above >= below)
        else:
            most = float((1 << self._settings.bits) - 1)
            by_zero = -self._scale_RG * clipped_RG
            # zero = round(-low / scale), scale = (high - low) / most
            low = self._low_RG * self._low_factor_RG
            total = by_scale_RG + by_zero * low / self._scale_RG.square()
            towards_low = (-total / most - by_zero / self._scale_RG) * self._low_RG
            towards_high = total / most * self._high_RG
        self._low_factor_RG.sub_(towards_low.sign_(), alpha=rate).clamp_(0, 1)
        self._high_factor_RG.sub_(towards_high.sign_(), alpha=rate).clamp_(0, 1)
        self._set_scale()
