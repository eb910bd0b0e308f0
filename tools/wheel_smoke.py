"""Installs each built wheel alone into a fresh environment and tries what a user tries first.

For every wheel: install by exact version with the constraints file, import each public module, run `--help`
of each command. Packages that promise a light import are timed. Exit status: 0 where all went well, 1 where a
wheel failed, 2 where there is nothing to try.
"""

import argparse
import configparser
import os
import re
import shutil
import statistics
import subprocess
import sys
import time
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from packaging.utils import parse_wheel_filename

__all__ = ["Wheel", "heavy_imports", "import_seconds", "read_wheel", "slowest_imports"]

ROOT = Path(__file__).resolve().parent.parent
LIGHT = ("av_memory", "hamerspace")
HEAVY = ("tensorflow", "torch")
LIGHT_SECONDS = 0.3
ROUNDS = 7

# Stands in for a heavy library whether it is installed or not, and records that its code was asked to run. A
# mere look whether it is there, through importlib.util.find_spec, records nothing.
WATCH = """
import importlib.abc, importlib.machinery, sys
class Watch(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name, path=None, target=None):
        return importlib.machinery.ModuleSpec(name, self) if name in {heavy!r} else None
    def exec_module(self, module):
        print(module.__name__)
sys.meta_path.insert(0, Watch())
import {module}
"""


class SmokeError(Exception):
    """A wheel did not do what it must."""


@dataclass(frozen=True, kw_only=True)
class Wheel:
    path: Path
    name: str
    version: str
    modules: tuple[str, ...]
    """Public modules, packages included."""
    commands: tuple[str, ...]


def read_wheel(path: Path) -> Wheel:
    name, version, _, _ = parse_wheel_filename(path.name)
    with zipfile.ZipFile(path) as archive:
        files = archive.namelist()
        entries = [file for file in files if file.endswith(".dist-info/entry_points.txt")]
        # Entry point names may hold colons, and their case counts.
        parser = configparser.ConfigParser(delimiters=("=",), interpolation=None)
        parser.optionxform = str  # pyright: ignore[reportAttributeAccessIssue]: the documented way to keep case
        for entry in entries:
            parser.read_string(archive.read(entry).decode())
    sources = [file.removesuffix(".py").split("/") for file in files if file.endswith(".py")]
    dotted = [".".join(parts[:-1] if parts[-1] == "__init__" else parts) for parts in sources]
    return Wheel(
        path=path,
        name=name,
        version=str(version),
        modules=tuple(sorted(m for m in dotted if not any(part.startswith("_") for part in m.split(".")))),
        commands=tuple(parser["console_scripts"]) if parser.has_section("console_scripts") else (),
    )


