"""A worker process: foreign code runs there, under limits, and what it does cannot harm the caller.

A backend that crashes, hangs or eats memory ends its worker, and the caller gets a `WorkerError` with the
reason. The worker has a session of its own, so Ctrl-C reaches the caller alone, who then ends the worker and
all that it has started; and it ends with its caller however that ends (Linux).
"""

from __future__ import annotations

import contextlib
import os
import pickle
import signal
import socket
import subprocess
import sys
import time
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import Any, Final

from av_memory.probes import ProcessTree

from hamerspace._pickling import dumps
from hamerspace._rooms import Room
from hamerspace.exceptions import WorkerError

_TICK_S: Final = 0.1
_LOG_LINES: Final = 6


class JobError(WorkerError):
    """A job raised an exception in the worker, which goes on."""

    def __init__(self, message: str, kind: str = "", trace: str = "") -> None:
        super().__init__(message)
        self.kind = kind
        """Name of the exception's class."""
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return JobError, (str(self), self.kind, self.trace)


class Worker:
    """A process that runs the jobs of `hamerspace.measure.jobs`, one after another.

    Args:
        log: file that takes what the process prints.
        threads: of every library in it.
        device: ``cpu`` hides GPUs from it.
        time_limit_s: for each job; None for no limit.
        memory_limit_mb: of the resident memory of the process and its children, in MB of 2**20 bytes.
    """

    def __init__(
        self,
        log: Path,
        *,
        threads: int = 1,
        device: str = "cpu",
        time_limit_s: float | None = None,
        memory_limit_mb: float | None = None,
    ) -> None:
        if not sys.executable:
            raise WorkerError(
                "this Python does not say where it lies (sys.executable), so no worker can start"
            )
        self._log = log
        # What libraries put aside goes with the process, which may have no time to clear up.
        self._room = Room()
        self._time_limit_s, self._memory_limit_mb = time_limit_s, memory_limit_mb
        here, there = socket.socketpair()
        with there, log.open("ab") as output:
            command = [
                sys.executable,
                # Modules come from where the caller's do, and not from the current folder.
                "-P",
                "-c",
                f"from hamerspace.measure.jobs import serve; serve({there.fileno()}, {os.getpid()})",
            ]
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                pass_fds=[there.fileno()],
                env=_environment(threads, device, self._room.path),
                start_new_session=True,
            )
        self._connection: Connection[Any, Any] = Connection(here.detach())
        self._tree = ProcessTree(self._process.pid)

    def call(self, job: str, /, *arguments: Any, time_limit_s: float | None = None, **named: Any) -> Any:
        """Run a job and return what it gives.

        Args:
            job: name of a method of `hamerspace.measure.jobs.Jobs`.
            arguments: for it; sent by cloudpickle.
            time_limit_s: in place of the worker's own.
            named: for it, too.

        Raises:
            JobError: the job raised an exception.
            WorkerError: the process died, took too long or took too much memory; it is gone then.
        """
        message = dumps((job, arguments, named))
        limit = time_limit_s if time_limit_s is not None else self._time_limit_s
        try:
            self._connection.send_bytes(message)
            self._wait(job, limit)
            status, value = pickle.loads(self._connection.recv_bytes())  # noqa: S301 - of a process of ours
        except (EOFError, OSError) as error:
            raise WorkerError(self._obituary(job)) from error
        except BaseException:
            self.close()
            raise
        if status == "raised":
            raise JobError(*value)
        return value

    def _wait(self, job: str, limit_s: float | None) -> None:
        start = time.monotonic()
        while not self._connection.poll(_TICK_S):
            if limit_s is not None and time.monotonic() - start > limit_s:
                raise WorkerError(f"{job} took longer than {limit_s:.0f} s and was ended")
            if self._memory_limit_mb is None:
                continue
            self._tree.refresh()
            used_mb = self._tree.rss_bytes() / 2**20
            if used_mb > self._memory_limit_mb:
                raise WorkerError(
                    f"{job} took {used_mb:.0f} MB, more than the limit of {self._memory_limit_mb:.0f} MB, "
                    "and was ended"
                )

    def _obituary(self, job: str) -> str:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(5)
        code = self._process.poll()
        self.close()
        if code is not None and code < 0:
            try:
                how = f"was ended by {signal.Signals(-code).name}"
            except ValueError:
                how = f"was ended by signal {-code}"
        else:
            how = f"ended with status {code}"
        said = self.last_lines()
        return f"the process of {job} {how}" + (f"; it said last: {said}" if said else "")

    def last_lines(self) -> str:
        """What the process printed last."""
        with contextlib.suppress(OSError):
            lines = self._log.read_text(errors="replace").splitlines()[-_LOG_LINES:]
            return " | ".join(line.strip() for line in lines if line.strip())[-600:]
        return ""

    def close(self) -> None:
        """End the process and all that it started."""
        self._connection.close()
        self._tree.refresh()
        for pid in [self._process.pid, *self._tree.live_pids]:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                if pid == self._process.pid:
                    os.killpg(pid, signal.SIGKILL)
                else:
                    os.kill(pid, signal.SIGKILL)
        self._process.wait()
        self._tree.close()
        self._room.close()

    def __enter__(self) -> Worker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _environment(threads: int, device: str, temporary: Path) -> dict[str, str]:
    names = ("OMP", "MKL", "OPENBLAS", "NUMEXPR", "VECLIB_MAXIMUM")
    given = {
        **os.environ,
        **{f"{name}_NUM_THREADS": str(threads) for name in names},
        "TF_NUM_INTRAOP_THREADS": str(threads),
        "TF_NUM_INTEROP_THREADS": "1",
        "TF_CPP_MIN_LOG_LEVEL": "2",
        "TOKENIZERS_PARALLELISM": "false",
        # Nothing is downloaded, and nobody is told what is done here.
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "DO_NOT_TRACK": "1",
        "PYTHONPATH": os.pathsep.join(path or str(Path.cwd()) for path in sys.path),
        "PYTHONWARNINGS": "ignore",
        "TMPDIR": str(temporary),
    }
    if device == "cpu":
        given["CUDA_VISIBLE_DEVICES"] = ""
    return given
