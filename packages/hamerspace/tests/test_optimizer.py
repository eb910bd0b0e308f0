"""The whole road on small models: from a module to a proven artifact, and what fails on the way."""

import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hamerspace
import numpy as np
import pytest
import torch
from hamerspace import Constraints, OptimizationGoal, OptimizationResult, Optimizer, get_backend
from hamerspace.backends import registry
from hamerspace.exceptions import (
    ArtifactError,
    BackendError,
    BackendUnavailableError,
    ConstraintError,
    ModelError,
    ModelInputError,
    UnsupportedError,
)

TECHNIQUES = ["int8-dynamic", "torchscript"]

BROKEN = """
import os, signal, time
from hamerspace.backends import BaseBackend, Built, Candidate, Verdict
from hamerspace.backends.registry import get_backend

class Broken(BaseBackend):
    name = "broken"
    title = "Broken"
    modules = ()

    def supports_model(self, model_info):
        return Verdict(True, "any")

    def candidates(self, model_info, *, hardware="cpu"):
        return [Candidate(backend="broken", technique=how, goal="quantize", description="fails",
                          expected_speed=100 - place, time_limit_s=12 if how == "hang" else None)
                for place, how in enumerate(["crash", "hang", "raise", "liar", "nan", "nothing", "good"])]

    def build(self, context):
        how = context.candidate.technique
        if how == "crash":
            os.kill(os.getpid(), signal.SIGSEGV)
        if how == "hang":
            time.sleep(600)
        if how == "raise":
            raise ArithmeticError("a wheel came off")
        if how == "nothing":
            return Built(runtime="torch_export", main="model.pt2")
        import torch
        model = context.source.load()
        if how == "nan":
            model = torch.nn.Sequential(model, Division())
        example = tuple(torch.from_numpy(x) for x in context.example().values())
        torch.export.save(torch.export.export(model, example), str(context.folder / "model.pt2"))
        scale = 2.0 if how == "liar" else 1.0
        run = lambda feeds: {"output": scale * model(torch.from_numpy(feeds["input"])).detach().numpy()}
        return Built(runtime="torch_export", main="model.pt2", run=None if how == "nan" else run)

    def open(self, manifest, folder, options):
        from hamerspace.runtimes.opening import open_runtime
        return open_runtime(manifest, folder, options)

import torch
class Division(torch.nn.Module):
    def forward(self, x):
        return x * float("nan")
"""


def network() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Flatten(), torch.nn.Linear(64, 128), torch.nn.ReLU(), torch.nn.Linear(128, 10)
    )


def samples(count: int = 32) -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.randn(count, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    return x, network()(x).argmax(1)


@pytest.fixture(scope="module")
def result() -> OptimizationResult:
    optimizer = Optimizer.from_pytorch(network(), [1, 1, 8, 8])
    return optimizer.optimize(
        "auto",
        Constraints(max_accuracy_drop=0.1, target_size_mb=1.0),
        validation_data=samples(),
        preferred_backends=["pytorch"],
        techniques=TECHNIQUES,
        rounds=5,
    )


@pytest.mark.parametrize(
    "wrong",
    [
        {"threads": 0},
        {"time_limit_s": -1},
        {"memory_limit_mb": 0},
        {"rounds": 7.5},
        {"min_cosine": float("nan")},
    ],
    ids=lambda wrong: next(iter(wrong)),
)
def test_limits_out_of_range_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConstraintError, match=next(iter(wrong))):
        Optimizer.from_pytorch(network(), [1, 1, 8, 8]).optimize("auto", **wrong)


def test_techniques_may_be_one_name() -> None:
    with pytest.raises(ConstraintError, match=r"\['int8-dyn'\]"):
        Optimizer.from_pytorch(network(), [1, 1, 8, 8]).optimize("auto", techniques="int8-dyn")


