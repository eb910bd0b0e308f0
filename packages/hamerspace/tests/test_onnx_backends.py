"""Every technique of ONNX and ONNX Runtime: built, opened in a fresh process, compared, weighed."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hamerspace.artifact import Manifest
from hamerspace.backends import get_backend
from hamerspace.backends._onnx_files import compact
from hamerspace.backends._onnx_fusion import attention_unpacked
from hamerspace.backends._onnx_quantize import METHODS, quantize_static
from hamerspace.backends.base import BuildContext, Built, build_artifact
from hamerspace.exceptions import ArtifactError, BackendError, ConstraintError, UnsupportedError
from hamerspace.models import onnx as models
from hamerspace.runtimes.base import RunOptions
from hamerspace.runtimes.onnxruntime import open_runner, open_session

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")
helper, arrays, FLOAT, INT64 = (
    onnx.helper,
    onnx.numpy_helper,
    onnx.TensorProto.FLOAT,
    onnx.TensorProto.INT64,
)


def make(nodes: list[Any], inputs: list[Any], outputs: list[Any], weights: dict[str, Any]) -> Any:
    stored = [arrays.from_array(array, name) for name, array in weights.items()]
    graph = helper.make_graph(nodes, "graph", inputs, outputs, stored)
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=9)


def weights(generator: np.random.Generator, *shape: int) -> Any:
    fan_in = int(np.prod(shape[1:])) if len(shape) > 2 else shape[0]
    return (generator.standard_normal(shape) / np.sqrt(fan_in)).astype(np.float32)


def convolutional() -> Any:
    generator = np.random.default_rng(1)
    return make(
        [
            helper.make_node("Conv", ["image", "w1", "b1"], ["c1"], pads=[1, 1, 1, 1], name="first"),
            helper.make_node("Relu", ["c1"], ["r1"]),
            helper.make_node("Conv", ["r1", "w2", "b2"], ["c2"], pads=[1, 1, 1, 1], strides=[2, 2]),
            helper.make_node("Relu", ["c2"], ["r2"]),
            helper.make_node("Flatten", ["r2"], ["flat"]),
            helper.make_node("Gemm", ["flat", "w3", "b3"], ["scores"]),
        ],
        [helper.make_tensor_value_info("image", FLOAT, ["batch", 1, 8, 8])],
        [helper.make_tensor_value_info("scores", FLOAT, ["batch", 10])],
        {
            "w1": weights(generator, 32, 1, 3, 3),
            "b1": np.zeros(32, np.float32),
            "w2": weights(generator, 64, 32, 3, 3),
            "b2": np.zeros(64, np.float32),
            "w3": weights(generator, 64 * 16, 10),
            "b3": np.zeros(10, np.float32),
        },
    )


def reading() -> Any:
    """Embedding, two matrix products and a residual, on token ids."""
    generator = np.random.default_rng(2)
    return make(
        [
            helper.make_node("Gather", ["table", "ids"], ["rows"], axis=0),
            helper.make_node("MatMul", ["rows", "w1"], ["m1"]),
            helper.make_node("Add", ["m1", "b1"], ["a1"]),
            helper.make_node("Relu", ["a1"], ["r1"]),
            helper.make_node("MatMul", ["r1", "w2"], ["m2"]),
            helper.make_node("Add", ["m2", "rows"], ["hidden"]),
        ],
        [helper.make_tensor_value_info("ids", INT64, ["batch", "length"])],
        [helper.make_tensor_value_info("hidden", FLOAT, ["batch", "length", 128])],
        {
            "table": generator.standard_normal((300, 128)).astype(np.float32),
            "w1": weights(generator, 128, 256),
            "b1": np.zeros(256, np.float32),
            "w2": weights(generator, 256, 128),
        },
    )


# Backend, technique, model, least signal to quantisation noise in dB, least times smaller.
CASES = [
    ("onnx", "fp32", "convolutional", 100, 0.98),
    ("onnx", "graph", "convolutional", 100, 0.98),
    ("onnx", "fp16", "convolutional", 55, 1.9),
    ("onnx", "fp16-weight", "convolutional", 60, 1.9),
    ("onnx", "fp16", "reading", 55, 1.9),
    ("onnx", "fp16-weight", "reading", 60, 1.9),
    ("onnx_runtime", "graph", "convolutional", 100, 0.9),
    ("onnx_runtime", "graph", "reading", 100, 0.9),
    ("onnx_runtime", "int8-static", "convolutional", 30, 3.4),
    ("onnx_runtime", "int8-static", "reading", 30, 3.4),
    ("onnx_runtime", "int8-dynamic", "convolutional", 30, 1.2),
    ("onnx_runtime", "int8-dynamic", "reading", 30, 3.6),
    ("onnx_runtime", "int8-weight", "reading", 35, 3.6),
    ("onnx_runtime", "int4-weight", "reading", 18, 4.5),
]

RELOAD = """
import json, sys
import numpy as np
from hamerspace.backends import get_backend
from hamerspace.runtimes.base import RunOptions
for backend, folder, feeds, target in json.load(open(sys.argv[1])):
    runner = get_backend(backend).load(folder, RunOptions(threads=1))
    np.savez(target, **runner.run(dict(np.load(feeds))))
