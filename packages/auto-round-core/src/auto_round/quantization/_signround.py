"""SignRound for integers: rounding offsets and clipping learned by the sign of their gradients.

Source: Cheng et al., "Optimize Weight Rounding via Signed Gradient Descent for the Quantization of LLMs"
(arXiv 2309.05516). Of a weight `w` in a group with the range `low <= 0 <= high` it trains an offset `V` in
[-0.5, 0.5] for each value and two factors in [0, 1] for each group:

    scale, zero = range_to_scale(low * a, high * b)
    q = clamp(round(w / scale + V), least, most)          centred codes; the weight becomes scale * q

The gradients of these few formulas are written out here, with the straight-through estimator for rounding
and none through codes at either end of their range. Did gradients pass there (the paper leaves it open, and
releases of torch differ in what they give for `clamp`), weights at 2 bits, of which half have an end's code,
would fit the calibration by leaving the ends, and texts of another kind would lose by it.
They are worked out together with the step and the next weight in one pass over pieces that stay in the
processor's cache, so that a step costs a few reads of the weights and no graph of autograd. `torch.compile`
can make one loop of the same lines.

Offsets step by the sign only where a gradient is large among those of its group, and by less in proportion
below: a weight on which the loss hardly depends would else walk at random by full steps, and end on another
code for nothing, which costs most on texts that are not like the calibration. The finer the codes, the more
gradients count as small.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from auto_round.config_manager import LayerSettings
from auto_round.quantization._compiled import Compiled
from auto_round.quantization._grouping import grouped
from auto_round.quantization._integers import asymmetric_scale, group_range, symmetric_scale
from auto_round.quantization._pieces import Buffers, Scratch, WeightRows, opened, part
from auto_round.quantization._quantized import QuantizedWeight

_FULL_STEP = 0.375
"""The sign counts whole from so many times the bits and the mean magnitude of a group's gradients on."""
_REACH = 0.5
_TINY = 1e-30


class _Groups(NamedTuple):
    """What is known of N groups of K values: their range, what is trained, and what was best."""

    low_N: Tensor
    high_N: Tensor
    low_factor_N: Tensor
    high_factor_N: Tensor
    offset_NK: Tensor
    scale_N: Tensor
    zero_N: Tensor | None
    best_codes_NK: Tensor
    best_scale_N: Tensor
    best_zero_N: Tensor | None

    def at(self, groups: slice) -> _Groups:
        return _Groups(*(None if tensor is None else part(tensor, groups) for tensor in self))  # pyright: ignore


