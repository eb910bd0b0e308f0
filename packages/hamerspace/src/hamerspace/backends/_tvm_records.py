"""Tuning records of TVM on disk: one folder for each set of kernels, CPU and version, kept between runs.

A folder holds TVM's own two files of JSON lines (kernels, and what was measured of them). TVM only ever
appends whole lines, so a run that is killed loses at most the line that it was writing; `Records.mend` drops
such a line before the next run reads the files.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from hamerspace._rooms import user_folder
from hamerspace.artifact import replacing, write_json
from hamerspace.exceptions import BackendError

_KERNELS: Final = "database_workload.json"
_MEASURED: Final = "database_tuning_record.json"
_FINISHED: Final = "finished.json"
_POLL_S: Final = 0.2


@dataclass(frozen=True, kw_only=True)
class Kernel:
    """A kernel that is to be tuned."""

    name: str
    weight: int
    """How often a run of the model calls it."""
    module: str
    """TVM's JSON of the module that holds it."""


class Records:
    """The records of one set of kernels for one target, in a folder of their own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @classmethod
    def of(
        cls, root: Path, kernels: Sequence[Kernel], target: Mapping[str, Any], versions: Mapping[str, str]
    ) -> Records:
        """Return the records of a model's kernels.

        Args:
            root: the folder of all records.
            kernels: with their shapes. Times do not depend on the values of weights, so a model that was
                trained further finds its records again.
            target: as TVM is told.
            versions: of what compiles.
        """
        key = json.dumps([[asdict(one) for one in kernels], dict(target), dict(versions)], sort_keys=True)
        return cls(root / hashlib.sha256(key.encode()).hexdigest()[:32])

    @contextmanager
    def locked(self, wait_s: float) -> Generator[None]:
        """Keep other processes from tuning the same kernels; the lock ends with the process.

        Raises:
            BackendError: another process holds it longer than ``wait_s`` seconds.
        """
        import fcntl

        self.folder.mkdir(parents=True, exist_ok=True)
        until = time.monotonic() + wait_s
        with (self.folder / "lock").open("w") as file:
            while True:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except OSError as error:
                    if time.monotonic() > until:
                        raise BackendError(
                            f"another process has been tuning the same kernels for {wait_s:.0f} s; "
                            "wait for it, and run this again"
                        ) from error
                    time.sleep(_POLL_S)
                else:
                    break
            yield

    def count(self) -> int:
        """Return how many measurements there are."""
        try:
            with (self.folder / _MEASURED).open("rb") as file:
                return sum(1 for line in file if line.endswith(b"\n"))
        except FileNotFoundError:
            return 0

    def mend(self) -> int:
        """Drop lines that a killed run left unfinished, and measurements of kernels that were on such lines.

        Returns:
            How many lines were dropped.
        """
        kernels, lost = _whole_lines(self.folder / _KERNELS)
        measured, torn = _whole_lines(self.folder / _MEASURED)
        kept = [line for line in measured if json.loads(line)[0] in range(len(kernels))]
        dropped = lost + torn + len(measured) - len(kept)
        if dropped:
            (self.folder / _FINISHED).unlink(missing_ok=True)
            # Measurements name kernels by line number: they go first, so that none names a wrong one.
            _rewrite(self.folder / _MEASURED, kept)
            _rewrite(self.folder / _KERNELS, kernels)
        return dropped

    def finished_trials(self) -> int:
        """Return the largest number of trials a kernel that a run has come to the end of."""
        try:
            return int(json.loads((self.folder / _FINISHED).read_text(encoding="utf-8"))["trials"])
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            return 0

    def finish(self, trials: int) -> None:
        """Remember that a run with this many trials a kernel came to its end."""
        write_json(self.folder / _FINISHED, {"trials": trials})

    def open(self) -> Any:
        """Open them as TVM's database."""
        from hamerspace._imports import need

        return need("tvm.s_tir.meta_schedule").database.JSONDatabase(
            path_workload=str(self.folder / _KERNELS), path_tuning_record=str(self.folder / _MEASURED)
        )


def root_of(cache: Path | None) -> Path:
    """Return the folder of all records: in ``cache``, or where the XDG rules put what can be made again."""
    if cache is not None:
        return cache / "tvm"
    return user_folder("XDG_CACHE_HOME", ".cache") / "tvm"


def _whole_lines(path: Path) -> tuple[list[bytes], int]:
    """Return the lines up to the first that is no JSON list, and the number of those that are left out."""
    try:
        lines = path.read_bytes().splitlines(keepends=True)
    except FileNotFoundError:
        return [], 0
    for place, line in enumerate(lines):
        try:
            value = json.loads(line)
            whole = line.endswith(b"\n") and isinstance(value, list) and bool(value)  # pyright: ignore[reportUnknownArgumentType]
        except ValueError:
            whole = False
        if not whole:
            return lines[:place], len(lines) - place
    return lines, 0


def _rewrite(path: Path, lines: Sequence[bytes]) -> None:
    with replacing(path) as temporary:
        temporary.write_bytes(b"".join(lines))
