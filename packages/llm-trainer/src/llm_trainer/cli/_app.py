"""The command line as a whole: its commands, its errors and its exit codes."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import signal
import sys
import threading
import traceback
from collections.abc import Generator, Sequence
from types import FrameType
from typing import Any, cast

import typer

from llm_trainer.cli import _commands, _tokenize_commands
from llm_trainer.cli._options import Command, option, spelled_either_way
from llm_trainer.exceptions import FormatError, LLMTrainerError, TokenizerNotTrainedException, TrainingError

_MISUSE, _FAILURE, _INTERRUPTED, _TERMINATED = 2, 1, 130, 143
# What fails through no fault of the one who asked; the package's other errors say what was asked wrongly.
_FAILURES = (TrainingError, FormatError, TokenizerNotTrainedException)

# Of the click that typer uses: the newest typers bring their own, whose errors are not the click package's.
_UsageError, _ClickError = cast("tuple[Any, Any]", typer.BadParameter.__mro__[1:3])

_HELP = """Train a language model from raw text on ordinary hardware.

\b
From text to a model that writes:
  llm-trainer train --config configs/tiny.yaml --output-dir runs/tiny
  llm-trainer evaluate --model-path runs/tiny --dataset-config configs/eval_config.json
  llm-trainer generate --model-path runs/tiny --prompts "def main(" "import "
  llm-trainer info runs/tiny

\b
Exit codes, for all commands:
  0    it is done
  1    it failed on the way: a damaged file, a full disk, a loss that is not finite
  2    it cannot be done as asked: a wrong option, configuration, text or model
  130  Ctrl-C, 143 SIGTERM; `train` saves a checkpoint first, a second signal ends it at once

Options may be spelled with hyphens or underscores (--output-dir, --output_dir). Errors are one line;
--log-level debug adds the traceback. OMP_NUM_THREADS sets the number of threads.
"""

app = typer.Typer(
    name="llm-trainer",
    help=_HELP,
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={
        "help_option_names": ["-h", "--help"],
        "max_content_width": 110,
        "token_normalize_func": spelled_either_way,
    },
)
for name, function in (
    ("train", _commands.train),
    ("evaluate", _commands.evaluate),
    ("generate", _commands.generate),
    ("info", _commands.info),
    ("export", _commands.export_model),
    ("import", _commands.import_model),
):
    app.command(name, cls=Command)(function)
app.add_typer(_tokenize_commands.app)


@app.callback()
def _all_commands(  # pyright: ignore[reportUnusedFunction] - typer calls it
    version: bool = option(False, "--version", help="Show the version and exit.", is_eager=True),
) -> None:
    if version:
        from llm_trainer import __version__

        typer.echo(f"llm-trainer {__version__}")
        raise typer.Exit


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code; `llm-trainer --help` lists the codes."""
    arguments = sys.argv[1:] if argv is None else list(argv)
    # OpenMP's threads wait for one another in busy loops, which on two cores with other work on them took
    # configs/tiny.yaml 7 min 13 s instead of 38 s. It is read when torch is loaded.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    try:
        with _sigterm_raises():
            code = typer.main.get_command(app).main(arguments, "llm-trainer", standalone_mode=False)
    except typer.Abort:
        code = _INTERRUPTED
    except _ClickError as error:
        if type(error).__name__ == "NoArgsIsHelpError":
            error.show()
            return _MISUSE
        path = error.ctx.command_path if isinstance(error, _UsageError) and error.ctx else "llm-trainer"
        message = error.format_message()
        _say(f"{message}{'' if message.endswith(('.', '?')) else '.'} See {path} --help.")
        return error.exit_code
    except SystemExit as end:
        code = end.code
    except Exception as error:  # noqa: BLE001 - the last place where an error can become a line of text
        return _report(error)
    if code == _INTERRUPTED:
        _say("ended by Ctrl-C")
    elif code == _TERMINATED:
        _say("ended by SIGTERM")
    return code if isinstance(code, int) else 0


def _report(error: Exception) -> int:
    if logging.getLogger("llm_trainer").isEnabledFor(logging.DEBUG):
        traceback.print_exception(error)
    if isinstance(error, BrokenPipeError):
        # The reader has gone; Python would complain once more when it flushes at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _FAILURE
    if isinstance(error, LLMTrainerError):
        _say(str(error))
        return _FAILURE if isinstance(error, _FAILURES) else _MISUSE
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        _say(f"out of memory; use a smaller batch_size, max_length or model. {error}")
    elif isinstance(error, OSError) and error.errno is not None:
        place = f"{error.filename}: " if error.filename else ""
        remedy = "; free some space" if error.errno == errno.ENOSPC else ""
        _say(f"{place}{error.strerror}{remedy}")
    elif isinstance(error, ImportError):
        _say(str(error))
    else:
        _say(f"unexpected {type(error).__name__}: {error}. --log-level debug shows where")
    return _FAILURE


def _say(message: str) -> None:
    typer.echo(f"llm-trainer: {' '.join(message.split())}", err=True)


@contextlib.contextmanager
def _sigterm_raises() -> Generator[None]:
    """Let SIGTERM unwind the program, so that nothing half written stays; training handles it itself."""

    def end(_number: int, _frame: FrameType | None) -> None:
        raise SystemExit(_TERMINATED)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
