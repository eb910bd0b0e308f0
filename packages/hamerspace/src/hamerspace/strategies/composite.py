"""Several strategies, one after the other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from hamerspace._rooms import Room
from hamerspace.backends.base import Artifact
from hamerspace.backends.registry import Backend
from hamerspace.exceptions import ConstraintError, UnsupportedError
from hamerspace.measure.data import read_batches
from hamerspace.models.info import ModelInfo
from hamerspace.models.source import ModelSource
from hamerspace.strategies.base import Impact, OptimizationStrategy


class CompositeStrategy(OptimizationStrategy):
    """Applies strategies in turn, each to what the one before it made.

    A later step takes the earlier one's model as the file that it has alone (``.onnx`` or ``.pt2``); for
    steps within one backend that is always there where the backend keeps to one format, as ONNX and ONNX
    Runtime do.

    Args:
        strategies: at least one.

    Raises:
        ConstraintError: there is none.
    """

    def __init__(self, strategies: Sequence[OptimizationStrategy]) -> None:
        if not strategies:
            raise ConstraintError("a composite strategy wants at least one strategy")
        self.strategies = tuple(strategies)

    def apply(
        self,
        model: Any,
        model_info: ModelInfo | None = None,
        *,
        backend: Backend | str = Backend.PYTORCH,
        calibration_data: Any = None,
        output: str | Path | None = None,
    ) -> Artifact:
        """Apply every strategy; see `OptimizationStrategy.apply`.

        Raises:
            UnsupportedError: a step's model has no form that the next one can read.
        """
        *earlier, last = self.strategies
        source = ModelSource.of(model, model_info)
        # Once, for what gives batches may give them only once.
        data = None if calibration_data is None else read_batches(calibration_data, source.info)
        with Room() as room:
            for number, strategy in enumerate(earlier):
                made = strategy.apply(source, backend=backend, calibration_data=data)
                forms = [ending for ending in (".onnx", ".pt2") if ending in made.manifest.forms]
                if not forms or made.manifest.runtime == "aot_inductor":
                    raise UnsupportedError(
                        f"what {made.manifest.backend}/{made.manifest.technique} makes cannot be "
                        "optimised further"
                    )
                found = ModelSource.of(made.save(room / f"step{number}{forms[0]}"))
                # A file does not say whether its outputs were a tuple's or had names.
                info = replace(found.info, structure=source.info.structure, outputs=source.info.outputs)
                source = replace(found, info=info)
            return last.apply(source, backend=backend, calibration_data=data, output=output)

    def estimate_impact(self, size: float, latency: float) -> Impact:
        """Guess size and latency after all steps."""
        for strategy in self.strategies:
            size, latency = strategy.estimate_impact(size, latency)
        return Impact(size, latency)
