"""CPU seconds that tuning takes: ours and Intel's auto-round, as they ship (compiled) and without compiling.

The same small Llama, windows and 200 iterations, one thread; rounds interleaved, each in fresh processes.
What counts begins before ``AutoRound(...)`` and ends after ``quantize()``: imports and saving are left out on
both sides, and so is reading the model on Intel's alone. The first compiled run of each, which fills the
compiler's cache, is shown by itself and does not enter the median. Run with
``AV_DATA=... make bench P=auto-round-core``.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from _cells import Cell, intel_python, quantize, versions
from _small_llama import data_folder, default_work, prepare
from measuring import environment, table, write_results

VARIANTS = {"ours": ("ours-200", True), "Intel, compiled": ("intel-200", True),
            "ours, eager": ("ours-200", False), "Intel, eager": ("intel-200", False),
            "ours, best": ("ours-best", True)}  # fmt: skip
"""Name, method and whether it compiles."""


def parse(given: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=default_work(), help="where the model is kept")
    parser.add_argument("--data", type=Path, help="the folder that holds wikitext-2 (default: AV_DATA)")
    parser.add_argument("--rounds", type=int, default=5, help="rounds to take the median of (default 5)")
    parser.add_argument(
        "--only", nargs="*", choices=list(VARIANTS), default=list(VARIANTS), help="variants to run"
    )
    parser.add_argument("--bits", type=int, default=4, help="(default 4)")
    parser.add_argument("--group-size", type=int, default=128, help="(default 128)")
    parser.add_argument("--peer-python", type=Path, help="a Python that has Intel's auto-round 0.16")
    parser.add_argument("--json", type=Path, help="where to write the results (default: results/ beside it)")
    return parser.parse_args(given)


def summarise(runs: dict[str, list[dict[str, float]]]) -> dict[str, dict[str, float]]:
    """Medians over the rounds, and the spread of the CPU seconds as a share of theirs."""
    found: dict[str, dict[str, float]] = {}
    for name, members in runs.items():
        cpu = [run["cpu_s"] for run in members]
        median = statistics.median(cpu)
        found[name] = {
            "cpu_s": median,
            "wall_s": statistics.median(run["wall_s"] for run in members),
            "peak_mb": max(run["peak_mb"] for run in members),
            "cpu_spread": (max(cpu) - min(cpu)) / median,
            "rounds": len(members),
        }
    return found


def main() -> None:
    arguments = parse()
    work: Path = arguments.work
    work.mkdir(parents=True, exist_ok=True)
    model = prepare(work, data_folder(arguments.data))
    peer = intel_python(arguments.peer_python, work)
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in arguments.only}

    with tempfile.TemporaryDirectory(dir=work) as scratch:
        # A cache of its own, empty at first, so that the first compiled run is one.
        folder = Path(scratch, "runs")
        folder.mkdir()

        def once(name: str) -> dict[str, Any]:
            method, compiled = VARIANTS[name]
            cell = Cell(
                bits=arguments.bits,
                group_size=arguments.group_size,
                symmetric=True,
                method=method,
                kind="code",
            )
            python = peer if method.startswith("intel") else None
            place = Path(tempfile.mkdtemp(dir=folder))
            found = quantize(
                cell.task(model, compiled=compiled),
                python=python,
                folder=place,
                log=folder / "run.log",
                cache=Path(scratch, "compiled"),
            )
            shutil.rmtree(place)
            print(f"{name}: {found['cpu_s']:.1f} CPU s, {found['wall_s']:.1f} s", flush=True)
            return found

        first = {name: once(name) for name in arguments.only if VARIANTS[name][1]}
        for _ in range(arguments.rounds):
            for name in arguments.only:
                runs[name].append(once(name))
    found = summarise(runs)
    ours = found.get("ours", {}).get("cpu_s")
    rows = [
        [
            name,
            f"{row['cpu_s']:.1f}",
            f"{row['cpu_s'] / ours:.2f}" if ours else "",
            f"{row['wall_s']:.1f}",
            f"{row['peak_mb']:.0f}",
            f"{row['cpu_spread']:.0%}",
        ]
        for name, row in found.items()
    ]
    header = ["variant", "CPU s", "against ours", "wall s", "peak MB", "spread of CPU s"]
    print("\n" + table(header, rows))
    for name, run in first.items():
        print(f"\n{name}, the first time: {run['cpu_s']:.1f} CPU s, {run['wall_s']:.1f} s")
    facts = json.loads((model / "recipe.json").read_text())
    target = write_results(__file__, arguments.json, {
        "model": facts, "bits": arguments.bits, "group_size": arguments.group_size, "medians": found,
        "runs": runs, "first_compiled": first,
        "peers": {"intel": versions(peer, ["auto-round", "torch", "transformers"])},
        "environment": environment(["auto-round-core", "torch", "transformers"]),
    })  # fmt: skip
    print(f"written to {target}")


if __name__ == "__main__":
    main()