def test_a_free_batch_is_timed_at_the_batch_size_of_the_metrics() -> None:
    class Slow(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = torch.nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if not torch.compiler.is_compiling():
                time.sleep(0.005 * len(x))
            return self.linear(x)

    found = Optimizer.from_pytorch(Slow(), [None, 4]).optimize(
        "auto", None, torch.randn(64, 4), preferred_backends=["pytorch"], techniques=["export"], rounds=5
    )
    metrics = found.report.original_metrics
    assert metrics.batch_size == 1
    assert 5 < metrics.latency_p50_ms < 60


@pytest.fixture
def broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A package that offers a backend which fails in every way there is."""
    (tmp_path / "broken_backend.py").write_text(BROKEN)
    info = tmp_path / "broken-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: broken\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[hamerspace.backends]\nbroken = broken_backend:Broken\n")
    monkeypatch.syspath_prepend(tmp_path)
    caches = (registry._offered, registry.get_backend)
    for one in caches:
        one.cache_clear()
    yield
    for one in caches:
        one.cache_clear()


def test_the_result_meets_its_constraints(result: OptimizationResult) -> None:
    report = result.report
    assert report.constraints_satisfied
    assert report.constraint_violations == []
    assert report.backend_used == "pytorch"
    assert {one.name for one in report.candidates if one.outcome in ("chosen", "proven")} == {
        f"pytorch/{technique}" for technique in TECHNIQUES
    }
    assert report.accuracy_drop is not None
    assert report.accuracy_drop <= 0.1
    assert report.original_metrics.accuracy == 1.0, "the labels are the network's own"


def test_figures_are_of_the_files_that_were_saved(result: OptimizationResult, tmp_path: Path) -> None:
    folder = result.save_model(tmp_path / "model")
    stored = sum(path.stat().st_size for path in folder.iterdir() if path.name != "hamerspace.json")
    assert result.report.optimized_metrics.size_mb == pytest.approx(stored / 2**20)
    old, new = result.report.original_metrics, result.report.optimized_metrics
    assert old.size_mb == pytest.approx(4 * (64 * 128 + 128 + 128 * 10 + 10) / 2**20)
    assert result.report.size_reduction_ratio == pytest.approx(1 - new.size_mb / old.size_mb)
    assert result.report.latency_improvement_ratio == pytest.approx(old.latency_ms / new.latency_ms)
    assert new.latency_p50_ms <= new.latency_p90_ms <= new.latency_p99_ms
    low, high = new.latency_interval_ms
    assert low <= new.latency_ms <= high


def test_the_saved_model_gives_what_the_original_gives(result: OptimizationResult, tmp_path: Path) -> None:
    x, _ = samples(5)
    wanted = network()(x).detach()
    for path in (tmp_path / "model.pt", tmp_path / "folder"):
        model = hamerspace.load(result.save_model(path))
        found = model(x)
        assert isinstance(found, torch.Tensor)
        cosine = torch.nn.functional.cosine_similarity(found, wanted, dim=1)
        assert cosine.min() > 0.99
    torch.testing.assert_close(result.optimized_model(x), found)


def test_an_ending_that_cannot_be_is_refused_with_those_that_can(
    result: OptimizationResult, tmp_path: Path
) -> None:
    with pytest.raises(NotImplementedError, match=r"\.pt"):
        result.save_model(tmp_path / "model.tflite")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("ending", [".txt", ".md", ".json", ".html"])
def test_reports(result: OptimizationResult, tmp_path: Path, ending: str) -> None:
    text = result.save_report(tmp_path / f"report{ending}").read_text()
    assert "int8-dynamic" in text
    assert "torchscript" in text
    if ending == ".json":
        data = json.loads(text)
        assert data["size_reduction_ratio"] == pytest.approx(result.report.size_reduction_ratio)
        from hamerspace.core.report import report_from_dict

        assert str(report_from_dict(data)) == str(result.report)
    if ending == ".html":
        assert "<svg" in text
        assert "http" not in text.replace("http-equiv", ""), "a page fetches nothing"
    with pytest.raises(NotImplementedError, match=r"\.pdf"):
        result.save_report(tmp_path / "report.pdf")


def test_a_saved_configuration_repeats_the_optimisation(result: OptimizationResult, tmp_path: Path) -> None:
    path = result.save_config(tmp_path / "config.json")
    with pytest.raises(ModelError, match="model="):
        Optimizer.from_config(path)
    again = Optimizer.from_config(path, model=network()).apply(
        samples() if result.config.calibrated else None
    )
    assert (again.report.backend_used, again.report.technique_used) == (
        result.report.backend_used,
        result.report.technique_used,
    )
    x, _ = samples(4)
    torch.testing.assert_close(again.optimized_model(x), result.optimized_model(x), atol=1e-4, rtol=1e-4)
    with pytest.raises(ModelError, match="parameters"):
        Optimizer.from_config(path, model=torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10)))


def test_a_configuration_of_a_file(tmp_path: Path) -> None:
    trained, weights = network(), tmp_path / "weights.pt"
    torch.manual_seed(1)
    for one in trained.parameters():
        torch.nn.init.normal_(one)
    torch.save(trained.state_dict(), weights)
    optimizer = Optimizer.from_pytorch(weights, [1, 1, 8, 8], model=network())
    saved = optimizer.optimize(
        "auto",
        preferred_backends="pytorch",
        techniques="export",
        rounds=5,
        min_cosine=0.5,
        memory_limit_mb=9000,
    ).save_config(tmp_path / "config.json")
    with pytest.raises(ModelError, match="weights alone; give the module"):
        Optimizer.from_config(saved)
    found = Optimizer.from_config(saved, model=network())
    assert all(torch.equal(a, b) for a, b in zip(found.model.parameters(), trained.parameters(), strict=True))
    kept = found.apply(progress=False).config
    assert (kept.rounds, kept.min_cosine, kept.memory_limit_mb, kept.time_limit_s) == (5, 0.5, 9000, None)
    torch.save(network().state_dict(), weights)
    with pytest.raises(ModelError, match="not the model"):
        Optimizer.from_config(saved, model=network())
    weights.unlink()
    with pytest.raises(FileNotFoundError, match=r"weights\.pt"):
        Optimizer.from_config(saved, model=network())


# What torch.jit says of itself.
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning")
def test_a_configuration_keeps_dtypes_and_its_hash(tmp_path: Path) -> None:
    class Scaled(torch.nn.Module):
        def forward(self, x: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
            return x * factor[:, None]

    path = tmp_path / "scaled.pt"
    torch.jit.save(torch.jit.script(Scaled()), str(path))
    examples = {"x": torch.randn(2, 5), "factor": torch.tensor([2, 3])}
    optimizer = Optimizer.from_pytorch(path, [[None, 5], [None]], example_inputs=examples)
    saved = optimizer.optimize(
        "auto", preferred_backends="pytorch", techniques="torchscript", rounds=5
    ).save_config(tmp_path / "config.json")
    assert Optimizer.from_config(saved).model_info.inputs == optimizer.model_info.inputs
    elsewhere = tmp_path / "elsewhere.pt"
    path.rename(elsewhere)
    with pytest.raises(FileNotFoundError, match=r"scaled\.pt"):
        Optimizer.from_config(saved)
    Optimizer.from_config(saved, model=elsewhere)
    torch.jit.save(torch.jit.script(torch.nn.Identity()), str(elsewhere))
    with pytest.raises(ModelError):
        Optimizer.from_config(saved, model=elsewhere)
    entries = json.loads(saved.read_text())
    for wrong in ({"framework": "jax"}, {"structure": "list"}, {"inputs": 3}):
        saved.write_text(json.dumps({**entries, "model": {**entries["model"], **wrong}}))
        with pytest.raises(ArtifactError, match="damaged"):
            Optimizer.from_config(saved)
    for key, wrong in (
        ("rounds", "9"),
        ("options", []),
        ("backend", 3),
        ("min_cosine", None),
        ("threads", 0),
    ):
        saved.write_text(json.dumps({**entries, key: wrong}))
        with pytest.raises(ArtifactError, match="damaged"):
            Optimizer.from_config(saved)


def test_outputs_whose_samples_are_not_the_first_axis() -> None:
    gru = torch.nn.GRU(4, 5, num_layers=2, batch_first=True).eval()
    found = Optimizer.from_pytorch(gru, [2, 3, 4]).optimize(
        "auto", preferred_backends="onnx_runtime", techniques="graph", rounds=5
    )
    assert found.report.fidelity is not None
    assert found.report.fidelity.cosine > 0.9999
    x = torch.randn(5, 3, 4)
    with torch.no_grad():
        torch.testing.assert_close(found.optimized_model(x), gru(x), atol=1e-4, rtol=1e-4)


def test_without_data_accuracy_is_undecided_and_said_so() -> None:
    found = Optimizer.from_pytorch(network(), [1, 1, 8, 8]).optimize(
        OptimizationGoal.AUTO,
        Constraints(target_size_mb=10, max_latency_ms=5000, max_accuracy_drop=0.02, target_hardware="cpu"),
        preferred_backends=["pytorch"],
        techniques=["int8-dynamic", "int8-static"],
        rounds=5,
    )
    report = found.report
    assert not report.constraints_satisfied
    assert report.constraint_violations == []
    assert [one.split(":")[0] for one in report.constraints_undecided] == ["max_accuracy_drop"]
    assert "validation_fn" in str(report)
    assert report.fidelity is not None
    assert report.fidelity.basis == "random inputs"
    skipped = [one for one in report.candidates if one.outcome == "skipped"]
    assert [one.technique for one in skipped] == ["int8-static"]
    assert "calibration" in skipped[0].reason


def test_a_validation_function_gets_tensors_of_torch() -> None:
    x, labels = samples()

    def score(model: Any) -> float:
        found = model(x)
        assert isinstance(found, torch.Tensor)
        return float((found.argmax(1) == labels).float().mean())

    lock = threading.Lock()  # cannot be pickled, so that this one runs here and the model in its worker

    def here(model: Any) -> float:
        with lock:
            return score(model)

    optimizer = Optimizer.from_pytorch(network(), [1, 1, 8, 8])
    for function in (score, here):
        report = optimizer.optimize(
            "quantize",
            validation_fn=function,
            preferred_backends="pytorch",
            techniques=["int8-dynamic"],
            rounds=5,
        ).report
        assert report.original_metrics.accuracy == 1.0
        assert report.optimized_metrics.accuracy is not None
        assert report.optimized_metrics.accuracy > 0.8


def test_whatever_a_backend_does_the_run_goes_on(broken: None) -> None:
    found = Optimizer.from_pytorch(network(), [1, 1, 8, 8]).optimize(
        "quantize", preferred_backends=["broken"], rounds=5
    )
    assert found.report.technique_used == "good"
    reasons = {one.technique: one.reason for one in found.report.candidates if one.outcome == "failed"}
    assert set(reasons) == {"crash", "hang", "raise", "liar", "nan", "nothing"}
    assert "SIGSEGV" in reasons["crash"]
    assert "longer than 12 s" in reasons["hang"]
    assert "ArithmeticError: a wheel came off" in reasons["raise"]
    assert "differs from what was saved" in reasons["liar"]
    assert "NaN" in reasons["nan"]
    assert "did not" in reasons["nothing"]


def test_a_run_that_ends_with_nothing_says_why(broken: None) -> None:
    with pytest.raises(BackendError, match=r"broken/raise: ArithmeticError: a wheel came off"):
        Optimizer.from_pytorch(network(), [1, 1, 8, 8]).optimize(
            "quantize", preferred_backends=["broken"], techniques=["raise"], rounds=5
        )


def test_pruning_is_reported_as_what_it_is() -> None:
    report = (
        Optimizer.from_pytorch(network(), [1, 1, 8, 8]).optimize(
            "prune", preferred_backends="pytorch", rounds=5
        )
    ).report
    assert report.size_reduction_ratio < 0.1
    assert "no faster by itself" in str(report)


def test_the_callers_model_is_left_as_it_was() -> None:
    model = network().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    Optimizer.from_pytorch(model, [1, 1, 8, 8]).optimize(
        "quantize", preferred_backends="pytorch", techniques=["int8-dynamic"], rounds=5
    )
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_benchmark_measures_the_original() -> None:
    found = Optimizer.from_pytorch(network(), [1, 1, 8, 8]).benchmark(num_runs=20, batch_size=4)
    assert found.runs >= 20
    assert found.batch_size == 4
    assert found.throughput == pytest.approx(4000 / found.latency_ms)
    assert found.memory_mb > 50, "a process with torch"


@pytest.mark.parametrize(
    ("arguments", "error", "said"),
    [
        ({"goal": "shrink"}, ValueError, "may be quantize"),
        ({"goal": "distill"}, NotImplementedError, "not there yet"),
        ({"goal": "auto", "preferred_backends": ["tensorrt"]}, ConstraintError, "openvino"),
        ({"goal": "auto", "constraints": {"max_latency_ms": 5}}, ConstraintError, "Constraints"),
        ({"goal": "auto", "rounds": 2}, ConstraintError, "5 at the least"),
        ({"goal": "auto", "validation_data": np.ones((4, 1, 8, 8), int)}, ModelInputError, "int64"),
        (
            {"goal": "auto", "validation_data": np.ones((4, 3, 9, 9), "float32")},
            ModelInputError,
            r"\[4, 3, 9, 9\]",
        ),
        ({"goal": "auto", "validation_data": []}, ModelInputError, "empty"),
        (
            {"goal": "auto", "techniques": ["int8-dynamic", "int3"]},
            ConstraintError,
            r"\['int3'\].*int8-dynamic",
        ),
        ({"goal": "prune", "techniques": "int8-dynamic"}, UnsupportedError, "by int8-dynamic"),
        ({"goal": "auto", "seed": -1}, ConstraintError, "seed"),
        ({"goal": "quantize", "preferred_backends": ["tensorflow"]}, UnsupportedError, "tensorflow"),
    ],
)
def test_misuse_is_told_before_any_work(arguments: dict[str, Any], error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said):
        Optimizer.from_pytorch(network(), [1, 1, 8, 8]).optimize(**arguments)


def test_a_model_that_gives_nan() -> None:
    model = network()
    with torch.no_grad():
        model[1].weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match="NaN"):
        Optimizer.from_pytorch(model, [1, 1, 8, 8])


def test_a_backend_that_is_not_installed_says_what_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = get_backend("openvino")
    monkeypatch.setattr(type(backend), "modules", ("no_such_module_at_all",))
    assert not backend.is_available()
    with pytest.raises(BackendUnavailableError, match="pip install no_such_module_at_all"):
        Optimizer.from_pytorch(network(), [1, 1, 8, 8]).optimize("auto", preferred_backends=["openvino"])


def test_apply_wants_a_configuration() -> None:
    with pytest.raises(ValueError, match="from_config"):
        Optimizer.from_pytorch(network(), [1, 1, 8, 8]).apply()
