"""``hamerspace optimize|benchmark|inspect|backends|report``.

Exit codes: 0 is done (and all constraints met), 1 says that a constraint is violated or undecided or that the
work failed, 2 that the command was misused.
"""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from hamerspace import __version__

if TYPE_CHECKING:
    from hamerspace.artifact import Manifest
    from hamerspace.measure import ModelMetrics
    from hamerspace.models.info import TensorSpec

# As Any, because click's generics leave the types of the two partly unknown.
option: Any = cast("Any", typer).Option
argument: Any = cast("Any", typer).Argument

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Compress a model under constraints. Each candidate is built, reloaded and measured.",
)

_Model = Annotated[Path, argument(help=".pt, .pt2, .onnx, .keras, .h5, a SavedModel or transformers folder")]
_Shape = Annotated[
    list[str] | None,
    option(
        "--shape", help="an input's shape, as 1,3,224,224 or name=1,64; 'n' for any length; once an input"
    ),
]
_Native = Annotated[
    bool,
    option("--allow-native", help="open a compiled model from elsewhere, which can do anything"),
]
_Json = Annotated[bool, option("--json", help="print JSON on standard output")]
_Pickle = Annotated[bool, option("--allow-pickle", help="read a pickled module, which can execute anything")]


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"hamerspace {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    _: Annotated[bool, option("--version", callback=_version, is_eager=True, help="say which")] = False,
    verbose: Annotated[bool, option("--verbose", "-v", help="say what is done")] = False,
) -> None:
    if verbose:
        import logging

        from hamerspace.utils import set_log_level

        set_log_level(logging.DEBUG)


_MISUSE = (FileNotFoundError, FileExistsError, IsADirectoryError, NotADirectoryError, PermissionError)
"""Errors of the operating system that are the caller's; others, such as a full disk, are failed work."""


@contextmanager
def _told() -> Generator[None]:
    """Turn errors of the package into a line on standard error and an exit code."""
    from hamerspace.exceptions import BackendError, HamerspaceError

    try:
        yield
    except KeyboardInterrupt:
        typer.echo("interrupted", err=True)
        raise typer.Exit(130) from None
    except (HamerspaceError, ValueError, OSError, ImportError) as error:
        typer.echo(f"error: {error}", err=True)
        misused = isinstance(error, _MISUSE) or not isinstance(error, (BackendError, OSError))
        raise typer.Exit(2 if misused else 1) from None


def _shapes(given: list[str] | None) -> Any:
    from hamerspace.exceptions import ConstraintError

    if not given:
        return None

    def lengths(text: str) -> list[int | None]:
        try:
            return [
                None if part.strip().lower() in ("n", "?", "none") else int(part) for part in text.split(",")
            ]
        except ValueError:
            raise ConstraintError(f"--shape {text!r} is no shape; write it as 1,3,224,224") from None

    if any("=" in one for one in given):
        if not all("=" in one for one in given):
            raise ConstraintError("either every --shape has a name or none has")
        return {name: lengths(text) for name, _, text in (one.partition("=") for one in given)}
    return [lengths(one) for one in given] if len(given) > 1 else lengths(given[0])


def _open(path: Path, shape: list[str] | None, *, allow_pickle: bool) -> Any:
    from hamerspace import Optimizer
    from hamerspace.models.reading import framework_of

    shapes = _shapes(shape)
    framework = framework_of(path)
    if framework == "pytorch":
        return Optimizer.from_pytorch(path, shapes, allow_pickle=allow_pickle)
    return (
        Optimizer.from_tensorflow(path, shapes)
        if framework == "tensorflow"
        else Optimizer.from_onnx(path, shapes)
    )


def _print_json(data: Any) -> None:
    from hamerspace.core.report import finite

    typer.echo(json.dumps(finite(data), indent=1, default=str))


