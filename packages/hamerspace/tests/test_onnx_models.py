"""Reading ONNX files: what is found out, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hamerspace.exceptions import ConstraintError, ModelError, ModelNotFoundError
from hamerspace.models import onnx as models
from hamerspace.models.source import ModelSource
from hamerspace.runtimes.base import RunOptions

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
helper, arrays, FLOAT, INT64 = (
    onnx.helper,
    onnx.numpy_helper,
    onnx.TensorProto.FLOAT,
    onnx.TensorProto.INT64,
)


def make(nodes: list[Any], inputs: list[Any], outputs: list[Any], weights: dict[str, Any]) -> Any:
    stored = [arrays.from_array(array, name) for name, array in weights.items()]
    graph = helper.make_graph(nodes, "graph", inputs, outputs, stored)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)


def looking_up(rows: int = 11) -> Any:
    """Sum of three embeddings after a linear layer: ids of int64 in, 5 numbers out."""
    generator = np.random.default_rng(0)
    return make(
        [
            helper.make_node("Cast", ["ids"], ["whole"], to=INT64),
            helper.make_node("Gather", ["table", "whole"], ["rows"], axis=0),
            helper.make_node("Gather", ["kinds", "segment"], ["kind"], axis=0),
            helper.make_node("Add", ["rows", "kind"], ["both"]),
            helper.make_node("MatMul", ["both", "weight"], ["scores"]),
        ],
        [
            helper.make_tensor_value_info("ids", onnx.TensorProto.INT32, ["n", None]),
            helper.make_tensor_value_info("segment", INT64, ["n", None]),
        ],
        [helper.make_tensor_value_info("scores", FLOAT, ["n", None, 5])],
        {
            "table": generator.standard_normal((rows, 4)).astype(np.float32),
            "kinds": generator.standard_normal((2, 4)).astype(np.float32),
            "weight": generator.standard_normal((4, 5)).astype(np.float32),
        },
    )


def test_describes_dynamic_axes_and_sizes_of_tables(tmp_path: Path) -> None:
    onnx.save(looking_up(), str(tmp_path / "model.onnx"))
    info = models.read(tmp_path / "model.onnx").info
    ids, segment = info.inputs
    assert (ids.name, ids.dtype, ids.shape, ids.high) == ("ids", "int32", ("n", "axis_1"), 11)
    assert (segment.name, segment.dtype, segment.high) == ("segment", "int64", 2)
    assert [(one.name, one.shape[-1]) for one in info.outputs] == [("scores", 5)]
    assert info.parameters == 11 * 4 + 2 * 4 + 4 * 5
    assert info.size_bytes == 4 * info.parameters
    assert (info.framework, info.form, info.structure) == ("onnx", "onnx", "tensor")


def test_runs_as_numpy_does(tmp_path: Path) -> None:
    model = looking_up()
    source = models.read(model)
    feeds = source.info.draw(3)
    table, kinds, weight = (arrays.to_array(one) for one in model.graph.initializer)
    expected = (table[feeds["ids"]] + kinds[feeds["segment"]]) @ weight
    staged = source.stage(tmp_path)
    assert staged.model is None
    assert staged.path == tmp_path / "model.onnx"
    for one in (source, staged):
        found = one.original(RunOptions(threads=1)).run(feeds)["scores"]
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(arrays.to_array(staged.load().graph.initializer[0]), table)


def test_input_shape_fixes_free_axes(tmp_path: Path) -> None:
    info = models.read(looking_up(), input_shape={"ids": [None, 6], "segment": [None, 6]}).info
    assert [one.shape for one in info.inputs] == [("n", 6), ("n", 6)]
    with pytest.raises(ConstraintError, match="ids"):
        models.read(looking_up(), input_shape={"ids": [1, 2, 3], "segment": [1, 2]})
    with pytest.raises(ConstraintError, match=r"and the model takes ids.*segment"):
        models.read(looking_up(), input_shape=[1, 2])


def test_external_data_is_checked(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    onnx.save(looking_up(2000), str(path), save_as_external_data=True, location="w.bin", size_threshold=100)
    source = models.read(path)
    assert source.info.size_bytes > 2000 * 4 * 4
    assert list(models.data_files(models.open_model(path, weights=False))) == ["w.bin"]
    data = (tmp_path / "w.bin").read_bytes()
    (tmp_path / "w.bin").write_bytes(data[:-100])
    with pytest.raises(ModelError, match="truncated"):
        models.read(path)
    (tmp_path / "w.bin").unlink()
    with pytest.raises(ModelError, match=r"w\.bin"):
        models.read(path)


def test_external_data_stays_in_the_folder(tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(b"x" * 1000)
    model = looking_up()
    table = model.graph.initializer[0]
    table.ClearField("raw_data")
    table.data_location = onnx.TensorProto.EXTERNAL
    table.external_data.add(key="location", value="../secret")
    table.external_data.add(key="length", value=str(11 * 4 * 4))
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner" / "model.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(ModelError, match="leads out"):
        models.read(tmp_path / "inner" / "model.onnx")


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"\x00\x01 this is no model", "no model of ONNX"), (b"", "empty")],
    ids=["other", "empty"],
)
def test_refuses_what_is_no_model(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "model.onnx").write_bytes(content)
    with pytest.raises(ModelError, match=message):
        models.read(tmp_path / "model.onnx")


@pytest.mark.parametrize("share", [0.2, 0.5, 0.9, 0.99])
def test_refuses_a_truncated_file(tmp_path: Path, share: float) -> None:
    content = looking_up().SerializeToString()
    (tmp_path / "model.onnx").write_bytes(content[: int(len(content) * share)])
    with pytest.raises(ModelError):
        models.read(tmp_path / "model.onnx")


def test_refuses_graphs_that_cannot_be_used(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError):
        models.read(tmp_path / "nothing.onnx")
    with pytest.raises(ModelError, match="int"):
        models.read(3)
    broken = looking_up()
    broken.graph.node[3].input[0] = "nobody_makes_this"
    with pytest.raises(ModelError, match="no valid model"):
        models.read(broken)
    text = make(
        [helper.make_node("Identity", ["x"], ["y"])],
        [helper.make_tensor_value_info("x", onnx.TensorProto.STRING, [1])],
        [helper.make_tensor_value_info("y", onnx.TensorProto.STRING, [1])],
        {},
    )
    with pytest.raises(ModelError, match="no tensor of numbers"):
        models.read(text)


def test_refuses_a_model_that_gives_nan() -> None:
    model = looking_up()
    weight = model.graph.initializer[2]
    weight.CopyFrom(arrays.from_array(np.full((4, 5), np.nan, np.float32), "weight"))
    with pytest.raises(ModelError, match="NaN in 'scores'"):
        models.read(model)


def test_a_source_without_model_says_so() -> None:
    source = models.read(looking_up())
    with pytest.raises(ModelError, match="neither"):
        ModelSource(info=replace(source.info)).load()
