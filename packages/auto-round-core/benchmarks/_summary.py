"""What the cells come to: means over the seeds, standard errors, shares recovered, and tables of them."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from _cells import ROUNDED, TUNED, Cell
from measuring import table

Results = Mapping[str, Mapping[str, Any]]
"""By the cell's name: perplexity by kind of text, cpu_s, wall_s, peak_mb, made_with (versions)."""


def mean_and_error(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and its standard error, which a single value does not have."""
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
    return statistics.fmean(values), error


def recovered(rounded: float, value: float, floating: float) -> float:
    """How much of what rounding to nearest loses is won back: 1 is the float model, 0 is rounding."""
    return (rounded - value) / (rounded - floating)


def distinct(values: Sequence[Any]) -> list[Any]:
    """Each value once, in the order in which they come first."""
    return [value for place, value in enumerate(values) if value not in values[:place]]


def summarise(cells: Sequence[Cell], results: Results, floating: Mapping[str, float]) -> list[dict[str, Any]]:
    """Perplexity and the share recovered, by scheme, method and kind of calibration and evaluation text.

    The share is of the loss of plain rounding of the fp32 weights; where that cell was not run, of Intel's,
    who rounds them from bf16. ``baseline`` says which.
    """
    groups: dict[tuple[str, str, str], list[Cell]] = {}
    for cell in cells:
        if cell.name in results:
            groups.setdefault((cell.scheme, cell.kind, cell.method), []).append(cell)
    rows: list[dict[str, Any]] = []
    for (scheme, kind, method), members in groups.items():
        found = [results[cell.name] for cell in members]
        baseline = next((name for name in ROUNDED if f"{scheme}.{name}" in results), None)
        for evaluated, float_value in floating.items():
            values = [one["perplexity"][evaluated] for one in found]
            mean, error = mean_and_error(values)
            row: dict[str, Any] = {
                "scheme": scheme,
                "method": method,
                "calibration": kind,
                "evaluation": evaluated,
                "seeds": len(values),
                "perplexity": mean,
                "perplexity_error": error,
                "cpu_s": statistics.fmean(one["cpu_s"] for one in found),
                "peak_mb": max(one["peak_mb"] for one in found),
                "made_with": distinct([one.get("made_with") for one in found]),
            }
            if baseline is not None:
                rounded = results[f"{scheme}.{baseline}"]["perplexity"][evaluated]
                shares = [recovered(rounded, value, float_value) for value in values]
                row["recovered"], row["recovered_error"] = mean_and_error(shares)
                row["baseline"] = baseline
            rows.append(row)
    return rows


def with_error(row: Mapping[str, Any] | None, field: str, digits: int, factor: float = 1.0) -> str:
    """Such as ``17.31 ± 0.02``; nothing where there is no value, and no error where there was one seed."""
    if row is None or field not in row:
        return ""
    shown, error = f"{row[field] * factor:.{digits}f}", row[f"{field}_error"]
    return shown if error is None else f"{shown} ± {error * factor:.{digits}f}"


def show(rows: Sequence[dict[str, Any]], floating: Mapping[str, float]) -> str:
    """Two Markdown tables for each kind of evaluation text: perplexity, and the share recovered.

    A work folder may hold cells of several runs, with other versions of the packages; then these are said.
    """
    found = {(row["scheme"], row["method"], row["calibration"], row["evaluation"]): row for row in rows}
    lines = list(dict.fromkeys((row["scheme"], row["calibration"]) for row in rows if row["calibration"]))
    tuned_schemes = {scheme for scheme, _ in lines}
    lines += [(s, "") for s in dict.fromkeys(row["scheme"] for row in rows) if s not in tuned_schemes]
    parts: list[str] = []
    for evaluated, float_value in floating.items():
        perplexities: list[list[str]] = []
        shares: list[list[str]] = []
        for scheme, kind in lines:
            plain = [found.get((scheme, method, "", evaluated)) for method in ROUNDED]
            tuned = [found.get((scheme, method, kind, evaluated)) for method in TUNED]
            perplexities.append([scheme, kind, *(with_error(row, "perplexity", 3) for row in plain + tuned)])
            shares.append([scheme, kind, *(with_error(row, "recovered", 1, 100) for row in tuned)])
        parts += [
            f"Perplexity on held-out {evaluated} (float {float_value:.3f}), mean ± standard error\n",
            table(["scheme", "calibration", *ROUNDED, *TUNED], perplexities),
            f"\nShare recovered of what rounding loses on held-out {evaluated}, per cent\n",
            table(["scheme", "calibration", *TUNED], shares),
            "",
        ]
    for method in (*ROUNDED, *TUNED):
        made_with = distinct([one for row in rows if row["method"] == method for one in row["made_with"]])
        if len(made_with) > 1:
            said = [str(one) if one else "versions not recorded" for one in made_with]
            parts.append(f"Cells of {method} were not all made alike: {'; '.join(said)}")
    return "\n".join(parts)