"""


def sqnr_db(expected: Any, found: Any) -> float:
    noise = float(np.square(expected.astype(np.float64) - found).sum())
    return 10 * np.log10(float(np.square(expected.astype(np.float64)).sum()) / max(noise, 1e-30))


def context(model: Any, backend: str, technique: str, room: Path, **options: Any) -> BuildContext:
    source = models.read(model)
    offered = {one.technique: one for one in get_backend(backend).candidates(source.info)}
    folder = room / f"{backend}-{technique}"
    folder.mkdir(parents=True)
    (room / "shared").mkdir(exist_ok=True)
    chosen = replace(offered[technique], options={**offered[technique].options, **options})
    return BuildContext(
        source=source,
        candidate=chosen,
        folder=folder,
        shared=room / "shared",
        calibration=[source.info.draw(4, seed) for seed in range(8)],
    )


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str, str], tuple[Any, ...]]:
    """Context, manifest, what was built, inputs, and outputs from a fresh process, by case."""
    room = tmp_path_factory.mktemp("onnx")
    made: dict[tuple[str, str, str], tuple[BuildContext, Manifest, Built, Any, Path]] = {}
    jobs: list[list[str]] = []
    for backend, technique, kind, *_ in CASES:
        model = {"convolutional": convolutional, "reading": reading}[kind]()
        given = context(model, backend, technique, room / kind)
        manifest, result = build_artifact(get_backend(backend), given)
        feeds = given.info.draw(5, seed=99)
        np.savez(given.folder.with_suffix(".in.npz"), **feeds)
        target = given.folder.with_suffix(".out.npz")
        jobs.append([backend, str(given.folder), str(given.folder.with_suffix(".in.npz")), str(target)])
        made[backend, technique, kind] = (given, manifest, result, feeds, target)
    (room / "jobs.json").write_text(json.dumps(jobs))
    done = subprocess.run(
        [sys.executable, "-c", RELOAD, str(room / "jobs.json")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return {case: (*parts[:4], dict(np.load(parts[4]))) for case, parts in made.items()}


@pytest.mark.parametrize(("backend", "technique", "kind", "least_db", "least_ratio"), CASES)
def test_technique(
    built: Any, backend: str, technique: str, kind: str, least_db: float, least_ratio: float
) -> None:
    given, manifest, result, feeds, reloaded = built[backend, technique, kind]
    expected = given.source.original(RunOptions(threads=1)).run(feeds)
    in_memory = result.run(feeds)
    assert list(reloaded) == list(expected)
    for name, array in expected.items():
        np.testing.assert_allclose(reloaded[name], in_memory[name], atol=1e-4, rtol=0)
        assert sqnr_db(array, reloaded[name]) > least_db
    assert given.info.size_bytes / manifest.size_bytes > least_ratio
    assert manifest.forms == {".onnx": ("model.onnx",)}
    onnx.checker.check_model(str(given.folder / "model.onnx"))


def element_types(folder: Path) -> set[int]:
    model = onnx.load(str(folder / "model.onnx"))
    return {one.data_type for one in model.graph.initializer if np.prod(one.dims) >= 500}


def test_weights_on_disk_have_the_promised_width(built: Any) -> None:
    def of(*case: str) -> set[int]:
        return element_types(built[case][0].folder)

    proto = onnx.TensorProto
    assert of("onnx", "fp16", "reading") == {proto.FLOAT16}
    assert of("onnx", "fp16-weight", "convolutional") == {proto.FLOAT16}
    assert of("onnx_runtime", "int8-static", "convolutional") == {proto.INT8}
    assert of("onnx_runtime", "int8-dynamic", "reading") == {proto.INT8}
    assert of("onnx_runtime", "int8-weight", "reading") <= {proto.INT8, proto.UINT8}


@pytest.mark.parametrize("method", METHODS)
def test_static_ranges_by_each_method(tmp_path: Path, method: str) -> None:
    given = context(convolutional(), "onnx_runtime", "int8-static", tmp_path, method=method)
    build_artifact(get_backend("onnx_runtime"), given)
    feeds = given.info.draw(4, seed=7)
    expected = given.source.original(RunOptions(threads=1)).run(feeds)["scores"]
    found = get_backend("onnx_runtime").load(given.folder).run(feeds)["scores"]
    assert sqnr_db(expected, found) > 15


def test_static_takes_biases_of_one_row(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    model = make(
        [helper.make_node("MatMul", ["x", "w"], ["p"]), helper.make_node("Add", ["p", "b"], ["y"])],
        [helper.make_tensor_value_info("x", FLOAT, [4, 32])],
        [helper.make_tensor_value_info("y", FLOAT, [4, 48])],
        {"w": weights(generator, 32, 48), "b": generator.standard_normal((1, 48)).astype(np.float32)},
    )
    batches = [{"x": generator.standard_normal((4, 32)).astype(np.float32)} for _ in range(8)]
    plain = open_session(model.SerializeToString(), RunOptions(threads=1)).run(None, batches[0])[0]
    made = quantize_static(model, batches)
    found = open_session(made.SerializeToString(), RunOptions(threads=1)).run(None, batches[0])[0]
    assert sqnr_db(plain, found) > 30


def test_static_refuses_bad_options(tmp_path: Path) -> None:
    given = context(convolutional(), "onnx_runtime", "int8-static", tmp_path, method="guess")
    with pytest.raises(ConstraintError, match="minmax, entropy, percentile"):
        get_backend("onnx_runtime").build(given)
    with pytest.raises(BackendError, match="calibration"):
        get_backend("onnx_runtime").build(replace(given, calibration=None))


def test_says_when_there_is_nothing_to_quantise(tmp_path: Path) -> None:
    plain = make(
        [helper.make_node("Relu", ["x"], ["y"])],
        [helper.make_tensor_value_info("x", FLOAT, ["batch", 4])],
        [helper.make_tensor_value_info("y", FLOAT, ["batch", 4])],
        {},
    )
    for backend, technique in [
        ("onnx_runtime", "int8-dynamic"),
        ("onnx_runtime", "int8-weight"),
        ("onnx", "fp16-weight"),
    ]:
        with pytest.raises(BackendError, match="the model has no"):
            get_backend(backend).build(context(plain, backend, technique, tmp_path / technique))


def test_a_technique_that_is_not_there(tmp_path: Path) -> None:
    given = context(reading(), "onnx", "fp32", tmp_path)
    other = replace(given, candidate=replace(given.candidate, technique="int1"))
    for backend in ("onnx", "onnx_runtime"):
        with pytest.raises(UnsupportedError, match="int1"):
            get_backend(backend).build(other)


def test_unpacked_attention_computes_the_same() -> None:
    generator = np.random.default_rng(3)
    model = make(
        [
            helper.make_node(
                "Attention", ["x", "w", "b", "", "", "mask"], ["y"], domain="com.microsoft", num_heads=4
            )
        ],
        [
            helper.make_tensor_value_info("x", FLOAT, ["batch", "length", 32]),
            helper.make_tensor_value_info("mask", FLOAT, ["batch", 1, "length", "length"]),
        ],
        [helper.make_tensor_value_info("y", FLOAT, ["batch", "length", 32])],
        {"w": weights(generator, 32, 96), "b": generator.standard_normal(96).astype(np.float32)},
    )
    feeds = {
        "x": generator.standard_normal((2, 6, 32)).astype(np.float32),
        "mask": np.where(generator.random((2, 1, 6, 6)) < 0.3, -1e4, 0).astype(np.float32),
    }
    options = RunOptions(threads=1)
    expected = open_session(model.SerializeToString(), options).run(None, feeds)[0]
    changed = attention_unpacked(model)
    assert [node.op_type for node in changed.graph.node] == ["MatMul", "Split", "MultiHeadAttention"]
    found = open_session(changed.SerializeToString(), options).run(None, feeds)[0]
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_several_threads_at_once(built: Any, check_threads: Any) -> None:
    given, _, _, feeds, _ = built["onnx_runtime", "int8-static", "convolutional"]
    runner = get_backend("onnx_runtime").load(given.folder, RunOptions(threads=1))
    check_threads(runner, [{name: array[place:] for name, array in feeds.items()} for place in range(4)])


def test_compact_keeps_what_a_model_does() -> None:
    model = convolutional()
    model.metadata_props.add(key="stack", value="x" * 10_000)
    model.graph.node[0].doc_string = "y" * 10_000
    twin = model.graph.initializer.add()
    twin.CopyFrom(model.graph.initializer[3])
    twin.name = "a_very_long_name_" * 20
    model.graph.node[2].input[2] = twin.name
    feeds = {"image": np.random.default_rng(0).standard_normal((2, 1, 8, 8)).astype(np.float32)}
    before = open_session(model.SerializeToString(), RunOptions(threads=1)).run(["scores"], feeds)[0]
    small = compact(model).SerializeToString()
    after = open_session(small, RunOptions(threads=1)).run(["scores"], feeds)[0]
    np.testing.assert_array_equal(before, after)
    stored = sum(arrays.to_array(one).nbytes for one in convolutional().graph.initializer)
    assert len(small) < stored + 1000


def test_refuses_devices_and_levels_that_are_not_there(tmp_path: Path, built: Any) -> None:
    given, manifest, *_ = built["onnx", "fp32", "convolutional"]
    if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        with pytest.raises(BackendError, match="cuda"):
            open_runner(manifest, given.folder, RunOptions(device="cuda"))
    with pytest.raises(ArtifactError, match="extended"):
        open_runner(replace(manifest, options={"level": "most"}), given.folder, RunOptions())
