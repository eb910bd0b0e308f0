"""Rounding to nearest, with the whole range of each group or with scales searched by importance."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from auto_round.config_manager import LayerSettings
from auto_round.exceptions import QuantizationError
from auto_round.quantization import _floats
from auto_round.quantization._grouping import grouped, row_chunks
from auto_round.quantization._integers import (
    asymmetric_scale,
    group_range,
    least_scale,
    round_to_codes,
    symmetric_scale,
)
from auto_round.quantization._quantized import QuantizedWeight, scale_values

_SEARCH_CHUNK = 1 << 18
_REFITS = 3


def quantize_rtn(weight: Tensor, settings: LayerSettings, scale_dtype: torch.dtype) -> QuantizedWeight:
    """Round weights `[out, in]` of any floating-point dtype to the nearest codes, with the whole range.

    `scale_dtype` is that of the scales of integers; the other formats have their own.

    Raises:
        QuantizationError: A weight is NaN or infinite, or `scale_dtype` cannot hold a scale.
        ConfigurationError: The groups do not divide the rows, or the format has other groups.
    """
    if settings.weight_dtype != "int":
        return _floats.quantize_float(weight, settings)
    with torch.no_grad():
        low, high = group_range(grouped(weight, settings.group_size))
        if settings.symmetric:
            scale, zero = symmetric_scale(low, high, settings.bits, scale_dtype), None
        else:
            scale, zero = asymmetric_scale(low, high, settings.bits, scale_dtype)
        return _encode(weight, settings, scale_dtype, scale, zero)


def quantize_optimized_rtn(
    weight: Tensor, settings: LayerSettings, scale_dtype: torch.dtype, importance: Tensor
) -> QuantizedWeight:
    """Round to nearest with scales that minimise, group by group, sum(importance * (weight - result)**2).

    `importance` is `[in]`: the mean square of what each input channel is given.

    The search begins with the plain rounding and takes only what is better, so that the result is never
    worse in this measure. It goes over ranges narrower and somewhat wider than the whole one (with either
    sign of the scale for symmetric integers, and each end by itself for asymmetric ones), and then refits
    each scale to the codes that it gives by least squares. Every scale is tried as it would be stored.

    The squares are float32: groups of weights that are all below some 1e-20 stay as plain rounding has them.
    Takes some 10 MB of memory beside the result.

    Raises:
        QuantizationError: As `quantize_rtn`, or `importance` is of another length, negative or not finite.
        ConfigurationError: As `quantize_rtn`.
    """
    plain = quantize_rtn(weight, settings, scale_dtype)
    importance = _relative(importance, weight.shape[1]).to(weight.device)
    weights_1GS = grouped(importance.unsqueeze(0), settings.group_size)
    scale, global_scale = plain.effective_scale().clone(), plain.global_scale
    zero = None if plain.zero is None else plain.zero.float()
    del plain  # and its codes
    with torch.no_grad():
        for rows in row_chunks(weight.shape[0], weight.shape[1], _SEARCH_CHUNK):
            search = _Search(
                w=grouped(weight[rows].float(), settings.group_size),
                importance=weights_1GS,
                scale=scale[rows],
                zero=None if zero is None else zero[rows],
                nearest=_nearest(settings),
                stored=_stored(settings, scale_dtype, global_scale),
            )
            if settings.weight_dtype != "int":
                _search_float(search, settings)
            elif zero is None:
                _search_symmetric(search, settings)
            else:
                _search_asymmetric(search, settings)
            search.refit()
            scale[rows] = search.scale
            if zero is not None and search.zero is not None:
                zero[rows] = search.zero
        if settings.weight_dtype == "int":
            return _encode(weight, settings, scale_dtype, scale, zero)
        stored = _floats.round_scale(scale, settings, global_scale)
        return _floats.encode(weight, settings, stored, global_scale)


class _Search:
    """The best scales so far of groups `[out, groups, size]`: what is tried is taken where it is better."""

    def __init__(
        self,
        *,
        w: Tensor,
        importance: Tensor,
        scale: Tensor,
        zero: Tensor | None,
        nearest: Callable[[Tensor, Tensor | None], Tensor],
        stored: Callable[[Tensor], Tensor],
    ) -> None:
        self.w, self.scale, self.zero = w, scale, zero
        self.stored, self._importance, self._nearest = stored, importance, nearest
        self._error = self._measure(scale, zero)

    def attempt(self, scale: Tensor, zero: Tensor | None = None) -> Tensor:
        """Try a scale for each group, and return where it was taken, bool `[out, groups]`."""
        scale = self.stored(scale)
        error = self._measure(scale, zero)
        better = error < self._error
        self._error = torch.where(better, error, self._error)
        self.scale = torch.where(better, scale, self.scale)
        if self.zero is not None and zero is not None:
            self.zero = torch.where(better, zero, self.zero)
        return better

    def refit(self) -> None:
        """Try the scale that is best for the elements that the best scale gives, and again from there."""
        for _ in range(_REFITS):
            elements = self._nearest(self.w / self.scale.unsqueeze(-1), self.zero)
            product = (elements * self.w).mul_(self._importance).sum(-1)
            square = elements.square_().mul_(self._importance).sum(-1)
            fitted = torch.where(square > 0, product / square, self.scale)
            if not bool(self.attempt(fitted, self.zero).any()):
                return

    def _measure(self, scale: Tensor, zero: Tensor | None) -> Tensor:
        step = scale.unsqueeze(-1)
        error = self._nearest(self.w / step, zero).mul_(step).sub_(self.w)
        return error.square_().mul_(self._importance).sum(-1)


def _search_symmetric(search: _Search, settings: LayerSettings) -> None:
    half = 2 ** (settings.bits - 1)
    whole = search.w.abs().amax(-1) / half
    # With the other sign the largest weight has only half - 1 steps, which takes a wider range.
    for factor in _factors(0.25, max(1.2, half / (half - 1)), 24):
        search.attempt(whole * factor)
        search.attempt(whole * -factor)


def _search_asymmetric(search: _Search, settings: LayerSettings) -> None:
    low, high = group_range(search.w)
    most = 2**settings.bits - 1

    def tried(new_low: Tensor, new_high: Tensor) -> Tensor:
        scale = search.stored((new_high - new_low) / most)
        return search.attempt(scale, (-new_low / scale).round_().clamp_(0, most))

    best_low, best_high = low, high
    for factor in _factors(0.3, 1.0, 15):
        better = tried(low * factor, high * factor)
        best_low = torch.where(better, low * factor, best_low)
        best_high = torch.where(better, high * factor, best_high)
    from_low, from_high = best_low, best_high
    for factor in _factors(0.4, 1.2, 13):
        best_low = torch.where(tried(from_low * factor, from_high), from_low * factor, best_low)
    for factor in _factors(0.4, 1.2, 13):
        tried(best_low, from_high * factor)


def _search_float(search: _Search, settings: LayerSettings) -> None:
    whole = _floats.full_scale(search.w.abs().amax(-1), settings)
    # mxfp4 has powers of two. The others reach to where the largest weight lands on 4 in place of 6.
    factors = [0.5, 1.0, 2.0] if settings.weight_dtype == "mxfp4" else _factors(0.5, 1.55, 22)
    for factor in factors:
        search.attempt(whole * factor)


def _factors(least: float, most: float, count: int) -> list[float]:
    return [least + (most - least) * index / (count - 1) for index in range(count)]


def _nearest(settings: LayerSettings) -> Callable[[Tensor, Tensor | None], Tensor]:
    """Return what rounds scaled weights `[out, groups, size]`, given zero points `[out, groups]`."""
    most, half = 2**settings.bits - 1, 2 ** (settings.bits - 1)

    def integers(units: Tensor, zero: Tensor | None) -> Tensor:
        if zero is None:
            return units.round_().clamp_(-half, half - 1)
        shift = zero.unsqueeze(-1)
        return units.round_().add_(shift).clamp_(0, most).sub_(shift)

    def floats(units: Tensor, _: Tensor | None) -> Tensor:
        return _floats.round_elements(units, settings.weight_dtype)

    return integers if settings.weight_dtype == "int" else floats


def _stored(
    settings: LayerSettings, scale_dtype: torch.dtype, global_scale: Tensor | None
) -> Callable[[Tensor], Tensor]:
    """Return what rounds float32 scales to such as can be stored."""
    least, most = least_scale(scale_dtype), torch.finfo(scale_dtype).max

    def integers(scale: Tensor) -> Tensor:
        magnitude = scale.abs().clamp_(least, most).to(scale_dtype).float()
        return torch.where(scale < 0, -magnitude, magnitude) if settings.symmetric else magnitude

    def floats(scale: Tensor) -> Tensor:
        stored = _floats.round_scale(scale, settings, global_scale)
        return scale_values(stored, settings, global_scale)

    return integers if settings.weight_dtype == "int" else floats


def _relative(importance: Tensor, width: int) -> Tensor:
    """Return importance in parts of its largest, float32, after checking it."""
    if importance.shape != (width,):
        raise QuantizationError(
            f"importance has shape {list(importance.shape)}; rows of {width} weights need [{width}]."
        )
    least, most = importance.double().aminmax()
    if not bool(least >= 0) or not bool(most.isfinite()):
        raise QuantizationError(
            f"importance reaches from {float(least):.4g} to {float(most):.4g}; it is a mean of squares, "
            "finite and not negative. NaN or infinity in it comes from the layer's inputs."
        )
    return (importance.double() / most.clamp_min(torch.finfo(torch.float64).tiny)).float()


def _encode(
    weight: Tensor, settings: LayerSettings, scale_dtype: torch.dtype, scale: Tensor, zero: Tensor | None
) -> QuantizedWeight:
    codes = torch.empty(weight.shape, dtype=torch.uint8, device=weight.device)
    for rows in row_chunks(*weight.shape):
        w = grouped(weight[rows], settings.group_size)
        codes[rows] = round_to_codes(
            w, scale[rows], None if zero is None else zero[rows], settings.bits
        ).flatten(1)
    return QuantizedWeight(
        settings=settings,
        codes=codes,
        scale=scale.to(scale_dtype),
        zero=None if zero is None else zero.to(torch.uint8),
    )
