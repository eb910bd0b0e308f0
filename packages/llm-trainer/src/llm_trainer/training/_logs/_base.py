"""What every log of a run has in common."""

from __future__ import annotations

import json
import logging
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

_logger = logging.getLogger(__name__)


class RunLogger(ABC):
    """Writes the figures of a run somewhere; a subclass says where in `_start`, `_log` and `_close`.

    What goes wrong in `start` is raised, for nothing is lost yet. What goes wrong later is warned of once:
    no log is worth a training, so neither `log` nor `close` lets an exception out.
    """

    name: ClassVar[str]
    """What `report_to` calls it, and warnings too."""

    def __init__(self) -> None:
        self._lost = 0

    def start(self, run_info: Mapping[str, Any], *, resumed_from_step: int | None = None) -> None:
        """Begin a run's log, or go on with it.

        Args:
            run_info: Settings of the run; what JSON cannot hold is written as text.
            resumed_from_step: Last step that is kept of the log of an earlier start; None begins anew.

        Raises:
            OSError: The log cannot be written.
            FormatError: A newer release wrote the log.
        """
        self._lost = 0
        # JSON has no NaN: its names for such numbers become None.
        plain = json.loads(json.dumps(dict(run_info), default=str), parse_constant=lambda _: None)
        self._start(plain, resumed_from_step)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Write the figures after a step; one that is not finite is written as the kind of log allows."""
        try:
            self._log(step, {name: float(value) for name, value in values.items()})
        except Exception as error:  # noqa: BLE001 - whatever a log raises, training goes on
            self._lost += 1
            if self._lost == 1:
                _logger.warning("The %s log cannot be written at step %s: %r.", self.name, step, error)

    def close(self) -> None:
        """End the log; a second time does nothing."""
        try:
            self._close()
        except Exception as error:  # noqa: BLE001 - the run is over, and its result is not the log
            _logger.warning("The %s log could not be closed: %r.", self.name, error)
        if self._lost:
            _logger.warning("The %s log lacks %d records.", self.name, self._lost)
            self._lost = 0

    @abstractmethod
    def _start(self, run_info: dict[str, Any], resumed_from_step: int | None) -> None:
        """Open the log, without the records after `resumed_from_step`."""

    @abstractmethod
    def _log(self, step: int, values: dict[str, float]) -> None:
        """Write one record."""

    @abstractmethod
    def _close(self) -> None:
        """Close the log if it is open."""
