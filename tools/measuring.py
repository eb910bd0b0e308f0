"""How benchmarks measure: variants interleaved in one run, medians over rounds, and what they ran on.

Times are process CPU seconds, which on a busy machine vary far less than wall time; the wall median is
kept beside them. Used by ``packages/*/benchmarks`` (``make bench`` puts this folder on the path).
"""

from __future__ import annotations

import argparse
import gc
import importlib.metadata
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Timing:
    """Medians over the rounds of one variant, in seconds a call."""

    cpu_s: float
    wall_s: float
    rounds: int
    cpu_spread: float
    """Largest less smallest CPU time, as a share of the median."""


def interleave(
    variants: Mapping[str, Callable[[], object]], *, rounds: int = 7, calls: int = 1
) -> dict[str, Timing]:
    """Time each variant in turn, ``rounds`` times over, after one round that is not counted.

    Args:
        variants: what to run, by name; each does ``calls`` units of work.
        rounds: at least 5.
        calls: units by which the times are divided.
    """
    if rounds < 5:
        raise ValueError(f"rounds is {rounds}; a median wants at least 5")
    cpu: dict[str, list[float]] = {name: [] for name in variants}
    wall: dict[str, list[float]] = {name: [] for name in variants}
    for round_number in range(rounds + 1):
        for name, variant in variants.items():
            gc.collect()
            wall_start, cpu_start = time.perf_counter(), time.process_time()
            variant()
            cpu_s, wall_s = time.process_time() - cpu_start, time.perf_counter() - wall_start
            if round_number > 0:
                cpu[name].append(cpu_s / calls)
                wall[name].append(wall_s / calls)
    return {
        name: Timing(
            statistics.median(cpu[name]),
            statistics.median(wall[name]),
            rounds,
            (max(cpu[name]) - min(cpu[name])) / statistics.median(cpu[name]),
        )
        for name in variants
    }


def environment(distributions: Sequence[str]) -> dict[str, Any]:
    """The machine, its load and the versions a result holds for."""
    cpu_info = Path("/proc/cpuinfo")
    lines = cpu_info.read_text().splitlines() if cpu_info.exists() else []
    fields = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    flags = fields.get("flags", "").split()
    return {
        "python": platform.python_version(),
        "system": platform.platform(),
        "processor": fields.get("model name", platform.processor()),
        "processor_flags": [flag for flag in flags if flag.startswith(("avx", "amx", "fma"))],
        "cores": os.cpu_count(),
        "load_average": os.getloadavg(),
        "versions": {name: importlib.metadata.version(name) for name in distributions},
    }


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A Markdown table."""
    lines = [list(header), ["---"] * len(header), *[[str(cell) for cell in row] for row in rows]]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def parse_arguments(description: str) -> argparse.Namespace:
    """The options that every benchmark has: ``--rounds`` and ``--json``."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--rounds", type=int, default=7, help="rounds to take the median of (default 7)")
    parser.add_argument("--json", type=Path, help="where to write the results (default: results/ beside it)")
    return parser.parse_args()


def write_results(script: str, path: Path | None, results: Mapping[str, Any]) -> Path:
    """Write plain data as JSON; by default to ``results/<script>.json`` beside the benchmark."""
    target = path or Path(script).parent / "results" / (Path(script).stem + ".json")
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(results, indent=1) + "\n")
    return target
