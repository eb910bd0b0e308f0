"""Reads a model in a process of its own, so that its library is not loaded into the caller's."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

from hamerspace import exceptions
from hamerspace._rooms import Room
from hamerspace.measure.worker import JobError, Worker
from hamerspace.models.source import ModelSource

_RAISED: Final[dict[str, type[Exception]]] = {
    **{name: getattr(exceptions, name) for name in exceptions.__all__},
    "ImportError": ImportError,
}


def describe_elsewhere(path: Path, **options: Any) -> ModelSource:
    """Read a file or folder of TensorFlow's in a worker process.

    Args:
        path: of the model.
        options: those of `hamerspace.models.tensorflow.read`; they are sent to the process.

    Raises:
        HamerspaceError: what reading the model raised, as the class that it was there.
        ImportError: TensorFlow is not installed.
        WorkerError: the process crashed, or reading failed in a way that is not foreseen.
    """
    with Room() as room, Worker(room / "log") as worker:
        try:
            return worker.call("describe", str(path), options)
        except JobError as error:
            raised = _RAISED.get(error.kind)
            if raised is None:
                raise
            raise raised(str(error)) from error
