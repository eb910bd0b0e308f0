"""Where the ticks of an axis are, and what they say."""

from __future__ import annotations

import math

_LEAST_TOP_MB = 0.01
_LONG_STEPS_S = (60, 120, 300, 600, 1200, 1800, 3600, 7200, 14400, 28800, 43200, 86400)


def memory_ticks(top_mb: float, count: int = 5) -> list[tuple[float, str]]:
    """Round values from 0 to ``top_mb``, in GB from 2 GB on."""
    unit, name = (1024.0, "GB") if top_mb >= 2048 else (1.0, "MB")
    step = _round_step(top_mb / unit / count)
    digits = max(0, -math.floor(math.log10(step)))
    last = math.floor(top_mb / unit / step + 1e-9)
    return [(i * step * unit, f"{i * step:.{digits}f} {name}" if i else "0") for i in range(last + 1)]


def time_ticks(start_s: float, end_s: float, count: int = 7) -> list[tuple[float, str]]:
    """Round times from ``start_s`` to ``end_s``: milliseconds, seconds, minutes or hours."""
    step = _time_step((end_s - start_s) / count)
    first, last = math.ceil(start_s / step - 1e-9), math.floor(end_s / step + 1e-9)
    return [(i * step, _time_label(i * step, step, end_s)) for i in range(first, last + 1)]


def top_of(peak_mb: float, limits_mb: list[float]) -> float:
    """The upper end of the memory axis: above the peak, and above a limit that is near it."""
    near = [limit for limit in limits_mb if 0 < limit <= 1.6 * peak_mb]
    top_mb = max([peak_mb, *near, 0.0]) * 1.08
    # Below this nothing can be seen, and a logarithm of what rounds to 0 would fail.
    return top_mb if top_mb >= _LEAST_TOP_MB else 1.0


def _round_step(rough: float) -> float:
    power = 10.0 ** math.floor(math.log10(rough))
    return next(m * power for m in (1, 2, 5, 10) if m * power >= rough * (1 - 1e-9))


def _time_step(rough_s: float) -> float:
    if rough_s <= 5:
        return _round_step(rough_s)
    if rough_s <= 30:
        return next(step for step in (10.0, 15.0, 30.0) if step >= rough_s)
    long = next((float(step) for step in _LONG_STEPS_S if step >= rough_s), None)
    return long if long is not None else 86400.0 * math.ceil(rough_s / 86400)


def _time_label(time_s: float, step_s: float, end_s: float) -> str:
    if step_s >= 3600:
        return f"{time_s / 3600:.0f} h"
    if step_s >= 60:
        hours, minutes = divmod(round(time_s / 60), 60)
        return f"{hours} h {minutes:02d}" if hours else f"{minutes} min"
    if end_s < 1:
        return f"{time_s * 1e3:.{max(0, -math.floor(math.log10(step_s * 1e3) + 1e-9))}f} ms"
    return f"{time_s:.{max(0, -math.floor(math.log10(step_s) + 1e-9))}f} s"
