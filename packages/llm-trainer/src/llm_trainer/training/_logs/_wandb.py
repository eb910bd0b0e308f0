"""Weights & Biases."""

from __future__ import annotations

import logging
import secrets
from pathlib import Path
from typing import Any, cast

from llm_trainer._files import check_version, read_json_object, write_json
from llm_trainer.exceptions import FormatError
from llm_trainer.training._logs._base import RunLogger

_logger = logging.getLogger(__name__)

FORMAT_VERSION = 1


class WandbLogger(RunLogger):
    """A run of Weights & Biases; its `WANDB_...` variables name project, account and mode.

    The run's id is kept in `wandb_run.json`, and a resumed training goes on with that run; without a folder
    it becomes another one. What was sent of steps after the resumed one cannot be taken back, so those steps
    are there twice; the axis of the plots is `step`, so that they lie on one another.
    """

    name = "wandb"

    def __init__(self, folder: Path | None, run_name: str | None = None) -> None:
        super().__init__()
        import wandb

        self._wandb = cast("Any", wandb)
        self._folder = folder
        self._run_name = run_name
        self._run: Any = None

    def _start(self, run_info: dict[str, Any], resumed_from_step: int | None) -> None:
        self._close()
        folder = self._folder
        path = None if folder is None else folder / "wandb_run.json"
        run_id = None if resumed_from_step is None or path is None else _known_id(path)
        resumes = run_id is not None
        if run_id is None:
            run_id = secrets.token_hex(8)
            if path is not None:
                write_json(path, {"version": FORMAT_VERSION, "id": run_id})
        self._run = self._wandb.init(
            dir=None if folder is None else str(folder),
            id=run_id,
            name=self._run_name,
            config=run_info,
            resume="allow" if resumes else None,
            # A run of the caller's own stays the current one.
            reinit="create_new",
        )
        self._run.define_metric("step", hidden=True)
        self._run.define_metric("*", step_metric="step")

    def _log(self, step: int, values: dict[str, float]) -> None:
        if self._run is None:
            raise ValueError("the log is not open")
        self._run.log({"step": step, **values})

    def _close(self) -> None:
        if self._run is not None:
            run, self._run = self._run, None
            run.finish()


def _known_id(path: Path) -> str | None:
    """Return the id of the run that is resumed; None, with a warning, if it is not known any more."""
    try:
        content = read_json_object(path)
    except FormatError as error:
        _logger.warning("%s The training goes on as another run of Weights & Biases.", error)
        return None
    check_version(path, content.get("version"), FORMAT_VERSION)
    return str(content.get("id"))
