"""SignRound for integers: rounding offsets and clipping learned by the sign of their gradients.

Source: Cheng et al., "Optimize Weight Rounding via Signed Gradient Descent for the Quantization of LLMs"
(arXiv 2309.05516). Of a weight `w` in a group with the range `low <= 0 <= high` it trains an offset `V` in
[-0.5, 0.5] for each value and two factors in [0, 1] for each group:

    scale, zero = range_to_scale(low * a, high * b)
    q = clamp(round(w / scale + V), least, most)          centred codes; the weight becomes scale * q

The gradients of these few formulas are written out here, with the straight-through estimator for rounding.
They are worked out together with the step and the next weight in one pass over pieces that stay in the
processor's cache, so that a step costs a few reads of the weights and no graph of autograd.

Offsets step by the sign only where a gradient is large among those of its group, and by less in proportion
below: a weight on which the loss hardly depends would else walk at random by full steps, and end on another
code for nothing, which costs most on texts that are not like the calibration.
"""

from __future__ import annotations

import torch
from torch import Tensor

from auto_round.config_manager import LayerSettings
from auto_round.quantization._grouping import grouped
from auto_round.quantization._integers import asymmetric_scale, group_range, symmetric_scale
from auto_round.quantization._pieces import Scratch, WeightRows
from auto_round.quantization._quantized import QuantizedWeight

_FULL_STEP = 1.5
"""The sign counts whole from so many times the mean magnitude of a group's gradients on."""
_REACH = 0.5
_TINY = 1e-30


