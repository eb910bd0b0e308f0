"""What every runtime offers: a model with named inputs and outputs that are arrays."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

from hamerspace._checks import positive_integer
from hamerspace.exceptions import ConstraintError
from hamerspace.models.info import Array, Feeds, TensorSpec


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """How a model is to be run."""

    device: str = "cpu"
    """``cpu`` or ``cuda``."""
    threads: int | None = None
    """Of the runtime; None leaves that to the runtime."""
    allow_native: bool = False
    """Whether native code is opened that somebody else has built."""

    def __post_init__(self) -> None:
        if self.device not in ("cpu", "cuda"):
            raise ConstraintError(f"device is {self.device!r}; it may be cpu, or gpu (the same as cuda)")
        if self.threads is not None:
            positive_integer("threads", self.threads)


class Runner(ABC):
    """A model that is ready to run.

    `inputs` and `outputs` are in the order of the model's own signature. A runner takes arrays of exactly
    these dtypes; shapes may differ along axes that have a name.
    """

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]

    @abstractmethod
    def run(self, feeds: Feeds) -> dict[str, Array]:
        """Return outputs by name. ``feeds`` holds an array for each input, by name."""

    def prepare(self, feeds: Feeds) -> Any:
        """Return the inputs as the runtime holds them, so that a timing leaves out what is no inference."""
        return feeds

    def run_prepared(self, prepared: Any) -> Any:
        """Run once, waiting for the end, and return outputs in the runtime's own form."""
        return self.run(prepared)
