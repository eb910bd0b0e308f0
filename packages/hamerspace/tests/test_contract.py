"""Every name that users were promised, under its import path and with its parameters."""

import inspect
import logging
import subprocess
import sys

import hamerspace
import pytest
from hamerspace import Backend, BaseBackend, Constraints, OptimizationGoal, Optimizer
from hamerspace.backends import get_backend
from hamerspace.exceptions import BackendError, ConstraintError, ModelNotFoundError, UnsupportedError
from hamerspace.measure import Benchmarker
from hamerspace.strategies import (
    CompositeStrategy,
    GraphOptimizationStrategy,
    OptimizationStrategy,
    PruningStrategy,
    QuantizationStrategy,
)
from hamerspace.utils import get_logger, set_log_level


def parameters(function: object) -> list[str]:
    return list(inspect.signature(function).parameters)


def test_optimizer() -> None:
    assert parameters(Optimizer) == ["model", "model_info", "input_shape"]
    assert parameters(Optimizer.from_pytorch)[:2] == ["model_path", "input_shape"]
    assert parameters(Optimizer.from_tensorflow)[:2] == ["model_path", "input_shape"]
    assert parameters(Optimizer.from_onnx)[:1] == ["model_path"]
    assert parameters(Optimizer.optimize)[1:6] == [
        "goal",
        "constraints",
        "validation_data",
        "validation_fn",
        "preferred_backends",
    ]
    assert parameters(Optimizer.benchmark)[1:4] == ["hardware", "num_runs", "batch_size"]
    defaults = {name: one.default for name, one in inspect.signature(Optimizer.benchmark).parameters.items()}
    assert (defaults["hardware"], defaults["num_runs"], defaults["batch_size"]) == ("cpu", 100, 1)


def test_enums() -> None:
    assert {one.name: one.value for one in OptimizationGoal} == {
        "QUANTIZE": "quantize",
        "PRUNE": "prune",
        "DISTILL": "distill",
        "AUTO": "auto",
    }
    assert {one.name: one.value for one in Backend} == {
        "PYTORCH": "pytorch",
        "TENSORFLOW": "tensorflow",
        "ONNX": "onnx",
        "ONNX_RUNTIME": "onnx_runtime",
        "OPENVINO": "openvino",
        "TVM": "tvm",
        "OPTIMUM": "optimum",
        "BITSANDBYTES": "bitsandbytes",
    }


@pytest.mark.parametrize("backend", list(Backend))
def test_backends(backend: Backend) -> None:
    found = get_backend(backend)
    assert isinstance(found, BaseBackend)
    assert found.name == backend.value
    for method in ("is_available", "supports_model", "quantize", "prune", "optimize_graph"):
        assert callable(getattr(found, method))
    assert found.is_available().reason
    for wanted in ("PyTorchBackend", "ONNXBackend", "OpenVINOBackend"):
        assert issubclass(getattr(hamerspace.backends, wanted), BaseBackend)


def test_metrics_and_results() -> None:
    from hamerspace import CompressionReport, ModelMetrics, OptimizationResult

    names = set(inspect.get_annotations(ModelMetrics))
    assert {"size_mb", "latency_ms", "accuracy", "memory_mb", "throughput"} <= names
    promised = {
        "original_metrics",
        "optimized_metrics",
        "optimization_config",
        "size_reduction_ratio",
        "latency_improvement_ratio",
        "accuracy_drop",
        "constraints_satisfied",
        "constraint_violations",
        "execution_time_seconds",
        "backend_used",
    }
    assert promised <= set(inspect.get_annotations(CompressionReport)) | set(vars(CompressionReport))
    assert {"optimized_model", "save_model", "save_config", "save_report"} <= set(vars(OptimizationResult))


def test_benchmarker() -> None:
    assert parameters(Benchmarker.benchmark_model)[1:] == [
        "model",
        "model_info",
        "target_hardware",
        "input_shape",
        "batch_size",
        "num_runs",
    ]


def test_strategies() -> None:
    for kind in (QuantizationStrategy, PruningStrategy, GraphOptimizationStrategy):
        assert issubclass(kind, OptimizationStrategy)
        size, latency = kind().estimate_impact(100.0, 10.0)
        assert 0 < size <= 100
        assert 0 < latency <= 10
    both = CompositeStrategy([GraphOptimizationStrategy(), QuantizationStrategy("int8-static")])
    alone = QuantizationStrategy("int8-static").estimate_impact(100.0, 10.0)
    assert both.estimate_impact(100.0, 10.0).latency < alone.latency
    with pytest.raises(ConstraintError):
        CompositeStrategy([])
    with pytest.raises(ConstraintError, match="amount"):
        PruningStrategy(amount=1.0)


def test_exceptions_are_the_standard_ones() -> None:
    assert issubclass(ConstraintError, ValueError)
    assert issubclass(ModelNotFoundError, FileNotFoundError)
    assert issubclass(BackendError, RuntimeError)
    assert issubclass(UnsupportedError, NotImplementedError)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        Optimizer.from_onnx("nowhere.onnx")
    with pytest.raises(FileNotFoundError, match="nowhere"):
        Optimizer.from_pytorch("nowhere.pt", [1, 3])
    with pytest.raises(FileNotFoundError, match="nowhere"):
        Optimizer.from_tensorflow("nowhere.keras")
    with pytest.raises(FileNotFoundError, match="nowhere"):
        Optimizer.from_config("nowhere.json")
    with pytest.raises(FileNotFoundError, match="nowhere"):
        hamerspace.load("nowhere")


def test_logger(caplog: pytest.LogCaptureFixture) -> None:
    logger = get_logger("mine")
    assert logger.name == "hamerspace.mine"
    assert get_logger("hamerspace.core").name == "hamerspace.core"
    before = logging.getLogger("hamerspace").level
    try:
        set_log_level(logging.DEBUG)
        logger.debug("seen")
        assert "seen" in caplog.text
        set_log_level("ERROR")
        assert not logger.isEnabledFor(logging.WARNING)
    finally:
        set_log_level(before)


def test_importing_loads_nothing_heavy() -> None:
    heavy = ("torch", "tensorflow", "onnx", "onnxruntime", "openvino", "tvm", "transformers", "rich", "typer")
    code = f"import sys, hamerspace; print([name for name in {heavy} if name in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def test_constraints_in_the_order_of_the_contract() -> None:
    assert parameters(Constraints) == [
        "target_size_mb",
        "max_latency_ms",
        "max_accuracy_drop",
        "target_hardware",
        "batch_size",
        "calibration_samples",
    ]
