"""TensorFlow as a library that keeps quiet: imported after triton, its log lines kept off the screen."""

from __future__ import annotations

import logging
import os
import re
import sys
import tempfile
import warnings
from collections.abc import Generator
from contextlib import contextmanager, nullcontext
from functools import cache
from threading import RLock
from typing import Any, Final

from hamerspace._imports import need
from hamerspace.exceptions import BackendUnavailableError

_NATIVE_LINE: Final = re.compile(
    rb"[IWE]\d{4} \d\d:\d\d|[IWE]\d{4} \d+\.\d+ |\d{4}-\d\d-\d\d .*: [IWE] (?:tensorflow|external|\S+\.cc)|"
    rb"WARNING: All log messages before absl::InitializeLog|INFO: (?:Created|Initialized) TensorFlow Lite|"
    rb"To enable the following instructions:"
)
_LOG = logging.getLogger(__name__)


@cache
def tensorflow() -> Any:
    """Import TensorFlow, quietly.

    Raises:
        ImportError: it is not installed; the message has the line that installs it.
    """
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    with quiet(native=True):
        found = need("tensorflow")
        # Looks for GPUs now, while what it says about finding none goes nowhere.
        found.config.list_physical_devices()
    return found


@cache
def keras() -> Any:
    """Import Keras 3 on TensorFlow.

    Raises:
        ImportError: TensorFlow is not installed.
        BackendUnavailableError: Keras runs on another library in this process.
    """
    tensorflow()
    with quiet():
        found = need("keras")
    if (backend := found.backend.backend()) != "tensorflow":
        raise BackendUnavailableError(
            f"Keras runs on {backend} here, and only TensorFlow runs its models as a graph; start Python "
            "with KERAS_BACKEND=tensorflow"
        )
    return found


_STANDARD_ERROR: Final = RLock()
"""Held while the process's standard error is caught: two that do so at once would lose it."""


@contextmanager
def quiet(*, native: bool = False) -> Generator[None]:
    """Keep TensorFlow's log lines and its notes on its own future off the screen, and nothing else.

    Its native part writes to the process's standard error whatever its settings are. With ``native``, that
    stream is caught for the while; whatever is no line of TensorFlow's log is written when it ends, and
    all of it after an exception.
    """
    loggers = [logging.getLogger(name) for name in ("tensorflow", "absl")]
    levels = [logger.level for logger in loggers]
    with (
        _STANDARD_ERROR if native else nullcontext(),
        warnings.catch_warnings(),
        _native_lines_dropped() if native else nullcontext(),
    ):
        warnings.filterwarnings("ignore", message=r"\s*Warning: tf\.lite\.Interpreter is deprecated")
        warnings.filterwarnings("ignore", category=DeprecationWarning, module=r"(tensorflow|keras)\b")
        try:
            for logger in loggers:
                logger.setLevel(max(logger.getEffectiveLevel(), logging.ERROR))
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


@contextmanager
def _native_lines_dropped() -> Generator[None]:
    sys.stderr.flush()
    try:
        kept = os.dup(2)
    except OSError:  # standard error is closed: there is nothing to keep clean
        yield
        return
    failed = True
    with tempfile.TemporaryFile() as caught:
        os.dup2(caught.fileno(), 2)
        try:
            yield
            failed = False
        finally:
            sys.stderr.flush()
            os.dup2(kept, 2)
            os.close(kept)
            caught.seek(0)
            for line in caught:
                if failed or not _NATIVE_LINE.match(line):
                    os.write(2, line)


def use_threads(threads: int | None) -> None:
    """Limit the threads of TensorFlow's own runtime; None leaves them alone.

    That can be done only before its first operation in a process: afterwards it is left as it is, and the log
    says so.
    """
    if threads is None:
        return
    config = tensorflow().config.threading
    now = (config.get_intra_op_parallelism_threads(), config.get_inter_op_parallelism_threads())
    if now == (threads, 1):
        return
    try:
        config.set_intra_op_parallelism_threads(threads)
        config.set_inter_op_parallelism_threads(1)
    except RuntimeError:
        _LOG.warning(
            "TensorFlow has started in this process with %s threads (0: one a core) and cannot change to %d",
            now[0],
            threads,
        )
