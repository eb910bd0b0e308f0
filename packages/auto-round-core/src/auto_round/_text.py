"""Names, sizes, times and figures as people read them, on a terminal and on a page."""

from __future__ import annotations

import math


def printable(text: str, most: int = 200) -> str:
    """Return a text on one line of at most `most` characters, control characters spelt out.

    A name comes from a checkpoint, and must neither steer a terminal nor turn the direction of what is
    beside it.
    """
    if len(text) > most:
        text = text[: most - 3] + "..."
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def count(number: int, name: str) -> str:
    """Return a number with the name of what is counted: `1 layer`, `2,048 layers`."""
    return f"{number:,} {name}" + ("" if number == 1 else "s")


def figure(value: float | None, digits: int = 3) -> str:
    """Return a number with so many digits that count; `-` where there is none, `NaN` and `inf` as such."""
    if value is None:
        return "-"
    if math.isnan(value):
        return "NaN"
    return f"{value:.{digits}g}"


def duration(seconds: float) -> str:
    """Return a time: `0.4 s`, `12.3 s`, `4 min 05 s`, `1 h 07 min`, `2 d 03 h`."""
    if not math.isfinite(seconds):
        return "unknown time"
    if seconds < 59.95:
        return f"{max(seconds, 0.0):.1f} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    minutes = round(seconds / 60)
    if minutes < 1440:
        return f"{minutes // 60} h {minutes % 60:02d} min"
    hours = round(seconds / 3600)
    return f"{hours // 24} d {hours % 24:02d} h"


def megabytes(size_mb: float) -> str:
    """Return a size, given in MB of 2**20 bytes: `412 MB`, from 10,000 MB on `12.5 GB`."""
    if not math.isfinite(size_mb):
        return "unknown size"
    return f"{size_mb:,.0f} MB" if size_mb < 10_000 else f"{size_mb / 1024:,.1f} GB"


def recovered(before: float | None, after: float | None) -> float | None:
    """Return the share of a loss that is gone, negative where it grew; None where that is no number."""
    if before is None or after is None or not (math.isfinite(before) and math.isfinite(after)) or before <= 0:
        return None
    share = 1 - after / before
    return share if math.isfinite(share) else None
