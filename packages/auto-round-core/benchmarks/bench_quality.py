"""Perplexity after round-to-nearest, Intel's auto-round and ours, at 2, 3 and 4 bits.

Every cell, that is a scheme, a method, a kind of calibration text and a seed, is one file in the work folder,
so that a run that was stopped goes on where it was. All methods get the same 128 windows of 256 tokens, which
differ from seed to seed; all are evaluated in fp32 by one evaluator, on files that neither the training nor
the calibration has seen. With 208 cells at about two minutes of one core each, a whole run takes some seven
hours; ``--only`` and ``--jobs`` choose less and faster.
Run with ``AV_DATA=... make bench P=auto-round-core``.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from _cells import Cell, all_cells, chosen, evaluate, intel_python, quantize, versions, write_json
from _small_llama import KINDS, SEEDS, data_folder, default_work, prepare
from _summary import show, summarise
from measuring import environment, write_results


def parse(given: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    option = parser.add_argument
    option("--work", type=Path, default=default_work(), help="folder that keeps the model and the cells")
    option("--data", type=Path, help="the folder that holds wikitext-2 (default: AV_DATA)")
    option("--only", nargs="*", default=[], metavar="PATTERN",
           help="cells to run, in this order, such as 'w2g32-*.intel-200.*.s0'")  # fmt: skip
    option("--jobs", type=int, default=1, help="cells at once, one thread each (default 1)")
    option("--peer-python", type=Path, help="a Python that has Intel's auto-round 0.16")
    option("--peer-compile", action="store_true", help="let Intel's package compile, as it ships")
    option("--table-only", action="store_true", help="run nothing; show the cells that are there")
    option("--json", type=Path, help="where to write the results (default: results/ beside it)")
    return parser.parse_args(given)


def run_cell(
    cell: Cell, model: Path, folder: Path, python: Path | None, made_with: dict[str, Any], *, compiled: bool
) -> None:
    """Quantise and evaluate in fresh processes, and keep what was found and what it was made with."""
    log = folder / f"{cell.name}.log"
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        measured = quantize(
            cell.task(model, compiled=compiled),
            python=python,
            folder=Path(scratch),
            log=log,
            cache=folder.parent / "compiled",
        )
        perplexity = evaluate(model, Path(scratch, "weights.safetensors"), log)
    found = {**measured, "perplexity": perplexity, "made_with": made_with}
    write_json(folder / f"{cell.name}.json", found)
    shown = ", ".join(f"{kind} {value:.3f}" for kind, value in found["perplexity"].items())
    print(f"{cell.name}: {shown}; {found['cpu_s']:.0f} CPU s", flush=True)


def main() -> None:
    arguments = parse()
    work: Path = arguments.work
    work.mkdir(parents=True, exist_ok=True)
    model = prepare(work, data_folder(arguments.data))
    folder = work / f"cells-{model.name}"
    folder.mkdir(exist_ok=True)
    cells = all_cells(KINDS, SEEDS)
    wanted = [] if arguments.table_only else chosen(cells, arguments.only)
    float_file = folder / "float.json"
    if not float_file.is_file():
        write_json(float_file, evaluate(model, None, folder / "float.log"))
    floating: dict[str, float] = json.loads(float_file.read_text())
    print(", ".join(f"float, {kind}: {value:.3f}" for kind, value in floating.items()), flush=True)
    peer = intel_python(arguments.peer_python, work)
    files = {cell.name: folder / f"{cell.name}.json" for cell in cells}
    machine = environment(["auto-round-core", "torch", "transformers", "tokenizers"])
    theirs = versions(peer, ["auto-round", "torch", "transformers"])
    made_with = {
        None: {name: machine["versions"][name] for name in ("auto-round-core", "torch", "transformers")},
        peer: {**theirs, "compiled": arguments.peer_compile},
    }
    with ThreadPoolExecutor(max_workers=arguments.jobs) as pool:
        runs = [
            pool.submit(
                run_cell,
                cell,
                model,
                folder,
                python,
                made_with[python],
                compiled=python is None or arguments.peer_compile,
            )
            for cell in wanted
            if not files[cell.name].is_file()
            for python in [peer if cell.method.startswith("intel") else None]
        ]
        try:
            for run in as_completed(runs):
                run.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    results = {name: json.loads(path.read_text()) for name, path in files.items() if path.is_file()}
    rows = summarise(cells, results, floating)
    print("\n" + show(rows, floating))
    found: dict[str, Any] = {
        "model": json.loads((model / "recipe.json").read_text()),
        "float": floating,
        "rows": rows,
        "cells": results,
        "peers": {"intel": theirs},
        "environment": machine,
    }
    print(f"written to {write_results(__file__, arguments.json, found)}")


if __name__ == "__main__":
    main()
