"""The command ``av-memory``: measure a program from outside, and turn a recording into a page."""

from __future__ import annotations

import argparse
import contextlib
import math
import os
import secrets
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, NoReturn, TextIO

if TYPE_CHECKING:
    from av_memory._watch import Watched
    from av_memory.recording import Recording

__all__ = ["main"]

_MISUSE, _NOT_EXECUTABLE, _NOT_FOUND = 2, 126, 127

_DESCRIPTION = "Tells what memory a program uses, over time and over all its processes."
_EXAMPLES = """\
examples:
  av-memory run -- python train.py                    peak memory of a program and its children
  av-memory run --html memory.html -- make -j8        and a page with the timeline
  av-memory run --limit 4000 -- python train.py       ended if it takes more than 4000 MB
  av-memory report recording.json                     a page from a saved recording
"""
_RUN_HELP = """\
Runs COMMAND in the foreground, with this terminal and its own input and output, and samples the memory
of the command and of all processes that it starts, orphans included (Linux). A short summary goes to
standard error. Options for av-memory stand before COMMAND.

Resident sets are read at every interval, proportional set sizes (in which a shared page is divided among
its users) at most four times a second. With many processes the readings are spaced out, so that each
kind takes at most about 1% of a processor. MB is 2**20 bytes.
"""
_RUN_EPILOG = """\
limit:
  When the sum of the resident sets passes --limit, and the sum of the proportional set sizes does too
  where the kernel tells it, every process of the tree gets SIGTERM, and SIGKILL five seconds later.

signals:
  SIGINT, SIGTERM, SIGHUP, SIGQUIT, SIGUSR1 and SIGUSR2 are passed on to the command; the reports are
  written when it has ended. Processes that outlive the command are left running.

exit code:
  that of the command; 128 + n if signal n ended it; 125 if the limit was passed; 126 if it cannot be
  executed; 127 if it is not found; 2 for a wrong option. Reports that cannot be written in the end
  cost a message, not the exit code.

examples:
  av-memory run -- python train.py --epochs 3
  av-memory run --html memory.html --json memory.json -- make -j8
  av-memory run --limit 4000 --quiet -- ./server
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code."""
    arguments = _parser().parse_args(argv)
    return _run(arguments) if arguments.action == "run" else _report(arguments)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        from av_memory.report._format import one_line

        # The message quotes the arguments, and a file's name can hold what steers a terminal.
        super().error(one_line(message))


def _parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = _Parser("av-memory", description=_DESCRIPTION, epilog=_EXAMPLES, formatter_class=raw)
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)

    run = actions.add_parser(
        "run",
        help="run a command and measure all its processes",
        usage="av-memory run [options] [--] COMMAND [ARGUMENT...]",
        description=_RUN_HELP,
        epilog=_RUN_EPILOG,
        formatter_class=raw,
    )
    run.add_argument("--html", type=Path, metavar="FILE", help="write a page with the timeline")
    run.add_argument("--json", type=Path, metavar="FILE", help="write the recording, for av-memory report")
    run.add_argument("--trace", type=Path, metavar="FILE", help="write a trace for ui.perfetto.dev")
    run.add_argument(
        "--limit", type=_positive, metavar="MB", help="end the command if it takes more than this"
    )
    run.add_argument(
        "--interval-ms", type=_interval, default=5.0, metavar="MS", help="time between samples (default: 5)"
    )
    run.add_argument("--quiet", action="store_true", help="print no summary")
    run.add_argument(
        "command", nargs=argparse.REMAINDER, metavar="COMMAND", help="the program and its arguments"
    )
    run.set_defaults(fail=run.error)

    report = actions.add_parser(
        "report",
        help="turn a recording into a page",
        description="Writes a recording (of at most 1 GiB) as a page, and prints a table of its scopes.",
        epilog="example:\n  av-memory report memory.json --html memory.html --trace memory.trace.json\n\n"
        "exit code:\n  0; 2 for a wrong option, a file that is no recording, or output that fails\n",
        formatter_class=raw,
    )
    report.add_argument(
        "recording", type=Path, metavar="FILE", help="written by run --json or by av_memory.to_json"
    )
    report.add_argument("--html", type=Path, metavar="FILE", help="the page (default: next to the recording)")
    report.add_argument(
        "--trace", type=Path, metavar="FILE", help="write a trace for ui.perfetto.dev as well"
    )
    report.set_defaults(fail=report.error)
    return parser


