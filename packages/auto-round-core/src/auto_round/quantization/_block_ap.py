"""Training of weights and scales, for `quality="best"`: Block-AP in units of the scale.

Source: Chen et al., "EfficientQAT: Efficient Quantization-Aware Training for Large Language Models"
(arXiv 2407.11062), whose first phase trains all weights and quantisation parameters of a block with Adam
against the block's own float output. It differs here in three ways, all so that one learning rate fits every
layer and every format of integers can hold the result: weights are trained as `u = w / scale`, in units of
the first scale; scales relative to it, and rounded to the dtype in which they are stored; zero points stay as
they are. Norms stay as they are too. And the first scales are searched for, where the paper takes the range.

    q = round(u)          centred codes, u being held within their range; the weight becomes scale * q

The gradients (straight through the rounding) and the steps of Adam are written out, in one pass over pieces
that stay in the processor's cache. `torch.compile` can make one loop of the same lines.
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
from auto_round.quantization._growth import FIRST, SECOND, TINY, corrections, grown_scale, step_growth
from auto_round.quantization._pieces import Buffers, Scratch, opened, part
from auto_round.quantization._quantized import QuantizedWeight
from auto_round.quantization._rtn import quantize_optimized_rtn

_REACH = 0.49
"""How far beyond the last code a weight may go; half would round to the next, which is none."""


class _Groups(NamedTuple):
    """What is known of N groups of K values: what is trained, what Adam remembers, and what was best."""

    start_N: Tensor
    zero_N: Tensor | None
    u_NK: Tensor
    mean_NK: Tensor
    square_NK: Tensor
    growth_N: Tensor
    growth_mean_N: Tensor
    growth_square_N: Tensor
    scale_N: Tensor
    best_codes_NK: Tensor
    best_scale_N: Tensor

    def at(self, groups: slice) -> _Groups:
        return _Groups(*(None if tensor is None else part(tensor, groups) for tensor in self))  # pyright: ignore


class IntegerBlockAP:
    """The trained quantisation of one matrix of weights.

    Letters: R rows, G groups of a row, N groups of all or of some rows, K values of a group.

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
        self._shape = tuple(weight.shape)
        # The scales with the least error of the weights alone: from those of the whole range training has to
        # make up for more of the rounding, and what it learns for that is the calibration's own.
        start = quantize_optimized_rtn(weight, settings, scale_dtype, weight.new_ones(weight.shape[1]))
        start_N = start.scale.float().flatten()
        zero_N = None if start.zero is None else start.zero.float().flatten()
        u_NK = grouped(weight, settings.group_size).flatten(0, 1).div_(start_N.unsqueeze(-1))
        self._all = _Groups(
            start_N=start_N,
            zero_N=zero_N,
            u_NK=u_NK,
            mean_NK=torch.zeros_like(u_NK),
            square_NK=torch.zeros_like(u_NK),
            growth_N=torch.zeros_like(start_N),
            growth_mean_N=torch.zeros_like(start_N),
            growth_square_N=torch.zeros_like(start_N),
            scale_N=start_N.clone(),
            best_codes_NK=torch.empty_like(u_NK, dtype=torch.uint8),
            best_scale_N=start_N.clone(),
        )
        pieces = scratch.pieces(self._shape, u_NK.shape[1])
        self._parts = [(piece, self._all.at(piece.groups)) for piece in pieces]
        for _, groups in self._parts:
            _hold(groups, settings.bits)
        self._steps = 0

    def write(self, target: Tensor, *, keep: bool = False) -> None:
        """Write the quantised weight as it stands into `target` [R, G*K]; `keep` remembers it as best."""
        for piece, groups in self._parts:
            buffers = self._scratch.buffers(groups.u_NK)
            code = torch.round(groups.u_NK, out=buffers[0])
            if keep:
                _keep(groups, code, self._settings.bits, buffers)
            with opened(target, piece) as target_NK:
                target_NK.copy_(code.mul_(groups.scale_N.unsqueeze(-1)))

    def step(self, gradient: Tensor, target: Tensor, factor: float, *, keep: bool) -> None:
        """Take a step of Adam and write the new weight.

        Args:
            gradient: Of the loss with respect to the weight that was last written, [R, G*K].
            target: Where the new weight goes, [R, G*K].
            factor: What is left of the rates at this step of the schedule.
            keep: Remember the weight as it was before the step.
        """
        self._steps += 1
        more, root = corrections(self._steps)
        rate, scale_rate = factor * more * self._rate, factor * more * self._scale_rate
        update = _update(self._settings.bits, self._scale_dtype, self._scratch.compiles)
        for piece, groups in self._parts:
            buffers = self._scratch.buffers(groups.u_NK)
            grad_NK = gradient[piece.rows].reshape(groups.u_NK.shape).data
            with opened(target, piece) as target_NK:
                update(groups, grad_NK, target_NK, keep, rate, scale_rate, root, buffers)

    def result(self) -> QuantizedWeight:
        """Return the best quantisation that was remembered."""
        rows, width = self._shape
        zero_N = self._all.zero_N
        return QuantizedWeight(
            settings=self._settings,
            codes=self._all.best_codes_NK.view(rows, width),
            scale=self._all.best_scale_N.view(rows, -1).to(self._scale_dtype),
            zero=None if zero_N is None else zero_N.view(rows, -1).to(torch.uint8),
        )


