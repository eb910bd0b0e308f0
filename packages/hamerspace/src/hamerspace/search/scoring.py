"""Accuracy on the caller's data, by the caller's function or by labels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from hamerspace._arrays import Kind
from hamerspace._pickling import dumps
from hamerspace.exceptions import BackendError
from hamerspace.measure.data import Batch
from hamerspace.measure.fidelity import accuracy, checked_score
from hamerspace.measure.worker import JobError, Worker
from hamerspace.models.info import Framework
from hamerspace.runtimes.callable import LoadedModel

KINDS: dict[Framework, Kind] = {"pytorch": "torch", "tensorflow": "tensorflow", "onnx": "numpy"}
"""Whose tensors a function of the caller's takes, by the framework of the model."""


class LabelScore:
    """Share of labels that a model meets, as a function that can be sent to another process."""

    def __init__(self, batches: Sequence[Batch]) -> None:
        self._batches = [one for one in batches if one.labels is not None]

    def __call__(self, model: LoadedModel) -> float:
        """Return the share of labels that the largest entry of the first output meets."""
        outputs = [model.run(one.feeds) for one in self._batches]
        return accuracy(outputs, [one.labels for one in self._batches if one.labels is not None])


class CallerScore:
    """A function of the caller's, as bytes that a worker opens."""

    def __init__(self, packed: bytes) -> None:
        self._packed = packed

    def __call__(self, model: LoadedModel) -> float:
        """Open the function and call it."""
        import pickle

        return pickle.loads(self._packed)(model)  # noqa: S301 - pickled by the process that made this one


@dataclass(frozen=True, kw_only=True)
class Scoring:
    """How accuracy is found."""

    function: Callable[[LoadedModel], Any]
    kind: Kind
    basis: str
    """What a report says of it."""
    portable: bool = True
    """Whether it can run in a worker; else it runs in the caller's process, and the model in the worker."""

    def of(self, worker: Worker, like: LoadedModel) -> float:
        """Return the accuracy of the model that a worker has open.

        Args:
            worker: of the model.
            like: has the model's inputs, outputs and structure.

        Raises:
            BackendError: the function fails, or gives no number.
        """
        if self.portable:
            try:
                return worker.call("evaluate", self.function, self.kind)
            except JobError as error:
                raise BackendError(f"validation failed: {error.kind}: {error}") from error
        model = LoadedModel(
            lambda feeds: worker.call("run", [feeds])[0], like.inputs, like.outputs, like.structure, self.kind
        )
        try:
            return checked_score(self.function(model))
        except Exception as error:
            raise BackendError(f"validation failed: {type(error).__name__}: {error}") from error


def scoring_of(
    framework: Framework, validation_fn: Callable[[Any], Any] | None, batches: Sequence[Batch] | None
) -> Scoring | None:
    """Return how accuracy is found, or None where there is neither a function nor a label."""
    if validation_fn is not None:
        kind = KINDS[framework]
        try:
            packed = dumps(validation_fn, [validation_fn, type(validation_fn)])
        except Exception:  # noqa: BLE001 - whatever keeps it from being pickled, it runs here then
            return Scoring(function=validation_fn, kind=kind, basis="validation_fn", portable=False)
        return Scoring(function=CallerScore(packed), kind=kind, basis="validation_fn")
    labelled = [one for one in batches or [] if one.labels is not None]
    if not labelled:
        return None
    samples = sum(one.samples for one in labelled)
    return Scoring(function=LabelScore(labelled), kind="numpy", basis=f"labels of {samples} samples")