@app.command()
def optimize(
    model: _Model,
    output: Annotated[
        Path, option("--output", "-o", help="where the model goes; its ending chooses the form")
    ],
    goal: Annotated[str, option(help="quantize, prune or auto")] = "auto",
    shape: _Shape = None,
    max_size: Annotated[float | None, option("--max-size-mb", help="MB of 2**20 bytes")] = None,
    max_latency: Annotated[float | None, option("--max-latency-ms", help="median of a call")] = None,
    max_drop: Annotated[
        float | None, option("--max-accuracy-drop", help="0.02 is two points; wants labels in --data")
    ] = None,
    data: Annotated[
        Path | None, option(help=".npz of inputs by name, with 'labels' if there are any")
    ] = None,
    hardware: Annotated[str, option(help="cpu, gpu, cuda, edge or arm")] = "cpu",
    batch_size: Annotated[int, option(help="samples a call")] = 1,
    calibration_samples: Annotated[int, option(help="samples for calibration, at most")] = 100,
    backend: Annotated[list[str] | None, option("--backend", help="only these; may be repeated")] = None,
    technique: Annotated[list[str] | None, option("--technique", help="only these; may be repeated")] = None,
    time_limit: Annotated[
        float | None, option("--time-limit-s", help="for each step of a candidate; 600, and more for TVM")
    ] = None,
    memory_limit: Annotated[float | None, option("--memory-limit-mb", help="for each process")] = None,
    threads: Annotated[int, option(help="of each runtime")] = 1,
    report: Annotated[Path | None, option(help=".txt, .md, .json or .html")] = None,
    config: Annotated[Path | None, option(help="write what was done, to repeat it")] = None,
    allow_pickle: _Pickle = False,
    as_json: _Json = False,
) -> None:
    """Find the best form of MODEL that meets the constraints, and save it."""
    from hamerspace import Constraints
    from hamerspace.core.report import check_ending
    from hamerspace.saving import check_target

    with _told():
        if report is not None:
            check_ending(report)
        check_target(output)
        constraints = Constraints(
            target_size_mb=max_size,
            max_latency_ms=max_latency,
            max_accuracy_drop=max_drop,
            target_hardware=hardware,
            batch_size=batch_size,
            calibration_samples=calibration_samples,
        )
        result = _open(model, shape, allow_pickle=allow_pickle).optimize(
            goal,
            constraints,
            validation_data=None if data is None else _read_data(data),
            preferred_backends=backend or None,
            techniques=technique or None,
            time_limit_s=time_limit,
            memory_limit_mb=memory_limit,
            threads=threads,
            form=None if output.is_dir() else output.suffix or None,
        )
        result.save_model(output)
        _optionally(report, result.save_report)
        _optionally(config, result.save_config)
    if as_json:
        _print_json({"saved": str(output), **result.report.to_dict()})
    else:
        typer.echo(f"{result.report}\n\nsaved as {output}")
    if not result.report.constraints_satisfied:
        raise typer.Exit(1)


def _optionally(path: Path | None, save: Callable[[Path], object]) -> None:
    if path is not None:
        save(path)


def _read_data(path: Path) -> dict[str, Any]:
    import zipfile
    import zlib

    import numpy as np

    from hamerspace.exceptions import ModelInputError

    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as found:
            if isinstance(found, np.ndarray):
                raise ModelInputError(f"{path} is one array; numpy.savez(path, input=array) names it")
            arrays: dict[str, Any] = dict(found)
    except (ValueError, EOFError, zlib.error, zipfile.BadZipFile) as error:
        raise ModelInputError(f"{path} cannot be read as .npz: {error}") from error
    # Other zip archives are taken for one of arrays until something in them is looked at.
    if not arrays or not all(isinstance(one, np.ndarray) for one in arrays.values()):
        raise ModelInputError(f"{path} is no .npz of arrays; numpy.savez(path, input=array) writes one")
    return arrays


@app.command()
def benchmark(
    model: Annotated[Path, argument(help="a model, or what hamerspace saved")],
    shape: _Shape = None,
    hardware: Annotated[str, option(help="cpu, gpu, cuda, edge or arm")] = "cpu",
    runs: Annotated[int, option(help="calls to time")] = 100,
    batch_size: Annotated[
        list[int] | None, option(help="samples a call; may be repeated, to see what batches gain")
    ] = None,
    threads: Annotated[int, option(help="of the runtime")] = 1,
    allow_pickle: _Pickle = False,
    allow_native: _Native = False,
    as_json: _Json = False,
) -> None:
    """Measure MODEL as it is: size, latency, throughput and memory, in a fresh process."""
    from hamerspace.loading import is_saved
    from hamerspace.measure import Benchmarker

    sizes = batch_size or [1]
    with _told():
        if is_saved(model):
            measured = Benchmarker(threads=threads, allow_native=allow_native).benchmark_batches(
                model, None, hardware, _shapes(shape), sizes, runs
            )
        else:
            optimizer = _open(model, shape, allow_pickle=allow_pickle)
            measured = [optimizer.benchmark(hardware, runs, size, threads=threads) for size in sizes]
    if as_json:
        _print_json(measured[0].to_dict() if len(measured) == 1 else [one.to_dict() for one in measured])
        return
    typer.echo("\n\n".join(_measured(one) for one in measured))
    typer.echo(f"\n{measured[0].runs} calls on this machine's {measured[0].hardware}")


def _measured(found: ModelMetrics) -> str:
    low, high = found.latency_interval_ms or (found.latency_ms, found.latency_ms)
    return (
        f"size        {found.size_mb:.2f} MB\n"
        f"latency     {found.latency_ms:.3g} ms median (within {low:.3g} and {high:.3g}), "
        f"{found.latency_p90_ms:.3g} ms 90%, {found.latency_p99_ms:.3g} ms 99%\n"
        f"CPU time    {found.cpu_ms:.3g} ms a call\n"
        f"throughput  {found.throughput:.4g} samples a second at {found.batch_size} a call\n"
        f"memory      {found.memory_mb:.0f} MB at peak"
    )


