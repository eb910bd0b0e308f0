"""What happened in a run, step by step."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Self

from llm_trainer._files import check_version, write_text
from llm_trainer.exceptions import FormatError

FORMAT_VERSION = 1
_FORMAT = "llm-trainer-history"


@dataclasses.dataclass(frozen=True, kw_only=True)
class HistoryRecord:
    """The state of a run after a step."""

    step: int
    """Steps taken."""
    tokens: int
    """Tokens trained on, padding not counted."""
    wall_s: float
    """Seconds since training began."""
    tokens_per_s: float
    """Tokens of all steps over the seconds that the steps took, evaluation not counted."""
    train_loss: float | None
    """Mean loss, in nats a token, of the steps since the last record; None if none of them made an update."""
    eval_loss: float | None
    """Loss on the evaluation data, where there was an evaluation after this step."""
    lr: float
    """Learning rate of the step."""
    grad_norm: float | None
    """Norm of the step's gradient before clipping; None if it made no update."""
    skipped_steps: int
    """Steps so far whose loss or gradient was not finite, and that changed nothing."""
    epoch: float | None = None
    """Passes over the data so far; None where the data have no length."""
    mfu: float | None = None
    """Floating-point operations of the model a second, as a share of the device's peak."""
    rss_mb: float | None = None
    """Resident memory of the process, in MB of 2**20 bytes."""


class TrainingHistory:
    """Records in the order of their steps."""

    def __init__(self) -> None:
        self.records: list[HistoryRecord] = []

    def __len__(self) -> int:
        return len(self.records)

    def __iter__(self) -> Iterator[HistoryRecord]:
        return iter(self.records)

    def append(self, record: HistoryRecord) -> None:
        """Add the record of a later step."""
        self.records.append(record)

    @property
    def eval_losses(self) -> list[tuple[int, float]]:
        """The step and loss of each evaluation."""
        return [(record.step, record.eval_loss) for record in self.records if record.eval_loss is not None]

    @property
    def train_losses(self) -> list[tuple[int, float]]:
        """The step and training loss of each record that has one."""
        return [(record.step, record.train_loss) for record in self.records if record.train_loss is not None]

    def save(self, path: str | Path) -> None:
        """Write a line of JSON with the format's version, then one a record.

        A number that is not finite, which JSON does not know, is written as null.
        """
        lines = [
            {"format": _FORMAT, "version": FORMAT_VERSION},
            *(
                {name: value if math.isfinite(value or 0) else None for name, value in fields.items()}
                for fields in map(dataclasses.asdict, self)
            ),
        ]
        write_text(Path(path), "".join(json.dumps(line) + "\n" for line in lines))

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read what `save` wrote.

        Raises:
            FormatError: The file is missing, damaged, newer than this release, or something else.
        """
        source = Path(path)
        history = cls()
        try:
            header, *lines = [json.loads(line) for line in source.read_text(encoding="utf-8").splitlines()]
            if header.get("format") != _FORMAT:
                raise FormatError(f"{source} is not a training history.")
            check_version(source, header.get("version"), FORMAT_VERSION)
            history.records = [HistoryRecord(**line) for line in lines]
        except FileNotFoundError:
            raise FormatError(f"{source} does not exist.") from None
        except (ValueError, TypeError, AttributeError) as error:
            if isinstance(error, FormatError):
                raise
            raise FormatError(f"{source} is not a training history, or is damaged: {error}") from error
        return history