def _positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number")
    return value


def _interval(text: str) -> float:
    value = _positive(text)
    if not 0.1 <= value <= 60_000:
        raise argparse.ArgumentTypeError(f"{text} ms is not between 0.1 ms and 60000 ms")
    return value


def _run(arguments: argparse.Namespace) -> int:
    command: list[str] = arguments.command
    if command[:1] == ["--"]:
        command = command[1:]
    if not command:
        arguments.fail("there is no COMMAND to run")
    if not hasattr(os, "posix_spawnp"):
        arguments.fail("run needs Linux or another POSIX system")
    outputs = _outputs(
        arguments,
        {kind: path for kind in ("json", "html", "trace") if (path := getattr(arguments, kind)) is not None},
    )
    for kind, output in outputs.items():
        problem = _why_not_writable(output)
        if problem is not None:
            arguments.fail(f"argument --{kind}: cannot write {output.name}: {problem}")

    from av_memory._signals import Signals
    from av_memory._watch import NotStartedError, watch

    with Signals() as signals:
        try:
            watched = watch(
                command, signals, interval_s=arguments.interval_ms / 1000, limit_mb=arguments.limit
            )
        except NotStartedError as error:
            _say(f"cannot run {shlex.quote(command[0])}: {error.cause.strerror}")
            absent = isinstance(error.cause, FileNotFoundError | NotADirectoryError)
            return _NOT_FOUND if absent else _NOT_EXECUTABLE
        for kind, output in outputs.items():
            _write(kind, watched.recording, output, title=shlex.join(command))
        if watched.reason is not None:
            _say(f"{shlex.quote(command[0])} was {watched.reason}")
        if not arguments.quiet:
            _summarise(watched)
    return watched.exit_code


class _Output(NamedTuple):
    """A file to be written."""

    name: Path
    """As the user gave it."""
    target: Path
    """Where that is, whatever becomes of the working directory."""


def _outputs(
    arguments: argparse.Namespace, paths: Mapping[str, Path], source: Path | None = None
) -> dict[str, _Output]:
    """Where the reports go; misuse if two of them, or one and the source, are the same file."""
    outputs: dict[str, _Output] = {}
    taken = {} if source is None else {"the recording": source}
    for kind, path in paths.items():
        for other, file in taken.items():
            if _same_file(path, file):
                arguments.fail(f"argument --{kind}: {path} is {other}: the outputs must be different files")
        taken[f"--{kind} as well"] = path
        try:
            outputs[kind] = _Output(path, Path(os.path.realpath(path)))
        except OSError as error:
            arguments.fail(f"argument --{kind}: cannot write {path}: {error.strerror}")
    return outputs


def _same_file(one: Path, other: Path) -> bool:
    with contextlib.suppress(OSError):  # one of them is not there yet
        return one.samefile(other)
    with contextlib.suppress(OSError):  # there is no working directory: told when the path is resolved
        return os.path.realpath(one) == os.path.realpath(other)
    return False


def _why_not_writable(output: _Output) -> str | None:
    """Try, as a look at permissions would miss read-only and full file systems."""
    from av_memory.recording import mode_of_regular_file

    trial = output.target.parent / f".av-memory-{secrets.token_hex(8)}.tmp"
    try:
        mode_of_regular_file(output.name)
        trial.write_bytes(b"x")
    except OSError as error:
        return error.strerror
    finally:
        with contextlib.suppress(OSError):  # the reason is told above
            trial.unlink()
    return None


def _write(kind: str, recording: Recording, output: _Output, *, title: str) -> bool:
    target = output.target
    try:
        if kind == "json":
            recording.to_json(target)
        elif kind == "html":
            from av_memory.report import save_report

            save_report(recording, target, title=title)
        else:
            from av_memory.report import save_trace

            save_trace(recording, target)
    except OSError as error:
        _say(f"cannot write {output.name}: {error.strerror}")
        return False
    return True


