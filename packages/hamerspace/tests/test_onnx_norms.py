"""Layer normalisations taken apart are the same numbers, and stay apart in ONNX Runtime."""

from typing import Any

import numpy as np
import pytest

onnx = pytest.importorskip("onnx")
ort = pytest.importorskip("onnxruntime")
from hamerspace.backends._onnx_norms import take_apart  # noqa: E402

helper, arrays = onnx.helper, onnx.numpy_helper
WIDTH = 48


def model(node: Any, names: list[str], opset: int, outputs: list[str]) -> Any:
    random = np.random.default_rng(0)
    held = [arrays.from_array(random.normal(size=WIDTH).astype("f"), name) for name in ("g", "b", "bias")]
    floats = [2, 5, WIDTH]
    graph = helper.make_graph(
        [node],
        "norm",
        [helper.make_tensor_value_info(name, 1, floats) for name in names],
        [helper.make_tensor_value_info(name, 1, floats) for name in outputs],
        held,
    )
    domains = [helper.make_opsetid("", opset), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=domains, ir_version=8)


def run(given: Any, feeds: dict[str, Any]) -> list[Any]:
    options = ort.SessionOptions()
    options.log_severity_level = 3
    session = ort.InferenceSession(given.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, feeds)


SKIP = {"domain": "com.microsoft"}
CASES = [
    ("LayerNormalization", ["x", "g", "b"], ["y"], {}),
    ("LayerNormalization", ["x", "g"], ["y"], {"epsilon": 0.1, "axis": -1}),
    ("SkipLayerNormalization", ["x", "z", "g", "b"], ["y"], {**SKIP, "epsilon": 1e-5}),
    ("SkipLayerNormalization", ["x", "z", "g", "", "bias"], ["y", "", "", "sum"], SKIP),
    ("SkipLayerNormalization", ["x", "z", "g", "b", "bias"], ["y", "mean", "inv"], SKIP),
]


@pytest.mark.parametrize("opset", [17, 18, 21])
@pytest.mark.parametrize(("kind", "inputs", "outputs", "attributes"), CASES)
def test_the_numbers_stay(
    kind: str, inputs: list[str], outputs: list[str], attributes: dict[str, Any], opset: int
) -> None:
    names = [one for one in ("x", "z") if one in inputs]
    given = [one for one in outputs if one in ("y", "sum")]
    whole = model(helper.make_node(kind, inputs, outputs, **attributes), names, opset, given)
    random = np.random.default_rng(1)
    feeds = {name: (random.normal(size=(2, 5, WIDTH)) * 3 + 7).astype("f") for name in names}
    wanted = run(whole, feeds)
    assert take_apart(whole) == 1
    onnx.checker.check_model(whole)
    assert not any("Normalization" in node.op_type for node in whole.graph.node)
    for one, other in zip(wanted, run(whole, feeds), strict=True):
        np.testing.assert_allclose(other, one, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("inputs", "outputs", "attributes"),
    [
        (["x", "g", "b"], ["y"], {"axis": 1}),
        (["x", "z", "b"], ["y"], {}),
        (["x", "g", "b"], ["y", "mean"], {}),
    ],
)
def test_what_is_not_the_usual_is_left(
    inputs: list[str], outputs: list[str], attributes: dict[str, Any]
) -> None:
    given = model(
        helper.make_node("LayerNormalization", inputs, outputs, **attributes), ["x", "z"], 18, outputs
    )
    before = given.SerializeToString()
    assert take_apart(given) == 0
    assert given.SerializeToString() == before
