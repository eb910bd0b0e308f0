"""ONNX from torch and TensorFlow: names, axes of any length, outputs, and fusions that follow."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hamerspace._imports import has
from hamerspace.backends._onnx_fusion import attention_unpacked, fused
from hamerspace.backends._onnx_quantize import quantize_dynamic
from hamerspace.backends.base import BuildContext, Candidate
from hamerspace.exceptions import BackendError
from hamerspace.models import onnx as models
from hamerspace.models.conversion import onnx_path
from hamerspace.models.source import ModelSource
from hamerspace.runtimes.base import RunOptions

onnx = pytest.importorskip("onnx")
torch = pytest.importorskip("torch")
pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")
OPTIONS = RunOptions(threads=1)


class TwoHeads(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = torch.nn.Embedding(13, 8)
        self.body = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.GELU())
        self.drop = torch.nn.Dropout(0.9)

    def forward(self, ids: Any, mask: Any) -> dict[str, Any]:
        hidden = self.drop(self.body(self.embed(ids))) * mask[..., None].to(torch.float32)
        return {"hidden": hidden, "cache": None, "mean": hidden.mean(1)}


def context(source: ModelSource, room: Path) -> BuildContext:
    (room / "shared").mkdir(exist_ok=True)
    (room / "made").mkdir(exist_ok=True)
    candidate = Candidate(backend="onnx", technique="fp32", goal="graph", description="")
    return BuildContext(source=source, candidate=candidate, folder=room / "made", shared=room / "shared")


def assert_same(source: ModelSource, path: Path, batch: int) -> None:
    feeds = source.info.draw(batch, seed=5)
    expected = source.original(OPTIONS).run(feeds)
    found = models.read(path).original(OPTIONS).run(feeds)
    assert list(found) == list(expected)
    for name, array in expected.items():
        np.testing.assert_allclose(found[name], array, atol=1e-5)


def test_module_keeps_names_and_free_axes(tmp_path: Path) -> None:
    from hamerspace.models import pytorch

    model = TwoHeads().train()
    source = pytorch.read(model, input_shape={"ids": [None, None], "mask": [None, None]})
    path = onnx_path(context(source, tmp_path))
    assert model.training
    info = models.read(path).info
    assert [one.name for one in info.inputs] == ["ids", "mask"]
    assert [one.name for one in info.outputs] == ["hidden", "mean"]
    assert info.inputs[0].shape == source.info.inputs[0].shape
    assert info.inputs[0].high == 13
    assert_same(source, path, 1)
    assert_same(source, path, 3)
    assert onnx_path(context(source, tmp_path)) == path
    assert b"stack_trace" not in path.read_bytes()


@pytest.mark.filterwarnings("ignore:`torch.jit:")
@pytest.mark.parametrize("form", ["exported", "torchscript"])
def test_exported_programs_and_torchscript(tmp_path: Path, form: str) -> None:
    from hamerspace.models import pytorch

    torch.manual_seed(0)
    module = torch.nn.Sequential(
        torch.nn.Conv2d(1, 4, 3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(64, 3)
    ).eval()
    if form == "exported":
        free = ({0: torch.export.Dim.DYNAMIC},)
        model = torch.export.export(module, (torch.randn(2, 1, 6, 6),), dynamic_shapes=free)
    else:
        model = torch.jit.script(module)
    source = pytorch.read(model, input_shape=[None, 1, 6, 6])
    assert source.info.form == form
    path = onnx_path(context(source, tmp_path))
    assert_same(source, path, 1)
    assert_same(source, path, 4)


def test_a_length_that_the_model_fixes_is_fixed_in_the_file(tmp_path: Path) -> None:
    from hamerspace.models import pytorch

    class Fixed(torch.nn.Module):
        def forward(self, x: Any) -> Any:
            return x @ torch.ones(64, 3)

    source = pytorch.read(Fixed(), example_inputs=torch.randn(2, 64))
    free = replace(source.info.inputs[0], shape=("batch", "length"))
    source = replace(source, info=replace(source.info, inputs=(free,)))
    path = onnx_path(context(source, tmp_path))
    assert models.read(path).info.inputs[0].shape == (2, 64)


def test_a_model_that_cannot_be_exported(tmp_path: Path) -> None:
    from hamerspace.models import pytorch

    class Branches(torch.nn.Module):
        def forward(self, x: Any) -> Any:
            return torch.from_numpy(x.numpy() * 2)

    source = pytorch.read(Branches(), example_inputs=torch.randn(1, 4))
    with pytest.raises(BackendError, match="cannot export Branches"):
        onnx_path(context(source, tmp_path))


def test_onnx_itself_is_not_copied(tmp_path: Path) -> None:
    node = onnx.helper.make_node("Relu", ["x"], ["y"])
    ends = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["n", 3]) for name in "xy"]
    opsets = [onnx.helper.make_opsetid("", 18)]
    model = onnx.helper.make_model(
        onnx.helper.make_graph([node], "g", ends[:1], ends[1:]), opset_imports=opsets, ir_version=9
    )
    onnx.save(model, str(tmp_path / "given.onnx"))
    assert onnx_path(context(models.read(tmp_path / "given.onnx"), tmp_path)) == tmp_path / "given.onnx"
    assert_same(models.read(model), onnx_path(context(models.read(model), tmp_path)), 2)


def test_attention_of_transformers_is_fused(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    from hamerspace.models import pytorch

    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=128, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64
    )
    model = transformers.BertModel(config).eval()
    shape = [3, 16]
    source = pytorch.read(model, input_shape={"input_ids": shape, "attention_mask": shape})
    given = context(source, tmp_path)
    plain = onnx.load(str(onnx_path(given)))
    small = fused(given)
    assert Counter(node.op_type for node in small.graph.node)["Attention"] == 2
    assert len(small.graph.node) < len(plain.graph.node)
    onnx.save(small, str(tmp_path / "fused.onnx"))
    assert_same(source, tmp_path / "fused.onnx", 3)
    # Its weights lie there as one, so that all products can be quantised.
    quantized = quantize_dynamic(attention_unpacked(small))
    kinds = Counter(node.op_type for node in quantized.graph.node)
    assert kinds["MultiHeadAttention"] == 2
    assert not kinds["Attention"]
    assert not kinds["MatMul"]


def test_keras_keeps_names_and_free_axes(tmp_path: Path) -> None:
    # Importing them here would be before triton's library, which ends the process.
    if not (has("tensorflow") and has("tf2onnx")):
        pytest.skip("tensorflow or tf2onnx is not installed")
    from hamerspace.models import tensorflow
    from hamerspace.runtimes._tensorflow_library import keras

    k = keras()
    k.utils.set_random_seed(0)
    image, kind = k.Input((8, 8, 1), name="image"), k.Input((3,), name="kind", dtype="int32")
    features = k.layers.Flatten()(k.layers.Conv2D(4, 3, activation="relu")(image))
    both = k.layers.Concatenate()([features, k.layers.Flatten()(k.layers.Embedding(7, 4)(kind))])
    model = k.Model([image, kind], {"z": k.layers.Dense(5)(both), "a": k.layers.Dense(2)(both)})
    source = tensorflow.read(model)
    path = onnx_path(context(source, tmp_path))
    info = models.read(path).info
    assert [one.name for one in info.inputs] == [one.name for one in source.info.inputs]
    assert [one.name for one in info.outputs] == [one.name for one in source.info.outputs]
    assert [one.shape for one in info.inputs] == [one.shape for one in source.info.inputs]
    assert_same(source, path, 1)
    assert_same(source, path, 3)
