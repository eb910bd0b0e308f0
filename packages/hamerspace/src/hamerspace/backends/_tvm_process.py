"""Runs `hamerspace.backends._tvm_tune` in processes that can be ended from outside at any time."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Final

from hamerspace.backends._tvm_records import Records
from hamerspace.backends._tvm_tune import Order
from hamerspace.exceptions import BackendError

_LOG: Final = "tuning.log"
_LOG_LINES: Final = 5


def tune(records: Records, order: Order, limit_s: float) -> bool:
    """Tune until the order is done or the time is over; what was measured stays in the records.

    A process that dies is followed by another, as long as each measures something new.

    Returns:
        Whether the order was done.

    Raises:
        BackendError: tuning fails, and another try would, too.
    """
    until = time.monotonic() + limit_s
    with tempfile.TemporaryDirectory(prefix="hamerspace-tvm-") as room:
        path = Path(room) / "order.json"
        order.write(path)
        while (left_s := until - time.monotonic()) > 0:
            records.mend()
            before = records.count()
            code = _run(path, records.folder / _LOG, int(order.target["num-cores"]), left_s)
            if code == 0:
                return True
            if code is not None and records.count() == before:
                raise BackendError(
                    f"tuning ended with {_told(code)}, and nothing was measured; it said last: "
                    f"{_last_lines(records.folder / _LOG)}"
                )
    records.mend()
    return False


def _run(order: Path, log: Path, threads: int, limit_s: float) -> int | None:
    """Run one process; return its exit code, or None if its time was over and it was ended."""
    program = f"from hamerspace.backends._tvm_tune import main; main({str(order)!r}, {os.getpid()})"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-P", "-c", program],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={
                **os.environ,
                "OMP_NUM_THREADS": str(threads),
                "TVM_NUM_THREADS": str(threads),
                "PYTHONPATH": os.pathsep.join(place or str(Path.cwd()) for place in sys.path),
                "PYTHONWARNINGS": "ignore",
            },
            # Ctrl-C reaches the caller alone, which then ends the whole group.
            start_new_session=True,
        )
        try:
            return process.wait(limit_s)
        except subprocess.TimeoutExpired:
            return None
        finally:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _told(code: int) -> str:
    if code >= 0:
        return f"status {code}"
    try:
        return signal.Signals(-code).name
    except ValueError:
        return f"signal {-code}"


def _last_lines(log: Path) -> str:
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return " | ".join(lines[-_LOG_LINES:])[-600:] or "nothing"
