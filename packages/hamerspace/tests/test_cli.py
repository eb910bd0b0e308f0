import json
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
    ],
)
def test_misuse_is_exit_code_2_with_the_reason(model: Path, arguments: list[str], said: str) -> None:
    code, out, err = run(*[one.replace("{model}", str(model)) for one in arguments])
    assert code == 2
    assert said in err
    assert "Traceback" not in out + err
