import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import hamerspace
import numpy as np
import pytest
import torch

# typer's import of click 8.5; the command is therefore imported in the tests only.
pytestmark = pytest.mark.filterwarnings("ignore:'click\\.utils\\..*' is deprecated:DeprecationWarning")


def run(*arguments: object) -> tuple[int, str, str]:
    from hamerspace.cli.main import app
    from typer.testing import CliRunner

    found = CliRunner().invoke(app, [str(one) for one in arguments])
    return found.exit_code, found.stdout, found.stderr


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("cli") / "model.pt2"
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Linear(16, 64), torch.nn.ReLU(), torch.nn.Linear(64, 4))
    torch.export.save(torch.export.export(network, (torch.randn(1, 16),)), path)
    return path


def test_help_of_every_command() -> None:
    code, out, _ = run("--help")
    assert code == 0
    for command in ("optimize", "benchmark", "inspect", "backends", "report"):
        assert command in out
        assert run(command, "--help")[0] == 0


def test_backends_say_what_installs_them() -> None:
    code, out, _ = run("backends", "--json")
    found = json.loads(out)
    assert code == 0
    assert {one.value for one in hamerspace.Backend} <= set(found)
    assert found["pytorch"]["available"]
    assert "torch" in found["pytorch"]["reason"]
    assert "pytorch" in run("backends")[1]


def test_inspect(model: Path) -> None:
    code, out, _ = run("inspect", model, "--json")
    found = json.loads(out)
    assert code == 0
    assert found["parameters"] == 16 * 64 + 64 + 64 * 4 + 4
    assert found["inputs"][0]["shape"] == [1, 16]
    assert "openvino" in found["candidates"]
    assert "1,348 parameters" in run("inspect", model)[1]


def test_optimize_report_and_reload(model: Path, tmp_path: Path) -> None:
    np.savez(tmp_path / "data.npz", input=np.random.default_rng(0).normal(size=(8, 16)).astype("float32"))
    code, out, err = run(
        "optimize", model, "--output", tmp_path / "small.onnx", "--backend", "onnx_runtime", "--technique",
        "int8-dynamic", "--data", tmp_path / "data.npz", "--report", tmp_path / "report.json", "--json",
    )  # fmt: skip
    assert code == 0, err
    assert json.loads(out)["backend_used"] == "onnx_runtime"
    found = hamerspace.load(tmp_path / "small.onnx")(np.zeros((3, 16), "float32"))
    assert found.shape == (3, 4)
    code, out, _ = run("report", tmp_path / "report.json", "--output", tmp_path / "page.html")
    assert code == 0
    assert "<svg" in (tmp_path / "page.html").read_text()
    assert "onnx_runtime/int8-dynamic" in run("report", tmp_path / "report.json")[1]


def test_the_ending_of_the_output_chooses_what_is_tried(model: Path, tmp_path: Path) -> None:
    code, out, err = run(
        "optimize", model, "-o", tmp_path / "small.onnx", "--backend", "onnx_runtime", "--backend",
        "openvino", "--technique", "int8-dynamic", "--technique", "int8-weight", "--json",
    )  # fmt: skip
    assert code == 0, err
    found = json.loads(out)
    assert found["backend_used"] == "onnx_runtime"
    told = {(one["backend"], one["reason"]) for one in found["candidates"] if one["outcome"] == "skipped"}
    assert told == {("openvino", "cannot be saved as .onnx")}
    code, out, err = run("optimize", model, "-o", tmp_path / "small.zip", "--backend", "onnx_runtime")
    assert code == 2
    assert "cannot be saved as .zip" in err
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years")
    code, out, err = run("optimize", model, "-o", tmp_path / "mine", "--backend", "onnx_runtime")
    assert code == 2
    assert "thesis.txt" in err


def test_throughput_by_batch(tmp_path: Path) -> None:
    path = tmp_path / "model.pt2"
    batch = torch.export.Dim("batch")
    network = torch.nn.Linear(16, 4)
    torch.export.save(torch.export.export(network, (torch.randn(2, 16),), dynamic_shapes=({0: batch},)), path)
    code, out, err = run(
        "benchmark", path, "--runs", "5", "--batch-size", "1", "--batch-size", "64", "--json"
    )
    assert code == 0, err
    one, many = json.loads(out)
    assert (one["batch_size"], many["batch_size"]) == (1, 64)
    assert many["throughput"] > 4 * one["throughput"]
    assert "at 64 a call" in run("benchmark", path, "--runs", "5", "--batch-size", "64")[1]


@pytest.mark.parametrize("name", ["folder", "whole.pt", "alone.onnx"])
def test_what_was_saved_is_inspected_and_measured(model: Path, tmp_path: Path, name: str) -> None:
    made = hamerspace.get_backend("onnx_runtime").quantize(model, technique="int8-weight")
    path = made.save(tmp_path / name)
    code, out, err = run("inspect", path, "--json")
    assert code == 0, err
    found = json.loads(out)
    assert (found["backend"], found["technique"], found["inputs"][0]["shape"]) == (
        "onnx_runtime",
        "int8-weight",
        [1, 16],
    )
    assert "onnx_runtime/int8-weight, runs in onnxruntime" in run("inspect", path)[1]
    code, out, err = run("benchmark", path, "--runs", "5", "--json")
    assert code == 0, err
    assert json.loads(out)["size_mb"] == pytest.approx(made.manifest.size_bytes / 2**20)
    for wrong in (["--shape", "1,17"], ["--batch-size", "8"]):
        code, out, err = run("benchmark", path, *wrong)
        assert code == 2, wrong
        assert "the model takes" in err


