"""TensorBoard's event files.

They are written with TensorBoard's own messages and records, but not with its writer (which
`torch.utils.tensorboard` uses too): that one loads all of TensorFlow wherever it is installed, for ten
seconds and some hundred MB, and writes on a thread where a full disk is never heard of.
"""

from __future__ import annotations

import importlib
import json
import os
import socket
import time
from pathlib import Path
from typing import Any, Protocol

from llm_trainer.training._logs._append import AppendFile
from llm_trainer.training._logs._base import RunLogger


class _Records(Protocol):
    def write(self, data: bytes) -> None: ...

    def close(self) -> None: ...


def _load(module: str) -> Any:
    # TensorBoard has no type annotations.
    return importlib.import_module(module)


class TensorBoardLogger(RunLogger):
    """Event files in the folder `tensorboard`, one more at each start.

    A new file says from which step on it replaces the earlier ones, so that after a resume no step is
    shown twice, and after a new beginning in an old folder nothing of the earlier run.
    """

    name = "tensorboard"

    def __init__(self, folder: Path) -> None:
        super().__init__()
        proto = "tensorboard.compat.proto"
        self._event = _load(f"{proto}.event_pb2")
        self._summary = _load(f"{proto}.summary_pb2")
        self._tensor = _load(f"{proto}.tensor_pb2")
        self._types = _load(f"{proto}.types_pb2")
        self._record_writer = _load("tensorboard.summary.writer.record_writer").RecordWriter
        self.folder = folder / "tensorboard"
        self._records: _Records | None = None

    def _start(self, run_info: dict[str, Any], resumed_from_step: int | None) -> None:
        self._close()
        self.folder.mkdir(parents=True, exist_ok=True)
        # Later than all that are there, whatever the clock says.
        seconds, nanoseconds = max(divmod(time.time_ns(), 10**9), self._after_the_newest())
        # The reader takes the files in the order of their names.
        name = f"events.out.tfevents.{seconds:010d}.{nanoseconds:09d}.{socket.gethostname()}.{os.getpid()}"
        self._records = self._record_writer(AppendFile(self.folder / name))
        self._write(file_version="brain.Event:2")
        first = 0 if resumed_from_step is None else resumed_from_step + 1
        start = self._event.SessionLog(status=self._event.SessionLog.START)
        self._write(step=first, session_log=start)
        # Four blanks make the text a block of code, which shows as it is.
        text = "".join(f"    {line}\n" for line in json.dumps(run_info, indent=2).splitlines())
        self._write(step=first, summary=self._text_summary("run", text))

    def _after_the_newest(self) -> tuple[int, int]:
        times = [(0, 0)]
        for path in self.folder.glob("events.out.tfevents.*"):
            parts = path.name.split(".")
            if parts[3].isdecimal() and parts[4].isdecimal():
                times.append((int(parts[3]), int(parts[4]) + 1))
        return max(times)

    def _log(self, step: int, values: dict[str, float]) -> None:
        scalars = [self._summary.Summary.Value(tag=tag, simple_value=value) for tag, value in values.items()]
        self._write(step=step, summary=self._summary.Summary(value=scalars))

    def _close(self) -> None:
        if self._records is not None:
            records, self._records = self._records, None
            records.close()

    def _write(self, **fields: Any) -> None:
        if self._records is None:
            raise ValueError("the log is not open")
        self._records.write(self._event.Event(wall_time=time.time(), **fields).SerializeToString())

    def _text_summary(self, tag: str, text: str) -> Any:
        metadata = self._summary.SummaryMetadata(
            plugin_data=self._summary.SummaryMetadata.PluginData(plugin_name="text")
        )
        tensor = self._tensor.TensorProto(dtype=self._types.DT_STRING, string_val=[text.encode()])
        value = self._summary.Summary.Value(tag=tag, metadata=metadata, tensor=tensor)
        return self._summary.Summary(value=[value])