class IntegerSignRound:
    """The trained quantisation of one matrix of weights.

    Letters: R rows, G groups of a row, K values of a group.

    Args:
        weight: fp32 [R, G*K], finite, or what gives its rows; it is kept, not copied, and never changed.
        settings: Bits, group size, symmetric or not.
        scale_dtype: In which scales are rounded, in training as in the result.
        scratch: Buffers for one piece, which all layers of a block can share.
        rate: Step of the offsets at the start.
        range_rate: Step of the range's factors at the start.
    """

    def __init__(
        self,
        weight: Tensor | WeightRows,
        settings: LayerSettings,
        scale_dtype: torch.dtype,
        scratch: Scratch,
        *,
        rate: float,
        range_rate: float,
    ) -> None:
        self._settings, self._scale_dtype, self._scratch = settings, scale_dtype, scratch
        self._rate, self._range_rate = rate, range_rate
        self._weight = weight
        shape = tuple(weight.shape)
        self._offset_RGK = grouped(torch.zeros(shape, device=scratch.device), settings.group_size)
        ranges = [group_range(self._read(rows)) for rows in scratch.pieces(self._offset_RGK)]
        self._low_RG, self._high_RG = (torch.cat(parts) for parts in zip(*ranges, strict=True))
        self._low_factor_RG = torch.ones_like(self._low_RG)
        self._high_factor_RG = torch.ones_like(self._low_RG)
        self._best_codes_RGK = torch.empty_like(self._offset_RGK, dtype=torch.uint8)
        self._scale_RG, self._zero_RG = self._new_scale(slice(None))
        self._best_scale_RG = self._scale_RG.clone()
        self._best_zero_RG = None if self._zero_RG is None else self._zero_RG.clone()

    def write(self, target: Tensor, *, keep: bool = False) -> None:
        """Write the quantised weight as it stands into `target` [R, G*K]; `keep` remembers it as best."""
        for rows in self._scratch.pieces(self._offset_RGK):
            code, _, _ = self._round(self._read(rows), rows)
            if keep:
                self._keep(rows, code)
            self._write_piece(target, rows, code)

    def step(self, gradient: Tensor, target: Tensor, factor: float, *, keep: bool) -> None:
        """Take a step against the gradient and write the new weight.

        Args:
            gradient: Of the loss with respect to the weight that was last written, [R, G*K].
            target: Where the new weight goes, [R, G*K].
            factor: What is left of the rates at this step of the schedule.
            keep: Remember the weight as it was before the step.
        """
        # Groups lie within rows, so a piece is done with once its own weights have been read.
        for rows in self._scratch.pieces(self._offset_RGK):
            w = self._read(rows)
            code, unclipped, ratio = self._round(w, rows)
            if keep:
                self._keep(rows, code)
            grad = self._scratch.take(3, code)
            grad.copy_(gradient[rows].view(code.shape))
            # d scale: sum of g * (q - (w / s) * [not clipped])
            inner = torch.mul(ratio, unclipped, out=ratio)
            by_scale = torch.sub(code, inner, out=inner).mul_(grad).sum(-1)
            clipped = None if self._zero_RG is None else grad.sum(-1)
            grad.mul_(unclipped)
            if clipped is not None:
                clipped -= grad.sum(-1)
            size = torch.abs(grad, out=unclipped).mean(-1).mul_(_FULL_STEP).add_(_TINY)
            grad.mul_((self._scale_RG[rows].sign() / size).unsqueeze(-1)).clamp_(-1, 1)
            self._offset_RGK[rows].add_(grad, alpha=-factor * self._rate).clamp_(-_REACH, _REACH)
            self._step_range(rows, by_scale, clipped, factor * self._range_rate)
            code, _, _ = self._round(w, rows)
            self._write_piece(target, rows, code)

    def result(self) -> QuantizedWeight:
        """Return the best quantisation that was remembered."""
        rows, groups, size = self._offset_RGK.shape
        return QuantizedWeight(
            settings=self._settings,
            codes=self._best_codes_RGK.view(rows, groups * size),
            scale=self._best_scale_RG.to(self._scale_dtype),
            zero=None if self._best_zero_RG is None else self._best_zero_RG.to(torch.uint8),
        )

    def _new_scale(self, rows: slice) -> tuple[Tensor, Tensor | None]:
        low = self._low_RG[rows] * self._low_factor_RG[rows]
        high = self._high_RG[rows] * self._high_factor_RG[rows]
        bits = self._settings.bits
        if self._settings.symmetric:
            return symmetric_scale(low, high, bits, self._scale_dtype), None
        return asymmetric_scale(low, high, bits, self._scale_dtype)

    def _read(self, rows: slice) -> Tensor:
        return grouped(self._weight[rows], self._settings.group_size)

    def _round(self, w: Tensor, rows: slice) -> tuple[Tensor, Tensor, Tensor]:
        """Return centred codes, 1 where nothing was clipped and 0 elsewhere, and weight / scale."""
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

    def _keep(self, rows: slice, code: Tensor) -> None:
        zero: Tensor | int = 1 << self._settings.bits - 1
        if self._zero_RG is not None and self._best_zero_RG is not None:
            zero = self._zero_RG[rows].unsqueeze(-1)
            self._best_zero_RG[rows] = self._zero_RG[rows]
        self._best_scale_RG[rows] = self._scale_RG[rows]
        self._best_codes_RGK[rows].copy_(torch.add(code, zero, out=self._scratch.take(4, code)))

    def _write_piece(self, target: Tensor, rows: slice, code: Tensor) -> None:
        code.mul_(self._scale_RG[rows].unsqueeze(-1))
        target[rows].copy_(code.view(len(code), -1))

    def _step_range(self, rows: slice, by_scale: Tensor, clipped: Tensor | None, rate: float) -> None:
        """Turn the gradient of the scales into that of the range's factors, and step."""
        low_end, high_end, scale = self._low_RG[rows], self._high_RG[rows], self._scale_RG[rows]
        low_factor, high_factor = self._low_factor_RG[rows], self._high_factor_RG[rows]
        if clipped is None:
            # scale = +-max(-low a, high b) / 2**(bits - 1): only the larger side matters, both in a tie.
            below, above = -low_end * low_factor, high_end * high_factor
            signed = by_scale * scale.sign()
            towards_low = signed * -low_end * (below >= above)
            towards_high = signed * high_end * (above >= below)
        else:
            most = float((1 << self._settings.bits) - 1)
            by_zero = -scale * clipped
            # zero = round(-low / scale), scale = (high - low) / most
            low = low_end * low_factor
            total = by_scale + by_zero * low / scale.square()
            towards_low = (-total / most - by_zero / scale) * low_end
            towards_high = total / most * high_end
        low_factor.sub_(towards_low.sign_(), alpha=rate).clamp_(0, 1)
        high_factor.sub_(towards_high.sign_(), alpha=rate).clamp_(0, 1)
        self._scale_RG[rows], zero = self._new_scale(rows)
        if self._zero_RG is not None and zero is not None:
            self._zero_RG[rows] = zero