@functools.cache
def _update(bits: int, scale_dtype: torch.dtype, compiles: bool) -> Callable[..., Any]:
    """Return what takes a step of some groups, in place."""

    def update(
        groups: _Groups,
        gradient_NK: Tensor,
        target_NK: Tensor,
        keep: bool,
        rate: float,
        scale_rate: float,
        root: float,
        buffers: Buffers,
    ) -> None:
        code = torch.round(groups.u_NK, out=buffers[0])
        if keep:
            _keep(groups, code, bits, buffers)
        grad = gradient_NK.float() if buffers[1] is None else buffers[1].copy_(gradient_NK)
        by_scale_N = code.mul_(grad).sum(-1)
        # The scale's size is the same for all values of a group but for slow changes, and Adam is blind to
        # such a factor; its sign is what counts.
        grad = grad.mul_(groups.scale_N.sign().unsqueeze(-1))
        groups.mean_NK.lerp_(grad, 1 - FIRST)
        groups.square_NK.mul_(SECOND).addcmul_(grad, grad, value=1 - SECOND)
        size = torch.sqrt(groups.square_NK, out=buffers[0]).div_(root).add_(TINY)
        groups.u_NK.sub_(torch.div(groups.mean_NK, size, out=buffers[0]).mul_(rate))
        _hold(groups, bits)
        step_growth(
            groups.growth_N,
            groups.growth_mean_N,
            groups.growth_square_N,
            by_scale_N * groups.start_N,
            rate=scale_rate,
            root=root,
        )
        groups.scale_N.copy_(grown_scale(groups.start_N, groups.growth_N, scale_dtype))
        code = torch.round(groups.u_NK, out=buffers[0])
        target_NK.copy_(code.mul_(groups.scale_N.unsqueeze(-1)))

    return Compiled(update, dynamic=True, precise=True) if compiles else update


def _hold(groups: _Groups, bits: int) -> None:
    """Keep weights where they round to codes, so that all get a gradient and none is lost outside."""
    if groups.zero_N is None:
        groups.u_NK.clamp_(-(1 << bits - 1) - _REACH, (1 << bits - 1) - 1 + _REACH)
    else:
        # Scalar bounds: torch clamps by tensors that are broadcast ten times as slowly.
        zero_N1 = groups.zero_N.unsqueeze(-1)
        groups.u_NK.add_(zero_N1).clamp_(-_REACH, (1 << bits) - 1 + _REACH).sub_(zero_N1)


def _keep(groups: _Groups, code_NK: Tensor, bits: int, buffers: Buffers) -> None:
    zero = 1 << bits - 1 if groups.zero_N is None else groups.zero_N.unsqueeze(-1)
    groups.best_codes_NK.copy_(torch.add(code_NK, zero, out=buffers[2]))
    groups.best_scale_N.copy_(groups.scale_N)
