"""What runs in a worker process: building, opening, running and timing one model."""

from __future__ import annotations

import os
import pickle
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Final

from hamerspace._arrays import Kind
from hamerspace._pickling import dumps
from hamerspace._processes import end_with_parent
from hamerspace.measure.fidelity import checked_score
from hamerspace.models.info import Array, Feeds, ModelInfo
from hamerspace.models.source import ModelSource
from hamerspace.runtimes.base import Runner, RunOptions
from hamerspace.runtimes.callable import LoadedModel

_ROUND_S: Final = 0.03
_MOST_CALLS: Final = 500
_WARM_S: Final = 0.2
_WARM_CALLS: Final = 3


class Jobs:
    """The jobs, and the one model that is open."""

    def __init__(self) -> None:
        self._model: LoadedModel | None = None
        self._runner: Runner | None = None
        self._prepared: Any = None

    def describe(self, path: str, options: dict[str, Any]) -> ModelSource:
        """Read a file or folder of TensorFlow's and return what it is, without the live object."""
        from hamerspace.models.tensorflow import read_here

        found = read_here(Path(path), **options)
        return ModelSource(info=found.info, path=found.path or Path(path))

    def build(
        self,
        backend: str,
        context: dict[str, Any],
        probes: Sequence[Feeds],
        score: tuple[Callable[..., Any], Kind] | None,
    ) -> tuple[dict[str, Any], list[dict[str, Array]] | None, tuple[str, ...]]:
        """Build an artifact; return its manifest, outputs of the model before it was saved, and notes."""
        from hamerspace.backends import BuildContext, get_backend
        from hamerspace.backends.base import build_artifact

        def evaluate(runner: Runner) -> float:
            assert score is not None  # noqa: S101 - it is given to the context only then
            return float(score[0](_loaded(runner, context["source"].info, score[1])))

        made = BuildContext(**context, evaluate=evaluate if score is not None else None)
        manifest, built = build_artifact(get_backend(backend), made)
        outputs = None
        if built.run is not None:
            whole = LoadedModel(built.run, manifest.inputs, manifest.outputs)
            outputs = [whole.run(feeds) for feeds in probes]
        return manifest.to_dict(), outputs, built.notes

    def open_original(self, source: ModelSource, options: RunOptions) -> ModelInfo:
        """Open the model as it came in."""
        self._take(source.original(options), source.info)
        return source.info

    def open_artifact(self, path: str, options: RunOptions, info: ModelInfo) -> None:
        """Open what was saved."""
        from hamerspace.loading import find

        self._take(find(Path(path)).open(options), info)

    def _take(self, runner: Runner, info: ModelInfo) -> None:
        self._runner, self._model = runner, _loaded(runner, info, None)

    def run(self, batches: Sequence[Feeds]) -> list[dict[str, Array]]:
        """Return outputs of each batch."""
        assert self._model is not None  # noqa: S101 - a job before this one opened it
        return [self._model.run(feeds) for feeds in batches]

    def evaluate(self, score: Callable[[LoadedModel], Any], kind: Kind) -> float:
        """Return what a function of the caller's says of the open model."""
        assert self._runner is not None  # noqa: S101 - see run
        assert self._model is not None  # noqa: S101
        model = LoadedModel(
            self._runner.run, self._model.inputs, self._model.outputs, self._model.structure, kind
        )
        return checked_score(score(model))

    def prepare(self, feeds: Feeds) -> int:
        """Warm the model up for timing on these inputs; return how many calls make a round."""
        assert self._runner is not None  # noqa: S101 - see run
        self._prepared = self._runner.prepare(feeds)
        start, calls, took = time.perf_counter(), 0, 0.0
        while calls < _WARM_CALLS or time.perf_counter() - start < _WARM_S:
            before = time.perf_counter()
            self._runner.run_prepared(self._prepared)
            took = time.perf_counter() - before
            calls += 1
        return max(1, min(_MOST_CALLS, int(_ROUND_S / max(took, 1e-6))))

    def time_round(self, calls: int) -> tuple[float, list[float]]:
        """Return CPU seconds of the process a call, and wall seconds of each call."""
        assert self._runner is not None  # noqa: S101 - see run
        run, prepared = self._runner.run_prepared, self._prepared
        walls: list[float] = []
        cpu = time.process_time()
        for _ in range(calls):
            start = time.perf_counter()
            run(prepared)
            walls.append(time.perf_counter() - start)
        return (time.process_time() - cpu) / calls, walls

    def peak_mb(self) -> float:
        """Return the largest resident memory of this process so far."""
        from av_memory.probes import lifetime_peak_bytes

        return lifetime_peak_bytes() / 2**20


def _loaded(runner: Runner, info: ModelInfo, kind: Kind | None) -> LoadedModel:
    return LoadedModel(runner.run, runner.inputs, runner.outputs, info.structure, kind, runner)


def serve(descriptor: int, parent: int) -> None:
    """Run jobs that come through a socket until it is closed, or the process that made this one ends."""
    end_with_parent(parent)
    connection: Connection[Any, Any] = Connection(descriptor)
    jobs = Jobs()
    while True:
        try:
            job, arguments, named = pickle.loads(connection.recv_bytes())  # noqa: S301 - of the process that made this one
        except EOFError:
            break
        except Exception as error:  # noqa: BLE001 - what cannot be unpickled here is the caller's to know
            _answer(connection, ("raised", _told(error)))
            continue
        try:
            answer = ("gave", getattr(jobs, job)(*arguments, **named))
        except Exception as error:  # noqa: BLE001 - whatever a backend raises goes to the caller
            answer = ("raised", _told(error))
        sys.stdout.flush()
        sys.stderr.flush()
        _answer(connection, answer)
    # Libraries that crash while they are taken down have done their work by now.
    os._exit(0)


def _told(error: BaseException) -> tuple[str, str, str]:
    lines = [line.strip() for line in str(error).strip().splitlines() if line.strip()]
    said = " ".join(lines)[:600] or "no message"
    return said, type(error).__name__, traceback.format_exc()


def _answer(connection: Connection[Any, Any], answer: Any) -> None:
    try:
        message = dumps(answer)
    except Exception as error:  # noqa: BLE001 - an answer that cannot be sent is told as such
        message = pickle.dumps(("raised", _told(error)))
    connection.send_bytes(message)