def _summarise(watched: Watched) -> None:
    from av_memory.report._format import format_mb, format_s

    recording = watched.recording
    peaks = {series.name: max(series.values_mb) for series in recording.series}
    processes = sorted(recording.processes, key=lambda process: -process.peak_rss_mb)
    rss = max([peaks.get("tree rss", 0.0), *(process.peak_rss_mb for process in processes[:1])])
    parts = [f"peak RSS {format_mb(rss)}" if rss else "ended before it could be measured"]
    if "tree pss" in peaks:
        parts.append(f"peak PSS {format_mb(peaks['tree pss'])}")
    parts += [f"wall {format_s(recording.wall_s)}", f"exit code {watched.exit_code}"]
    _say(", ".join(parts))
    for process in processes[:3]:
        _say(f"  {format_mb(process.peak_rss_mb):>10}  {process.pid:>7}  {process.name}")
    if len(processes) > 3:
        _say(f"  and {len(processes) - 3} more processes")
    if watched.still_running:
        _say(f"  {watched.still_running} of them still running")


def _report(arguments: argparse.Namespace) -> int:
    from av_memory.recording import Recording, RecordingError
    from av_memory.report._summary import verdict

    source: Path = arguments.recording
    try:
        recording = Recording.load(source)
    except OSError as error:
        _say(f"cannot read {source}: {error.strerror}")
        return _MISUSE
    except RecordingError as error:
        _say(str(error))
        return _MISUSE
    paths = {"html": arguments.html or source.with_suffix(".html")}
    if arguments.trace is not None:
        paths["trace"] = arguments.trace
    outputs = _outputs(arguments, paths, source)
    title = shlex.join(recording.command) or source.stem
    written = [_write(kind, recording, output, title=title) for kind, output in outputs.items()]
    lines = [*verdict(recording), *_table(recording)]
    if written[0]:
        lines.append(f"Page: {outputs['html'].name}")
    return 0 if _print(lines) and all(written) else _MISUSE


def _table(recording: Recording) -> list[str]:
    from av_memory.report._format import format_mb, format_s, one_line
    from av_memory.report._summary import summarise_scopes

    rows = [("scope", "count", "wall", "peak", "net, mean", "peak is")]
    rows += [
        (
            one_line(summary.name)[:60],
            str(summary.count),
            format_s(summary.wall_s),
            format_mb(summary.peak_mb),
            format_mb(summary.net_sum_mb / summary.count),
            summary.exactness,
        )
        for summary in summarise_scopes(recording.scopes)
    ]
    if len(rows) == 1:
        return []
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  ".join(
            [row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))]
        )
        for row in rows
    ]


def _print(lines: Sequence[str]) -> bool:
    """To standard output; false if it cannot be written. A reader that has seen enough is no failure."""
    if sys.stdout is None:  # closed by whoever started this, who wants no text then
        return True
    try:
        _emit(sys.stdout, lines)
    except BrokenPipeError:
        return True
    except OSError as error:
        _say(f"cannot print: {error.strerror}")
        return False
    return True


def _say(text: str) -> None:
    # The terminal may have been closed; that must not cost the command's exit code.
    with contextlib.suppress(OSError):
        if sys.stderr is not None:
            _emit(sys.stderr, [f"av-memory: {text}"])


def _emit(stream: TextIO, lines: Sequence[str]) -> None:
    from av_memory.report._format import one_line

    encoding = stream.encoding or "utf-8"
    text = "".join(f"{one_line(line)}\n" for line in lines)
    try:
        stream.write(text.encode(encoding, "backslashreplace").decode(encoding))
        stream.flush()
    except OSError:
        # What is left in the buffer would fail again, and change the exit code, when the interpreter ends.
        with contextlib.suppress(OSError), open(os.devnull, "w") as nothing:  # noqa: PTH123
            os.dup2(nothing.fileno(), stream.fileno())
        raise
