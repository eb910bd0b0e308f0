"""Layouts of ternary codes, against gguf's and transformers' own readers, and bytes worked out by hand."""

import gguf
import numpy as np
import pytest
import torch
from bitcore.exceptions import QuantizationError
from bitcore.packing import gguf_i2_s, gguf_ternary, hf_bitnet, rows, tiles
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.integrations import bitnet

SHAPES = st.tuples(st.integers(1, 150), st.integers(1, 70))


def codes_of(shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-1, 2, shape, generator=generator, dtype=torch.int8)


@settings(deadline=None)
@given(SHAPES, st.integers(0, 9))
@pytest.mark.parametrize("layout", [tiles, rows, hf_bitnet])
def test_what_was_packed_comes_back(layout, shape, seed):
    codes = codes_of(shape, seed)
    packed = layout.pack(codes)
    assert packed.dtype == torch.uint8
    assert torch.equal(layout.unpack(packed, *shape), codes)


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 5), st.integers(1, 4), st.integers(0, 9))
@pytest.mark.parametrize("kind", ["TQ1_0", "TQ2_0"])
def test_ggufs_ternary_types_are_those_of_gguf(kind, height, blocks, seed):
    shape = (height, blocks * 256)
    codes = codes_of(shape, seed)
    # Blocks of zeros have no scale that gguf could find.
    codes[:, ::256] = 1
    scale = torch.linspace(0.5, 2, height).half().float()
    packed = gguf_ternary.pack(codes, scale, kind)
    kind_of_gguf = gguf.GGMLQuantizationType[kind]
    floats = (codes * scale[:, None]).numpy()
    assert np.array_equal(packed.numpy(), gguf.quants.quantize(floats, kind_of_gguf))
    assert np.array_equal(gguf.quants.dequantize(packed.numpy(), kind_of_gguf), floats)
    unpacked, scales = gguf_ternary.unpack(packed, *shape, kind)
    assert torch.equal(unpacked, codes)
    assert torch.equal(scales, scale[:, None].expand(-1, blocks))


def test_a_checkpoint_of_bitnet_is_read_by_transformers():
    codes = codes_of((12, 7))
    packed = hf_bitnet.pack(codes)
    assert torch.equal(packed, bitnet.pack_weights(codes.clone().float()))
    unpack = getattr(bitnet.unpack_weights, "_torchdynamo_orig_callable", bitnet.unpack_weights)
    assert torch.equal(unpack(packed, dtype=torch.float32), codes.float())


def test_both_meanings_of_bitnets_scale():
    scale = torch.tensor([0.25])
    assert hf_bitnet.scale_to_stored(scale, "bitlinear") == 4
    assert hf_bitnet.scale_to_stored(scale, "autobitlinear") == 0.25
    for kind in ("bitlinear", "autobitlinear"):
        assert torch.equal(hf_bitnet.scale_from_stored(hf_bitnet.scale_to_stored(scale, kind), kind), scale)
    with pytest.raises(QuantizationError, match="linear_class is 'linear'"):
        hf_bitnet.scale_from_stored(scale, "linear")
    for wrong in (torch.ones(3), torch.zeros(1), torch.tensor([torch.nan])):
        with pytest.raises(QuantizationError, match="one positive scale"):
            hf_bitnet.scale_to_stored(wrong, "bitlinear")


def test_plain_rows_by_hand():
    codes = torch.tensor([[-1, 0, 1, 1, -1]], dtype=torch.int8)
    # 0 + 1 * 4 + 2 * 16 + 2 * 64, and 0 with three zeros behind it: 1 * 4 + 1 * 16 + 1 * 64
    assert rows.pack(codes).tolist() == [[164, 84]]