def run(command: Sequence[str | Path], cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """The finished process; SmokeError with the last lines of its output where it failed."""
    # One thread, as in the test suites; and nothing of the caller's Python leaks in.
    leaks = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")
    environment = {k: v for k, v in os.environ.items() if k not in leaks} | {"OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)
    if result.returncode:
        lines = (result.stdout + result.stderr).strip().splitlines()
        shown = " ".join(str(part) for part in command)
        raise SmokeError("\n    ".join([f"exit status {result.returncode} from: {shown}", *lines[-12:]]))
    return result


def import_seconds(python: Path, module: str) -> float:
    """Median wall time of importing `module`, over fresh processes, the interpreter's start not counted."""
    code = f"import time; t = time.perf_counter(); import {module}; print(time.perf_counter() - t)"
    return statistics.median(float(run([python, "-I", "-c", code]).stdout) for _ in range(ROUNDS))


def heavy_imports(python: Path, module: str) -> list[str]:
    """Those of HEAVY that importing `module` loads, found whether they are installed or not."""
    return run([python, "-I", "-c", WATCH.format(heavy=HEAVY, module=module)]).stdout.split()


def slowest_imports(python: Path, module: str, count: int = 5) -> list[tuple[float, str]]:
    """Milliseconds that the slowest modules take for themselves while `module` is imported."""
    listing = run([python, "-I", "-X", "importtime", "-c", f"import {module}"]).stderr
    rows = re.findall(r"import time:\s+(\d+) \|\s+\d+ \|\s+(\S+)", listing)
    return sorted(((int(micros) / 1000, name) for micros, name in rows), reverse=True)[:count]


def install(wheel: Wheel, wheels: list[Wheel], environment: Path, options: argparse.Namespace) -> Path:
    """A fresh environment with `wheel` and what it needs; returns its interpreter."""
    uv: str = options.uv
    run([uv, "venv", "--quiet", "--clear", "--python", sys.executable, environment])
    python = environment / "bin" / "python"
    command: list[str | Path] = [uv, "pip", "install", "--quiet", "--python", python]
    command += ["--find-links", options.dist]
    for constraint in (options.dist / "constraints.txt", *options.constraint):
        command += ["--constraint", constraint]
    # uv keeps what it found in a --find-links folder by name and version, and would install an earlier build.
    for one in wheels:
        command += ["--refresh-package", one.name]
    run([*command, f"{wheel.name}=={wheel.version}"])
    return python


def foreign_files(wheel: Wheel, environment: Path) -> list[str]:
    """Files of an installed distribution that are not those of `wheel`; none where it is not installed.

    Some of the names belong to others on the public index, so an installer may have taken theirs.
    """
    (site,) = environment.glob("lib/python*/site-packages")
    with zipfile.ZipFile(wheel.path) as archive:
        # What auditwheel writes has entries of folders too.
        files = [file for file in archive.namelist() if not file.endswith(("/RECORD", "/"))]
        if not any((site / file).parent.exists() for file in files if file.endswith("/METADATA")):
            return []
        return [f for f in files if not (site / f).exists() or (site / f).read_bytes() != archive.read(f)]


def try_wheel(wheel: Wheel, wheels: list[Wheel], environment: Path, options: argparse.Namespace) -> None:
    start = time.perf_counter()
    python = install(wheel, wheels, environment, options)
    for one in wheels:
        if found := foreign_files(one, environment):
            raise SmokeError(f"what was installed as {one.name} is not {one.path.name}: {found[0]} differs")
    installed = time.perf_counter() - start
    # A backend module is the one place that may import hamerspace, which this environment lacks.
    modules = [name for name in wheel.modules if not name.endswith(".hamerspace_backend")]
    run([python, "-I", "-c", "\n".join(f"import {name}" for name in modules)], cwd=environment)
    for command in wheel.commands:
        if not run([environment / "bin" / command, "--help"], cwd=environment).stdout.strip():
            raise SmokeError(f"{command} --help prints nothing")
    total = time.perf_counter() - start
    counts = f"{len(modules)} modules, {len(wheel.commands)} commands"
    print(f"{wheel.name} {wheel.version}: {counts}, installed in {installed:.1f} s, {total:.1f} s in all")
    for module in set(LIGHT) & set(modules):
        check_light(python, module)


def check_light(python: Path, module: str) -> None:
    """Print how long importing `module` takes; SmokeError where it is slow or loads a heavy library."""
    seconds = import_seconds(python, module)
    print(f"  import {module}: median of {ROUNDS} {seconds:.3f} s; the slowest parts in ms:")
    for millis, name in slowest_imports(python, module):
        print(f"    {millis:7.1f} {name}")
    if found := heavy_imports(python, module):
        raise SmokeError(f"import {module} loads {', '.join(found)}")
    if seconds >= LIGHT_SECONDS:
        raise SmokeError(f"import {module} takes {seconds:.3f} s; {LIGHT_SECONDS} s are allowed")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--dist", type=Path, default=ROOT / "dist", help="folder with wheels and constraints.txt"
    )
    parser.add_argument(
        "--constraint", type=Path, action="append", default=[], help="one more constraints file"
    )
    parser.add_argument(
        "--only", action="append", default=[], help="try this distribution only; may be repeated"
    )
    parser.add_argument("--uv", default="uv", help="the uv to use")
    # Inside the checkout, so that uv can hard-link from a cache on the same file system.
    parser.add_argument(
        "--work", type=Path, default=ROOT / "build" / "smoke", help="folder for the environments"
    )
    options = parser.parse_args(arguments)
    options.dist, options.work = options.dist.resolve(), options.work.resolve()
    wheels = [read_wheel(path) for path in sorted(options.dist.glob("*.whl"))]
    unknown = set(options.only) - {wheel.name for wheel in wheels}
    if not wheels or unknown or not (options.dist / "constraints.txt").exists():
        lacking = (
            f"no wheel of {', '.join(sorted(unknown))}" if unknown else "no wheels with a constraints.txt"
        )
        print(f"error: {options.dist} has {lacking}; 'make wheels' builds them", file=sys.stderr)
        return 2
    if shutil.which(options.uv) is None:
        print(f"error: {options.uv} is not there; name a uv with --uv", file=sys.stderr)
        return 2
    failures = 0
    for wheel in wheels:
        if options.only and wheel.name not in options.only:
            continue
        try:
            try_wheel(wheel, wheels, options.work / wheel.name, options)
        except SmokeError as error:
            failures += 1
            print(f"{wheel.name} {wheel.version}: FAILED: {error}")
        finally:
            shutil.rmtree(options.work / wheel.name, ignore_errors=True)
    print(f"{len(wheels) if not options.only else len(set(options.only))} wheels tried, {failures} failed")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
