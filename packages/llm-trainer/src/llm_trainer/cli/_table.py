"""Results for people: names and values in two columns."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, cast

import typer


def print_table(title: str, rows: Mapping[str, object]) -> None:
    """Print a title and the rows that have a value, the values under one another."""
    kept = {name: value for name, value in rows.items() if value is not None}
    width = max(map(len, kept), default=0)
    typer.echo(title)
    for name, value in kept.items():
        typer.echo(f"  {name:<{width}}  {_number(value)}")


def duration(seconds: float) -> str:
    """Return a time for reading, such as `3 min 5 s`."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def finite(value: Any) -> Any:
    """Return plain values with None for the numbers that JSON does not know."""
    if isinstance(value, Mapping):
        return {name: finite(item) for name, item in cast("Mapping[str, Any]", value).items()}
    if isinstance(value, list):
        return [finite(item) for item in cast("list[Any]", value)]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _number(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.4g}" if abs(value) < 1000 else f"{value:,.0f}"
    return str(value)
