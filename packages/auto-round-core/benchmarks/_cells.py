"""A cell of the comparison: what it is called, how it is run in a fresh process, and Intel's environment."""

from __future__ import annotations

import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Final

HERE: Final = Path(__file__).resolve().parent
ITERATIONS: Final = 200
SCHEMES: Final = ((2, 32), (2, 64), (3, 128), (4, 128))
"""Bits and group size."""
ROUNDED: Final = ("rtn", "intel-rtn")
"""Methods that see neither calibration text nor a seed."""
TUNED: Final = ("intel-200", "ours-200", "ours-best", "ours-best-mixed")


@dataclass(frozen=True, kw_only=True, slots=True)
class Cell:
    """One model to make and to measure."""

    bits: int
    group_size: int
    symmetric: bool
    method: str
    kind: str = ""
    """Of the calibration text, code or prose; empty for the methods that read none."""
    seed: int = 0
    """Of the windows that are drawn for calibration, and of their order in tuning."""

    @property
    def scheme(self) -> str:
        """Such as ``w2g32-sym``."""
        return f"w{self.bits}g{self.group_size}-{'sym' if self.symmetric else 'asym'}"

    @property
    def name(self) -> str:
        """Such as ``w2g32-sym.intel-200.code.s0``, or ``w2g32-sym.rtn``."""
        return f"{self.scheme}.{self.method}" + (f".{self.kind}.s{self.seed}" if self.kind else "")

    def task(self, model: Path, *, compiled: bool) -> dict[str, Any]:
        """What the driver of either package is told, but for where to write."""
        tuned = self.method in TUNED
        return {
            "model": str(model),
            "windows": str(model / "windows.safetensors"),
            "calibration": f"calibration.{self.kind or 'code'}.{self.seed}",
            "bits": self.bits,
            "group_size": self.group_size,
            "symmetric": self.symmetric,
            "iters": ITERATIONS if tuned else 0,
            "seed": self.seed,
            "compile": compiled,
            "quality": "best" if "best" in self.method else "signround" if tuned else "rtn",
            "text": "mixed" if self.method.endswith("mixed") else "user",
        }


def all_cells(kinds: Sequence[str], seeds: Sequence[int]) -> list[Cell]:
    """Every cell, the seeds outermost, so that a run cut short has whole tables of fewer seeds."""

    def of(seed: int, *, first: bool) -> Iterator[Cell]:
        for bits, size in SCHEMES:
            for symmetric in (True, False):
                scheme: dict[str, Any] = {"bits": bits, "group_size": size, "symmetric": symmetric}
                if first:
                    yield from (Cell(**scheme, method=method) for method in ROUNDED)
                for kind in kinds:
                    yield from (Cell(**scheme, method=method, kind=kind, seed=seed) for method in TUNED)

    return [cell for seed in seeds for cell in of(seed, first=seed == seeds[0])]


def chosen(cells: Sequence[Cell], patterns: Sequence[str]) -> list[Cell]:
    """The cells whose names match a shell pattern, in the order of the patterns; all without any."""
    found: dict[Cell, None] = {}
    for pattern in patterns or ["*"]:
        matching = [cell for cell in cells if fnmatchcase(cell.name, pattern)]
        if not matching:
            raise SystemExit(f"no cell is called {pattern!r}; one is {cells[0].name!r}")
        found.update(dict.fromkeys(matching))
    return list(found)


def find_uv() -> str:
    """The ``uv`` on PATH, else the one that ``make`` put into the checkout."""
    inside = sorted(HERE.parents[2].glob(".uv/*/bin/uv"))
    found = shutil.which("uv") or (str(inside[-1]) if inside else None)
    if found is None:
        raise SystemExit("uv, which makes the environment of Intel's package, is neither on PATH nor in .uv/")
    return found


def intel_python(given: Path | None, work: Path) -> Path:
    """A Python that has Intel's auto-round 0.16, with our versions of torch and transformers.

    Made in the work folder with uv where none is given; the two packages share an import name and so cannot
    share an environment.
    """
    if given is not None:
        return given
    folder = work / "intel-environment"
    python, complete = folder / "bin" / "python", folder / "complete"
    if not complete.is_file():
        uv = find_uv()
        ours = {name: importlib.metadata.version(name).split("+")[0] for name in ("torch", "transformers")}
        wanted = ["auto-round==0.16.*", *(f"{name}=={version}" for name, version in ours.items())]
        subprocess.run(
            [uv, "venv", "--quiet", "--clear", "--python", sys.executable, str(folder)], check=True
        )
        subprocess.run([uv, "pip", "install", "--quiet", "--python", str(python), *wanted], check=True)
        complete.touch()
    return python


def versions(python: Path, names: Sequence[str]) -> dict[str, str]:
    """Versions of distributions in another environment."""
    code = "import importlib.metadata as m, sys; print(*map(m.version, sys.argv[1:]))"
    done = subprocess.run([str(python), "-I", "-c", code, *names], check=True, capture_output=True, text=True)
    return dict(zip(names, done.stdout.split(), strict=True))


def run_script(
    python: Path | str, arguments: Sequence[str], log: Path, folder: Path, **variables: str
) -> None:
    """Run a script with one thread in a folder of its own; where it fails, show the end of what it said."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **variables}
    with log.open("w") as output:
        command = [str(python), *arguments]
        done = subprocess.run(command, stdout=output, stderr=subprocess.STDOUT, cwd=folder, env=environment)
    if done.returncode != 0:
        raise SystemExit(f"{' '.join(arguments)} failed:\n{log.read_text()[-3000:]}")
    log.unlink(missing_ok=True)


def quantize(
    task: dict[str, Any], *, python: Path | None, folder: Path, log: Path, cache: Path
) -> dict[str, Any]:
    """Run a task in a fresh process: in Intel's environment if ``python`` is given, else in this one.

    Returns:
        ``cpu_s`` and ``wall_s`` of the tuning alone, ``peak_mb`` of the process, ``layers`` quantised.
        The weights lie in ``folder / "weights.safetensors"``. ``cache`` keeps what torch.compile made.
    """
    report, description = folder / "report.json", folder / "cell.json"
    described = {**task, "weights": str(folder / "weights.safetensors"), "report": str(report)}
    description.write_text(json.dumps(described))
    driver = [str(HERE / "_ours.py")] if python is None else ["-I", str(HERE / "_peer_intel.py")]
    arguments = [*driver, str(description)]
    run_script(python or sys.executable, arguments, log, folder, TORCHINDUCTOR_CACHE_DIR=str(cache))
    return json.loads(report.read_text())


def evaluate(model: Path, weights: Path | None, log: Path) -> dict[str, float]:
    """Perplexity by kind of text, of the float model or of one with some weights replaced."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.json")
        arguments = [str(HERE / "_evaluate.py"), str(model), str(weights or "-"), str(report)]
        run_script(sys.executable, arguments, log, Path(folder))
        return json.loads(report.read_text())


def write_json(path: Path, values: dict[str, Any]) -> None:
    """Under a temporary name first, so that a cell is there whole or not at all."""
    unfinished = path.with_suffix(f".{os.getpid()}.tmp")
    unfinished.write_text(json.dumps(values, indent=1) + "\n")
    unfinished.replace(path)
