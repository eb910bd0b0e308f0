"""hamerspace's int8 artifacts beside what the same libraries give when they are called by hand.

By hand is what the documentation of ONNX Runtime and of NNCF shows: export, quantise on the same data, open.
All are timed by the same calls, in turn, on one thread, in CPU time against torch eager.
Run with ``make bench P=hamerspace``.
"""

from __future__ import annotations

import os
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}

import nncf
import numpy as np
import openvino
import torch
from _models import SAMPLES, TASKS
from hamerspace.artifact import list_files, read_manifest
from hamerspace.measure.fidelity import compare
from hamerspace.models.source import ModelSource
from hamerspace.runtimes import RunOptions, open_runtime
from hamerspace.runtimes.base import Runner
from hamerspace.runtimes.onnxruntime import OnnxRunner, open_session
from hamerspace.runtimes.openvino import OpenVINORunner, compile_graph
from measuring import environment, interleave, parse_arguments, table, write_results
from onnxruntime import quantization

OPTIONS = RunOptions(threads=1)
HELD_OUT = 64
Feeds = dict[str, np.ndarray]


def export(module: torch.nn.Module, feeds: Feeds, path: Path) -> Path:
    arguments = {name: torch.from_numpy(array) for name, array in feeds.items()}
    torch.onnx.export(module, (), path, kwargs=arguments, input_names=list(feeds), dynamo=True, verbose=False)
    return path


def ort_dynamic(onnx_file: Path, feeds: list[Feeds], room: Path) -> tuple[Runner, Path]:
    del feeds  # ranges are found at run time
    path = room / "dynamic.onnx"
    quantization.quantize_dynamic(onnx_file, path, per_channel=True)
    return OnnxRunner(open_session(path, OPTIONS), (), ()), path


def ort_static(onnx_file: Path, feeds: list[Feeds], room: Path) -> tuple[Runner, Path]:
    class Reader(quantization.CalibrationDataReader):
        def __init__(self) -> None:
            self.left = iter(feeds)

        def get_next(self) -> Any:
            return next(self.left, None)

    ready, path = room / "ready.onnx", room / "static.onnx"
    quantization.quant_pre_process(onnx_file, ready)
    quantization.quantize_static(ready, path, Reader(), per_channel=True)
    return OnnxRunner(open_session(path, OPTIONS), (), ()), path


def nncf_int8(onnx_file: Path, feeds: list[Feeds], room: Path) -> tuple[Runner, Path]:
    kind = nncf.ModelType.TRANSFORMER if "input_ids" in feeds[0] else None
    graph = nncf.quantize(
        openvino.convert_model(onnx_file), nncf.Dataset(feeds), model_type=kind, subset_size=len(feeds)
    )
    path = room / "int8.xml"
    openvino.save_model(graph, path)
    return OpenVINORunner(compile_graph(openvino.Core().read_model(path), OPTIONS), (), ()), path


ByHand = Callable[[Path, list[Feeds], Path], tuple[Runner, Path]]
BY_HAND: dict[str, list[tuple[str, str, ByHand]]] = {
    "minilm": [
        ("onnx_runtime", "int8-dynamic", ort_dynamic),
        ("openvino", "int8-static", nncf_int8),
    ],
    "cnn": [
        ("onnx_runtime", "int8-static", ort_static),
        ("openvino", "int8-static", nncf_int8),
    ],
}


def size_mb(path: Path) -> float:
    weights = path.with_suffix(".bin") if path.suffix == ".xml" else path.with_name(path.name + ".data")
    return sum(one.stat().st_size for one in (path, weights) if one.is_file()) / 2**20


def outputs_of(runner: Runner, feeds: list[Feeds], names: list[str]) -> list[Feeds]:
    """Outputs under the original's names; exports by hand have others, in the same order."""
    return [dict(zip(names, runner.run(one).values(), strict=False)) for one in feeds]


def measure(name: str, work: Path, room: Path, rounds: int) -> list[dict[str, Any]]:
    task = TASKS[name](work)
    optimizer = task.open()
    source = ModelSource.of(optimizer.model, optimizer.model_info)
    original = source.original(OPTIONS)
    given = task.data[0] if isinstance(task.data, tuple) else task.data
    arrays = given if isinstance(given, dict) else {source.info.inputs[0].name: given}
    feeds = [
        {key: array[place : place + 1] for key, array in arrays.items()}
        for place in range(min(SAMPLES, len(next(iter(arrays.values())))))
    ]
    calibration, held_out = feeds, feeds[-HELD_OUT:]
    runners: dict[str, tuple[Runner, float]] = {"torch eager": (original, source.info.size_bytes / 2**20)}
    onnx_file = export(source.load(), feeds[0], room / f"{name}.onnx")
    for backend, technique, by_hand in BY_HAND[name]:
        folder = room / f"{name}-{backend}"
        folder.mkdir()
        runner, path = by_hand(onnx_file, calibration, folder)
        runners[f"{backend} {technique}, by hand"] = (runner, size_mb(path))
        result = optimizer.optimize(
            "quantize",
            task.constraints,
            task.data,
            preferred_backends=[backend],
            techniques=[technique],
            time_limit_s=1800,
        )
        result.save_model(folder / "ours")
        manifest = read_manifest(folder / "ours")
        ours_mb = sum(size for size, _ in list_files(folder / "ours").values()) / 2**20
        runners[f"{backend} {technique}"] = (open_runtime(manifest, folder / "ours", OPTIONS), ours_mb)
    names = [spec.name for spec in original.outputs] or list(original.run(feeds[0]))
    expected = outputs_of(original, held_out, names)
    prepared = {key: (runner, runner.prepare(feeds[0])) for key, (runner, _) in runners.items()}
    calls = 20 if name == "minilm" else 2000

    def timed(runner: Runner, ready: Any) -> Callable[[], None]:
        def run() -> None:
            for _ in range(calls):
                runner.run_prepared(ready)

        return run

    times = interleave(
        {key: timed(*both) for key, both in prepared.items()}, rounds=max(5, rounds), calls=calls
    )
    base = times["torch eager"].cpu_s
    return [
        {
            "model": name,
            "made": key,
            "cpu_ms": times[key].cpu_s * 1000,
            "speed": base / times[key].cpu_s,
            "size_mb": megabytes,
            "cosine": compare(expected, outputs_of(runner, held_out, names), "held out").cosine,
        }
        for key, (runner, megabytes) in runners.items()
    ]


def main() -> None:
    options = parse_arguments(__doc__ or "")
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    work = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hamerspace-bench"
    work.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="by-hand-") as room:
        rows = [row for name in BY_HAND for row in measure(name, work, Path(room), options.rounds)]
    shown = [
        [one["model"], one["made"], *(f"{one[key]:.{digits}f}" for key, digits in
         (("cpu_ms", 3), ("speed", 2), ("size_mb", 2), ("cosine", 4)))]
        for one in rows
    ]  # fmt: skip
    print(table(["model", "", "CPU ms", "speed", "MB", "cosine"], shown))
    versions = ["hamerspace", "torch", "onnxruntime", "openvino", "nncf"]
    found = {"environment": environment(versions), "rows": rows}
    print(f"written to {write_results(__file__, options.json, found)}")


if __name__ == "__main__":
    main()