def test_tiles_by_hand():
    """The byte of row l, column j and step s holds columns 16 s + 4 p + j at bits 2 p."""
    codes = torch.zeros(70, 20, dtype=torch.int8)
    codes[66, 16 + 4 * 0 + 3] = 1
    codes[66, 4 * 2 + 1] = -1
    packed = tiles.pack(codes)
    assert packed.shape == tiles.packed_shape(70, 20) == (80, 8)
    stream = packed.flatten()
    empty = 0b01010101
    expected = torch.full_like(stream, empty)
    # A tile of 64 rows takes 64 * 8 bytes; the second has one group of rows, so that a step has 64 bytes.
    expected[512 + 64 + 4 * 2 + 3] = empty + 1
    expected[512 + 4 * 2 + 1] = empty - (1 << 4)
    assert torch.equal(stream, expected)


def test_i2_s_by_hand():
    codes = torch.zeros(2, 128, dtype=torch.int8)
    codes[1, 0], codes[1, 33], codes[1, 127] = 1, -1, 1
    packed = gguf_i2_s.pack(codes, torch.tensor(0.75))
    assert packed.shape == (64 + 32,)
    expected = torch.full((64,), 0b01010101, dtype=torch.uint8)
    expected[32], expected[33], expected[63] = 0b10010101, 0b01000101, 0b01010110
    assert torch.equal(packed[:64], expected)
    assert packed[64:].tolist() == [*np.float32(0.75).tobytes(), *[0] * 28]
    unpacked, scale = gguf_i2_s.unpack(packed, 2, 128)
    assert torch.equal(unpacked, codes)
    assert scale.tolist() == [0.75]


@settings(deadline=None, max_examples=20)
@given(st.integers(1, 5), st.integers(1, 3), st.integers(0, 9))
def test_i2_s_comes_back(height, blocks, seed):
    shape = (height, blocks * 128)
    codes = codes_of(shape, seed)
    unpacked, scale = gguf_i2_s.unpack(gguf_i2_s.pack(codes, torch.tensor([1.5])), *shape)
    assert torch.equal(unpacked, codes)
    assert scale.tolist() == [1.5]


@pytest.mark.parametrize(
    ("codes", "message"),
    [
        (torch.full((2, 4), 2, dtype=torch.int8), "from 2 to 2"),
        (torch.zeros(2, 4), "float32"),
        (torch.zeros(8, dtype=torch.int8), r"int8 \[8\]"),
        (torch.zeros(0, 4, dtype=torch.int8), r"int8 \[0, 4\]"),
        ([[0, 1]], "list"),
    ],
)
@pytest.mark.parametrize("layout", [tiles, rows, hf_bitnet])
def test_what_are_no_codes_is_refused(layout, codes, message):
    with pytest.raises(QuantizationError, match=message):
        layout.pack(codes)


@pytest.mark.parametrize("layout", [tiles, rows, hf_bitnet])
@pytest.mark.parametrize("packed", [torch.zeros(3, 3, dtype=torch.uint8), torch.zeros(64, 64), None])
def test_bytes_of_another_shape_are_refused(layout, packed):
    with pytest.raises(QuantizationError, match="is to be uint8"):
        layout.unpack(packed, 100, 50)


def test_what_the_types_of_gguf_cannot_hold_is_refused():
    codes = codes_of((2, 256))
    for message, call in {
        "multiple of 256 weights, not 255": lambda: gguf_ternary.pack(codes[:, 1:], torch.ones(1), "TQ2_0"),
        "multiple of 128 weights, not 255": lambda: gguf_i2_s.pack(codes[:, 1:], torch.ones(1)),
        "TQ3_0": lambda: gguf_ternary.pack(codes, torch.ones(1), "TQ3_0"),
        r"these are \[3\]": lambda: gguf_ternary.pack(codes, torch.ones(3), "TQ1_0"),
        "1e-09": lambda: gguf_ternary.pack(codes, torch.full((1,), 1e-9), "TQ1_0"),
        "one scale for a weight, not 2": lambda: gguf_i2_s.pack(codes, torch.ones(2)),
        "is to be uint8": lambda: gguf_ternary.unpack(torch.zeros(2, 60, dtype=torch.uint8), 2, 256, "TQ2_0"),
    }.items():
        with pytest.raises(QuantizationError, match=message):
            call()