def test_data_that_is_damaged(model: Path, tmp_path: Path) -> None:
    path = tmp_path / "data.npz"
    np.savez_compressed(path, input=np.random.default_rng(0).normal(size=(64, 16)))
    content = path.read_bytes()
    for wrong in (content[:200], content[:300] + b"xxxxxxxx" + content[308:], b"PK", b"", b"\x93NUMPY"):
        path.write_bytes(wrong)
        code, out, err = run("optimize", model, "-o", tmp_path / "x.onnx", "--data", path)
        assert code == 2
        assert "data.npz" in err
        assert "Traceback" not in out + err


BROKEN = """
from hamerspace.backends.base import BaseBackend, Verdict

class Abstract(BaseBackend):
    name = "abstract"

class Raising(BaseBackend):
    name, title, modules = "raising", "Raising", ()

    def is_available(self, *_, **__):
        raise OSError("a library has no symbol")

    supports_model = candidates = build = open = is_available

class Late(Raising):
    name = "late"

    def is_available(self):
        return Verdict(True, "it says")
"""


def test_backends_of_other_packages_that_fail_are_told(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hamerspace.backends import registry

    (tmp_path / "broken_backends.py").write_text(BROKEN)
    found = tmp_path / "broken_backends-1.dist-info"
    found.mkdir()
    (found / "METADATA").write_text("Metadata-Version: 2.1\nName: broken-backends\nVersion: 1\n")
    names = {"abstract": "Abstract", "raising": "Raising", "late": "Late", "gone": "Gone"}
    points = "".join(f"{name} = broken_backends:{made}\n" for name, made in names.items())
    (found / "entry_points.txt").write_text(f"[hamerspace.backends]\n{points}")
    monkeypatch.syspath_prepend(str(tmp_path))
    caches = (registry._offered, registry.get_backend)
    for one in caches:
        one.cache_clear()
    try:
        code, out, _ = run("backends", "--json")
        told = json.loads(out)
        assert code == 0
        assert "abstract" in told["abstract"]["reason"]
        assert told["raising"] == {"available": False, "reason": "a library has no symbol", "extra": ""}
        assert told["late"]["available"]
        assert "Gone" in told["gone"]["reason"]
        code, out, _ = run("inspect", model, "--json")
        assert code == 0
        assert "a library has no symbol" in json.loads(out)["candidates"]["late"]
        made = hamerspace.Optimizer.from_pytorch(model).optimize("auto", techniques="fp16-weight", rounds=5)
        skipped = {one.backend: one.reason for one in made.report.candidates if one.outcome == "skipped"}
        assert {"abstract", "raising", "late", "gone"} <= set(skipped)
    finally:
        for one in caches:
            one.cache_clear()


def test_a_command_that_is_asked_to_end_clears_up(model: Path, tmp_path: Path) -> None:
    (tmp_path / "tmp").mkdir()
    command = f"-m hamerspace optimize {model} -o {tmp_path / 'x.pt'} --backend pytorch"
    environment = {**os.environ, "TMPDIR": str(tmp_path / "tmp")}
    running = subprocess.Popen(
        [sys.executable, *command.split()], env=environment, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 60
    while not any((tmp_path / "tmp").glob("hamerspace-*/artifacts/*")) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert any((tmp_path / "tmp").glob("hamerspace-*/artifacts/*"))
    running.send_signal(signal.SIGTERM)
    assert "Traceback" not in running.communicate(timeout=30)[1]
    assert running.returncode == 128 + signal.SIGTERM
    left = [one.name for one in (tmp_path / "tmp").iterdir() if not one.name.startswith("torchinductor")]
    assert left == []
    assert not (tmp_path / "x.pt").exists()


def test_a_constraint_that_is_not_met_is_exit_code_1(model: Path, tmp_path: Path) -> None:
    code, out, _ = run(
        "optimize", model, "--output", tmp_path / "small.onnx", "--backend", "onnx_runtime", "--technique",
        "int8-dynamic", "--max-size-mb", "0.0001",
    )  # fmt: skip
    assert code == 1
    assert "violated: target_size_mb" in out
    assert (tmp_path / "small.onnx").is_file()


def test_benchmark(model: Path) -> None:
    code, out, err = run("benchmark", model, "--runs", "10", "--json")
    assert code == 0, err
    assert json.loads(out)["latency_ms"] > 0


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["inspect", "nowhere.onnx"], "nowhere.onnx"),
        (["inspect", "{model}", "--shape", "1,x"], "1,x"),
        (["optimize", "{model}", "-o", "x.onnx", "--goal", "shrink"], "may be quantize"),
        (["optimize", "{model}", "-o", "x.onnx", "--max-size-mb", "-1"], "target_size_mb"),
        (["optimize", "{model}", "-o", "x.onnx", "--backend", "tensorrt"], "tensorrt"),
        (["optimize", "{model}", "-o", "x.onnx", "--data", "{model}"], "npz"),
        (["report", "{model}"], "no JSON"),
        (["optimize", "{model}", "-o", "{model}/x.onnx"], "is no folder"),
        (["optimize", "{model}", "-o", "/proc/x/y.onnx"], "/proc"),
    ],
)
def test_misuse_is_exit_code_2_with_the_reason(model: Path, arguments: list[str], said: str) -> None:
    code, out, err = run(*[one.replace("{model}", str(model)) for one in arguments])
    assert code == 2
    assert said in err
    assert "Traceback" not in out + err
