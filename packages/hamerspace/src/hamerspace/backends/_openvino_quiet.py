"""OpenVINO's converter and NNCF without usage reports, progress bars and log lines."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Generator
from contextlib import contextmanager
from functools import cache
from typing import Any

from hamerspace._imports import has, need


@contextmanager
def quiet() -> Generator[None]:
    """Send nothing, and print nothing below an error, while this lasts.

    NNCF draws its progress bars whatever its log level says, so standard output goes nowhere meanwhile.
    """
    _decline_reports()
    with _no_log_lines(), warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        yield


def load_nncf() -> Any:
    """Import NNCF, which otherwise greets and reports that it was imported.

    Its logger keeps the standard output that there is while it is imported: hence not inside of `quiet`.

    Raises:
        ImportError: it is not installed.
    """
    _decline_reports()
    with _no_log_lines(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return need("nncf")


@contextmanager
def _no_log_lines() -> Generator[None]:
    before = logging.root.manager.disable
    logging.disable(max(before, logging.WARNING))
    try:
        yield
    finally:
        logging.disable(before)


@cache
def _decline_reports() -> None:
    """Answer the question for consent with no: unasked, both libraries take silence for a yes."""
    if has("openvino_telemetry"):
        checker = need("openvino_telemetry.utils.opt_in_checker")
        declined = checker.ConsentCheckResult.DECLINED

        def decline(*_: Any, **__: Any) -> Any:
            return declined

        checker.OptInChecker.check = decline
