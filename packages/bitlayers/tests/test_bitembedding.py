"""BitEmbedding against torch's embedding of rounded vectors."""

import copy

import pytest
import torch
import torch.nn.functional as F
from bitcore.config import BitQuantConfig
from bitcore.exceptions import QuantizationError
from bitcore.ops import dequantize_weight, quantize_weight
from bitlayers import BitEmbedding
from hypothesis import given, settings
from hypothesis import strategies as st


@settings(deadline=None, max_examples=40)
@given(
    vectors=st.integers(1, 30),
    size=st.integers(1, 20),
    granularity=st.sampled_from(["per_tensor", "per_channel"]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    data=st.data(),
)
def test_all_forms_are_torchs_embedding_of_rounded_vectors(vectors, size, granularity, dtype, data):
    layer = BitEmbedding(vectors, size, quant_config=BitQuantConfig(granularity), dtype=dtype)
    ids = torch.tensor(data.draw(st.lists(st.integers(0, vectors - 1), max_size=6)), dtype=torch.int64)
    weight = dequantize_weight(*quantize_weight(layer.weight.detach(), granularity)).to(dtype)
    expected = F.embedding(ids, weight)
    for form in (layer, layer.eval(), copy.deepcopy(layer).deploy()):
        with torch.no_grad():
            assert torch.equal(form(ids), expected)
        assert torch.equal(form(ids), expected)
        assert form(ids).dtype == dtype


def test_dtypes_are_followed():
    layer, ids = BitEmbedding(10, 6).deploy(), torch.tensor([[1, 2], [3, 3]], dtype=torch.int32)
    expected = layer(ids)
    assert torch.equal(layer.bfloat16()(ids), expected.bfloat16())


def test_padding_begins_as_zeros_and_stays():
    layer = BitEmbedding(5, 4, padding_idx=-1)
    assert layer.padding_idx == 4
    out = layer(torch.tensor([4, 1]))
    assert not out[0].any()
    out.sum().backward()
    assert layer.weight.grad.sum(1).tolist() == [0, 4, 0, 0, 0]
    assert not layer.deploy()(torch.tensor([4])).any()


def test_gradients_in_evaluation():
    layer, ids = BitEmbedding(5, 4), torch.tensor([1, 1, 3])
    layer.eval()(ids).sum().backward()
    assert layer.weight.grad.sum(1).tolist() == [0, 8, 0, 4, 0]


def test_a_deployed_embedding_holds_bytes_only():
    layer = BitEmbedding(1000, 64).deploy()
    assert sum(t.nbytes for t in layer.state_dict().values()) * 8 / 64000 <= 2.1
    other = BitEmbedding(1000, 64, device="meta", dtype=torch.bfloat16).deploy()
    assert other.qweight_scale.dtype == torch.bfloat16
    assert other.packed_bytes == 16002
    other.load_state_dict(layer.state_dict(), assign=True)
    ids = torch.arange(1000)
    assert torch.equal(other(ids), layer(ids))


@pytest.mark.parametrize("form", ["train", "eval", "deployed"])
def test_compiled_and_refusing(form):
    layer, ids = BitEmbedding(9, 5), torch.tensor([[0, 8], [3, 3]])
    layer = layer.deploy() if form == "deployed" else layer.train(form == "train")
    with torch.no_grad():
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(ids), layer(ids))
        for bad in (torch.tensor([9]), torch.tensor([-1])):
            with pytest.raises(IndexError):
                layer(bad)
        for bad in (torch.tensor([1.0]), torch.tensor([True]), torch.tensor([1], dtype=torch.uint8)):
            with pytest.raises(QuantizationError, match="int32 or int64"):
                layer(bad)


def test_arguments_that_are_refused():
    for arguments, message in (
        ((0, 4), "num_embeddings is 0"),
        ((4, 0), "embedding_dim is 0"),
        ((4, 4, 4), "padding_idx is 4"),
    ):
        with pytest.raises(QuantizationError, match=message):
            BitEmbedding(*arguments)
    with pytest.raises(QuantizationError, match="no float weight"):
        BitEmbedding(4, 4).deploy().reset_parameters()


def test_weights_that_are_not_finite_are_refused_with_and_without_gradients():
    layer = BitEmbedding(5, 4).eval()
    with torch.no_grad():
        layer.weight[0, 0] = float("inf")
    for grad in (False, True):
        with torch.set_grad_enabled(grad), pytest.raises(QuantizationError, match="1 of 20 weights are NaN"):
            layer(torch.tensor([1]))