@app.command()
def inspect(
    model: _Model, shape: _Shape = None, allow_pickle: _Pickle = False, as_json: _Json = False
) -> None:
    """Say what MODEL is, what it takes and gives, and what could be tried on it."""
    from hamerspace import backend_names
    from hamerspace.backends.registry import offers
    from hamerspace.loading import find, is_saved

    with _told():
        if is_saved(model):
            _inspect_saved(model, find(model).manifest, as_json)
            return
        info = _open(model, shape, allow_pickle=allow_pickle).model_info
        found = {name: offers(name, info) for name in backend_names()}
        offered = {name: [one.technique for one in of] or reason for name, (of, reason) in found.items()}
    if as_json:
        _print_json({**info.to_dict(), "candidates": offered})
        return
    typer.echo(
        f"{info.name}: {info.framework}, {info.form}, {info.parameters:,} parameters, {info.size_mb:.2f} MB"
    )
    _print_signature(info.inputs, info.outputs)
    for name, techniques in offered.items():
        typer.echo(f"  {name}: {', '.join(techniques) if isinstance(techniques, list) else techniques}")


def _inspect_saved(path: Path, manifest: Manifest, as_json: bool) -> None:
    if as_json:
        _print_json({**manifest.to_dict(), "size_bytes": manifest.size_bytes})
        return
    typer.echo(
        f"{path.name}: {manifest.backend}/{manifest.technique}, runs in {manifest.runtime}, "
        f"{manifest.size_bytes / 2**20:.2f} MB; a folder or {', '.join(manifest.endings)}"
    )
    _print_signature(manifest.inputs, manifest.outputs)
    typer.echo(f"  made with {', '.join(f'{name} {number}' for name, number in manifest.versions.items())}")


def _print_signature(inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec]) -> None:
    for title, specs in (("takes", inputs), ("gives", outputs)):
        for spec in specs:
            limit = f", below {spec.high}" if spec.high else ""
            typer.echo(f"  {title} {spec.name}: {spec.dtype} {list(spec.shape)}{limit}")


@app.command()
def backends(as_json: _Json = False) -> None:
    """List the backends, which of them can be used here, and what installs the others."""
    from hamerspace import Backend, backend_names, get_backend
    from hamerspace.backends.registry import availability

    found: dict[str, dict[str, Any]] = {}
    for name in backend_names():
        verdict = availability(name)
        extra = get_backend(name).extra if verdict or name in list(Backend) else ""
        found[name] = {"available": verdict.yes, "reason": verdict.reason, "extra": extra}
    if as_json:
        _print_json(found)
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for title in ("backend", "", "", "extra"):
        table.add_column(title, overflow="fold")
    for name, one in found.items():
        table.add_row(name, "yes" if one["available"] else "no", one["reason"], one["extra"])
    console = Console()
    if not sys.stdout.isatty():
        console.width = 160
    console.print(table, markup=False)


@app.command()
def report(
    path: Annotated[Path, argument(help="a report that was saved as .json")],
    output: Annotated[Path | None, option("--output", "-o", help=".html; else a table is printed")] = None,
) -> None:
    """Show a saved report, or make a page of it."""
    from hamerspace.artifact import read_json, replacing
    from hamerspace.core._page import page
    from hamerspace.exceptions import ArtifactError, UnsupportedError

    with _told():
        if not path.is_file():
            raise FileNotFoundError(f"there is no report at {path}")
        data = read_json(path)
        if not isinstance(data, dict) or "optimized_metrics" not in data:
            raise ArtifactError(f"{path} is no report of hamerspace")
        try:
            made = page(data)  # pyright: ignore[reportUnknownArgumentType]
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            raise ArtifactError(f"{path} is damaged: {error}") from error
        if output is not None:
            if output.suffix.lower() != ".html":
                raise UnsupportedError(f"the page is HTML; name it .html, not {output.name}")
            with replacing(output) as temporary:
                temporary.write_text(made, encoding="utf-8")
            typer.echo(f"written to {output}")
            return
        from hamerspace.core.report import report_from_dict

        try:
            shown = str(report_from_dict(cast("Any", data)))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ArtifactError(f"{path} is damaged: {error}") from error
        typer.echo(shown)


def main() -> None:
    """Run the command. A process that is asked to end clears up as one that is interrupted does."""
    signal.signal(signal.SIGTERM, _end)
    app()


def _end(number: int, frame: object) -> None:
    del frame
    sys.exit(128 + number)


if __name__ == "__main__":
    main()