class IntegerSignRound:
    """The trained quantisation of one matrix of weights.

    Letters: R rows, G groups of a row, N groups of all or of some rows, K values of a group.

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
        self._weight, self._settings, self._scratch = weight, settings, scratch
        self._rate, self._range_rate = rate, range_rate
        rows, width = weight.shape
        size = width if settings.group_size == -1 else settings.group_size
        pieces = list(scratch.pieces((rows, width), size))
        ranges = [group_range(grouped(weight[piece.rows], size)) for piece in pieces]
        low_N, high_N = (torch.cat([end.flatten() for end in ends]) for ends in zip(*ranges, strict=True))
        if settings.symmetric:
            scale_N, zero_N = symmetric_scale(low_N, high_N, settings.bits, scale_dtype), None
        else:
            scale_N, zero_N = asymmetric_scale(low_N, high_N, settings.bits, scale_dtype)
        offset_NK = torch.zeros(len(low_N), size, dtype=torch.float32, device=scratch.device)
        self._all = _Groups(
            low_N=low_N,
            high_N=high_N,
            low_factor_N=torch.ones_like(low_N),
            high_factor_N=torch.ones_like(low_N),
            offset_NK=offset_NK,
            scale_N=scale_N,
            zero_N=zero_N,
            best_codes_NK=torch.empty_like(offset_NK, dtype=torch.uint8),
            best_scale_N=scale_N.clone(),
            best_zero_N=None if zero_N is None else zero_N.clone(),
        )
        self._parts = [(piece, self._all.at(piece.groups)) for piece in pieces]
        self._scale_dtype = scale_dtype

    def write(self, target: Tensor, *, keep: bool = False) -> None:
        """Write the quantised weight as it stands into `target` [R, G*K]; `keep` remembers it as best."""
        bits = self._settings.bits
        for piece, groups in self._parts:
            w_NK = self._read(piece.rows)
            buffers = self._scratch.buffers(w_NK)
            code, _, _ = _round(w_NK, groups, bits, buffers)
            if keep:
                _keep(groups, code, bits, buffers)
            with opened(target, piece) as target_NK:
                target_NK.copy_(code.mul_(groups.scale_N.unsqueeze(-1)))

    def step(self, gradient: Tensor, target: Tensor, factor: float, *, keep: bool) -> None:
        """Take a step against the gradient and write the new weight.

        Args:
            gradient: Of the loss with respect to the weight that was last written, [R, G*K].
            target: Where the new weight goes, [R, G*K].
            factor: What is left of the rates at this step of the schedule.
            keep: Remember the weight as it was before the step.
        """
        update = _update(self._settings.bits, self._scale_dtype, self._scratch.compiles)
        rate, range_rate = factor * self._rate, factor * self._range_rate
        # Groups lie within rows, so a piece is done with once its own weights have been read.
        for piece, groups in self._parts:
            w_NK = self._read(piece.rows)
            buffers = self._scratch.buffers(w_NK)
            grad_NK = gradient[piece.rows].reshape(w_NK.shape).data
            with opened(target, piece) as target_NK:
                update(w_NK, groups, grad_NK, target_NK, keep, rate, range_rate, buffers)

    def result(self) -> QuantizedWeight:
        """Return the best quantisation that was remembered."""
        rows, width = self._weight.shape
        zero_N = self._all.best_zero_N
        return QuantizedWeight(
            settings=self._settings,
            codes=self._all.best_codes_NK.view(rows, width),
            scale=self._all.best_scale_N.view(rows, -1).to(self._scale_dtype),
            zero=None if zero_N is None else zero_N.view(rows, -1).to(torch.uint8),
        )

    def _read(self, rows: slice) -> Tensor:
        return self._weight[rows].view(-1, self._all.offset_NK.shape[1]).data


@functools.cache
def _update(bits: int, scale_dtype: torch.dtype, compiles: bool) -> Callable[..., Any]:
    """Return what takes a step of some groups, in place."""

    def update(
        w_NK: Tensor,
        groups: _Groups,
        gradient_NK: Tensor,
        target_NK: Tensor,
        keep: bool,
        rate: float,
        range_rate: float,
        buffers: Buffers,
    ) -> None:
        code, inside, ratio = _round(w_NK, groups, bits, buffers)
        if keep:
            _keep(groups, code, bits, buffers)
        grad = gradient_NK.float() if buffers[3] is None else buffers[3].copy_(gradient_NK)
        # d scale: sum of g * (q - (w / s) * [inside])
        inner = torch.mul(ratio, inside, out=buffers[0])
        by_scale_N = torch.sub(code, inner, out=buffers[0]).mul_(grad).sum(-1)
        ends_N = None if groups.zero_N is None else grad.sum(-1)
        grad = torch.mul(grad, inside, out=buffers[3])
        if ends_N is not None:
            ends_N -= grad.sum(-1)
        size_N = torch.abs(grad, out=buffers[1]).mean(-1).mul_(_FULL_STEP * bits).add_(_TINY)
        grad = grad.mul_((groups.scale_N.sign() / size_N).unsqueeze(-1)).clamp_(-1, 1).mul_(rate)
        groups.offset_NK.sub_(grad).clamp_(-_REACH, _REACH)
        _step_range(groups, by_scale_N, ends_N, range_rate, bits)
        _new_scale(groups, bits, scale_dtype)
        code, _, _ = _round(w_NK, groups, bits, buffers)
        target_NK.copy_(code.mul_(groups.scale_N.unsqueeze(-1)))

    return Compiled(update, dynamic=True, precise=True) if compiles else update


def _round(w_NK: Tensor, groups: _Groups, bits: int, buffers: Buffers) -> tuple[Tensor, Tensor, Tensor]:
    """Return centred codes, 1 where they are not at an end of their range and 0 elsewhere, weight / scale."""
    most = (1 << bits) - 1
    ratio = torch.div(w_NK, groups.scale_N.unsqueeze(-1), out=buffers[0])
    whole = torch.add(ratio, groups.offset_NK, out=buffers[1]).round_()
    if groups.zero_N is None:
        code = torch.clamp(whole, -(1 << bits - 1), (1 << bits - 1) - 1, out=buffers[2])
        inside = torch.add(code, 0.5, out=buffers[1])
    else:
        # Scalar bounds: torch clamps by tensors that are broadcast ten times as slowly.
        zero_N1 = groups.zero_N.unsqueeze(-1)
        code = torch.add(whole, zero_N1, out=buffers[2]).clamp_(0, most)
        inside = torch.sub(code, most / 2, out=buffers[1])
        code.sub_(zero_N1)
    return code, inside.abs_().lt_(most / 2), ratio


def _keep(groups: _Groups, code_NK: Tensor, bits: int, buffers: Buffers) -> None:
    zero: Tensor | int = 1 << bits - 1
    if groups.zero_N is not None and groups.best_zero_N is not None:
        zero = groups.zero_N.unsqueeze(-1)
        groups.best_zero_N.copy_(groups.zero_N)
    groups.best_scale_N.copy_(groups.scale_N)
    groups.best_codes_NK.copy_(torch.add(code_NK, zero, out=buffers[4]))


def _step_range(groups: _Groups, by_scale_N: Tensor, ends_N: Tensor | None, rate: float, bits: int) -> None:
    """Turn the gradient of the scales into that of the range's factors, and step."""
    low_end, high_end, scale = groups.low_N, groups.high_N, groups.scale_N
    if ends_N is None:
        # scale = +-max(-low a, high b) / 2**(bits - 1): only the larger side matters, both in a tie.
        below, above = -low_end * groups.low_factor_N, high_end * groups.high_factor_N
        signed = by_scale_N * scale.sign()
        towards_low = signed * -low_end * (below >= above)
        towards_high = signed * high_end * (above >= below)
    else:
        most = float((1 << bits) - 1)
        by_zero = -scale * ends_N
        # zero = round(-low / scale), scale = (high - low) / most
        low = low_end * groups.low_factor_N
        total = by_scale_N + by_zero * low / scale.square()
        towards_low = (-total / most - by_zero / scale) * low_end
        towards_high = total / most * high_end
    groups.low_factor_N.sub_(towards_low.sign_().mul_(rate)).clamp_(0, 1)
    groups.high_factor_N.sub_(towards_high.sign_().mul_(rate)).clamp_(0, 1)


def _new_scale(groups: _Groups, bits: int, scale_dtype: torch.dtype) -> None:
    low, high = groups.low_N * groups.low_factor_N, groups.high_N * groups.high_factor_N
    if groups.zero_N is None:
        groups.scale_N.copy_(symmetric_scale(low, high, bits, scale_dtype))
    else:
        scale, zero = asymmetric_scale(low, high, bits, scale_dtype)
        groups.scale_N.copy_(scale)
        groups.zero_N.copy_(zero)
