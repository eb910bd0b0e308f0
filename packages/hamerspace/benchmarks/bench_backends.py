"""Every backend and technique on four models: speed, size, fidelity, and whether the artifact was proven.

A row is a candidate that was built in a process of its own, saved, opened in a fresh one, compared with the
original there, and timed in turn with it, on one thread. Speed is CPU time against the original: torch eager
for MiniLM and the CNN, a compiled call of the Keras CNN, ONNX Runtime for the model that comes as ONNX.
Run with ``make bench P=hamerspace``; TVM tunes for some minutes.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}

from _models import TASKS
from hamerspace import backend_names
from hamerspace.core.report import CandidateReport, finite
from measuring import environment, table, write_results


def row(one: CandidateReport, original_mb: float) -> list[str]:
    """A line of the table."""
    if one.metrics is None or one.fidelity is None or one.speedup is None:
        return [one.name, one.outcome, "", "", "", "", one.reason[:60]]
    accuracy = "" if one.metrics.accuracy is None else f"{one.metrics.accuracy:.4f}"
    return [
        one.name,
        "proven",
        f"{one.speedup.median:.2f} ({one.speedup.low:.2f} to {one.speedup.high:.2f})",
        f"{original_mb / one.metrics.size_mb:.2f}",
        f"{one.fidelity.cosine:.4f}",
        accuracy,
        "chosen" if one.outcome == "chosen" else "",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", default=list(TASKS), choices=list(TASKS))
    parser.add_argument("--backends", nargs="+", default=None, help="only these (default: all)")
    parser.add_argument("--techniques", nargs="+", default=None, help="only these (default: all)")
    parser.add_argument("--rounds", type=int, default=9, help="turns with the original (default 9)")
    parser.add_argument("--work", type=Path, default=None, help="folder that keeps trained models")
    parser.add_argument("--json", type=Path, help="where to write the results (default: results/ beside it)")
    options = parser.parse_args()
    work = (
        options.work or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hamerspace-bench"
    )
    work.mkdir(parents=True, exist_ok=True)
    found: dict[str, Any] = {}
    for name in options.models:
        task = TASKS[name](work)
        # Named backends are tried with what takes minutes, too.
        offered = options.backends or [one for one in backend_names() if usable(one, task.open().model_info)]
        result = task.open().optimize(
            "auto",
            task.constraints,
            task.data,
            preferred_backends=offered,
            techniques=options.techniques,
            rounds=options.rounds,
            time_limit_s=1800,
            progress=True,
        )
        report = result.report
        old = report.original_metrics
        accuracy = "" if old.accuracy is None else f", accuracy {old.accuracy:.4f}"
        print(f"\n{task.name}: {old.size_mb:.2f} MB, {old.cpu_ms:.3f} CPU ms{accuracy}\n")
        tried = [one for one in report.candidates if one.outcome != "skipped"]
        rows = [row(one, old.size_mb) for one in tried]
        print(table(["candidate", "", "speed", "smaller", "cosine", "accuracy", ""], rows), flush=True)
        found[name] = finite(report.to_dict())
    versions = ["hamerspace", "torch", "onnxruntime", "openvino", "nncf", "tensorflow"]
    path = write_results(__file__, options.json, {"environment": environment(versions), "models": found})
    print(f"\nwritten to {path}")


def usable(name: str, info: Any) -> bool:
    """Whether a backend is there and takes the model."""
    from hamerspace import get_backend

    backend = get_backend(name)
    return bool(backend.is_available()) and bool(backend.supports_model(info))


if __name__ == "__main__":
    main()
