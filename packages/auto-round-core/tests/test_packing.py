"""Streams of codes over 32-bit words, against a reference that moves one bit at a time."""

import time

import numpy as np
import pytest
import torch
from auto_round.config_manager import LayerSettings
from auto_round.exceptions import QuantizationError
from auto_round.packing import _bitstream
from auto_round.packing._bitstream import pack, packed_width, unpack
from auto_round.quantization._rtn import quantize_rtn
from hypothesis import given, settings
from hypothesis import strategies as st


def reference(codes, bits):
    """One row's words, bit by bit in Python's integers."""
    stream = 0
    for index, code in enumerate(codes):
        for bit in range(bits):
            stream |= (code >> bit & 1) << (index * bits + bit)
    count = -(-len(codes) * bits // 32)
    words = [stream >> 32 * word & 0xFFFFFFFF for word in range(count)]
    return [word - 2**32 if word >= 2**31 else word for word in words]


def random_codes(shape, bits, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 2**bits, shape, generator=generator, dtype=torch.uint8)


@settings(max_examples=120, deadline=None)
@given(
    bits=st.integers(2, 8),
    rows=st.integers(1, 4),
    count=st.one_of(st.integers(1, 100), st.sampled_from([32, 64, 96])),
    chunk=st.sampled_from([1, 40, 1 << 20]),
    seed=st.integers(0, 2**31),
)
def test_words_are_those_of_the_reference(bits, rows, count, chunk, seed):
    codes = random_codes((rows, count), bits, seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_bitstream, "_CHUNK", chunk)
        words = pack(codes, bits)
        assert words.dtype is torch.int32
        assert words.tolist() == [reference(row, bits) for row in codes.tolist()]
        assert torch.equal(unpack(words, bits, count), codes)


def test_a_row_worked_out_by_hand():
    """Code i at 3 bits begins at bit 3 * i: 1 gives bit 0, 7 gives bits 3 to 5, and the 11th straddles."""
    codes = torch.zeros(32, dtype=torch.uint8)
    codes[0], codes[1], codes[10] = 1, 7, 0b101
    assert pack(codes, 3).tolist() == [0b111001 | 1 << 30, 1, 0]
    assert pack(torch.tensor([1, 2, 3, 4, 5, 6, 7, 8], dtype=torch.uint8), 4).tolist() == [0x87654321 - 2**32]
    assert pack(torch.tensor([255, 1, 0, 128], dtype=torch.uint8), 8).tolist() == [0x800001FF - 2**32]


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_the_layout_is_that_of_numpy_shifts(bits):
    """What divides 32 lies as shifts put it, which is how GPTQ's readers take it apart."""
    codes = random_codes((3, 64), bits)
    each = 32 // bits
    shifts = np.arange(each, dtype=np.uint64) * bits
    expected = (codes.numpy().reshape(3, -1, each).astype(np.uint64) << shifts).sum(-1).astype(np.uint32)
    assert np.array_equal(pack(codes, bits).numpy().view(np.uint32), expected)


@pytest.mark.parametrize("bits", range(2, 9))
def test_any_shape_and_any_view(bits):
    codes = random_codes((2, 3, 5, 64), bits)
    words = pack(codes, bits)
    assert words.shape == (2, 3, 5, 2 * bits)
    assert torch.equal(unpack(words, bits, 64), codes)
    view = codes.permute(3, 0, 1, 2)[1:, :, 1:]
    assert torch.equal(unpack(pack(view, bits), bits, 5), view)
    # A view that begins where no word does.
    shifted = random_codes((97,), bits)[1:]
    assert pack(shifted, bits).tolist() == reference(shifted.tolist(), bits)
    strided = words[..., ::2]
    assert torch.equal(unpack(strided, bits, 32), unpack(strided.contiguous(), bits, 32))
    for empty in ((0, 32), (4, 0), (0,), (0, 7)):
        packed = pack(torch.zeros(empty, dtype=torch.uint8), bits)
        assert packed.shape == (*empty[:-1], packed_width(empty[-1], bits))
        assert unpack(packed, bits, empty[-1]).shape == empty


def test_packing_leaves_its_arguments_alone():
    codes = random_codes((4, 64), 5)
    before = codes.clone()
    words = pack(codes, 5)
    kept = words.clone()
    unpack(words, 5, 64)
    assert torch.equal(codes, before)
    assert torch.equal(words, kept)


def test_what_does_not_fit_is_refused():
    codes = torch.tensor([0, 1, 8, 3], dtype=torch.uint8)
    with pytest.raises(QuantizationError, match="a code is 8; 3 bits hold 0 to 7"):
        pack(codes, 3)
    for bits in (0, 1, 9, -3):
        with pytest.raises(QuantizationError, match=f"bits is {bits}"):
            pack(codes, bits)
        with pytest.raises(QuantizationError, match=f"bits is {bits}"):
            unpack(codes.int(), bits, 4)
    with pytest.raises(QuantizationError, match=r"int8.*give torch\.uint8"):
        pack(codes.to(torch.int8), 4)
    with pytest.raises(QuantizationError, match=r"uint8.*give torch\.int32"):
        unpack(codes, 4, 32)
    with pytest.raises(QuantizationError, match=r"\[\]"):
        pack(torch.tensor(1, dtype=torch.uint8), 4)
    with pytest.raises(
        QuantizationError, match=r"rows of 4 words do not hold 33 codes of 4 bits; .* 5 words"
    ):
        unpack(torch.zeros(2, 4, dtype=torch.int32), 4, 33)
    with pytest.raises(QuantizationError, match="-1 codes"):
        unpack(torch.zeros(2, 0, dtype=torch.int32), 4, -1)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", range(2, 9))
def test_packed_codes_stand_for_the_same_numbers_to_the_last_bit(bits, symmetric):
    """What a reader computes from the words, in numpy, is what `dequantize` gives."""
    layer = LayerSettings(bits=bits, group_size=32, symmetric=symmetric, weight_dtype="int")
    weight = torch.randn(16, 96, generator=torch.Generator().manual_seed(bits))
    result = quantize_rtn(weight, layer, torch.float16)
    q = unpack(pack(result.codes, bits), bits, 96).numpy().reshape(16, 3, 32).astype(np.float32)
    if result.zero is None:
        zero = np.full((16, 3), 2 ** (bits - 1), np.float32)
    else:
        padded = torch.nn.functional.pad(result.zero, (0, 29))
        zero = unpack(pack(padded, bits), bits, 32)[:, :3].numpy().astype(np.float32)
    values = (q - zero[..., None]) * result.scale.numpy().astype(np.float32)[..., None]
    assert torch.equal(result.dequantize(), torch.from_numpy(values.reshape(16, 96)))


def test_large_matrices_are_moved_in_pieces(monkeypatch):
    sizes = []
    inner = _bitstream._pack_rows

    def counted(codes, bits):
        words = inner(codes, bits)
        sizes.append(words.numel() * 32 // bits)
        return words

    monkeypatch.setattr(_bitstream, "_pack_rows", counted)
    for shape in ((100_000, 33), (1, 1 << 22), (400_000, 1)):
        sizes.clear()
        pack(torch.zeros(shape, dtype=torch.uint8), 3)
        assert max(sizes) <= 1 << 20
        assert len(sizes) > 3


@pytest.mark.parametrize("bits", [3, 4])
def test_fifty_million_codes_a_second(bits):
    """Some 600 were measured on one core of a server CPU."""
    codes = random_codes((1024, 4096), bits)
    seconds = []
    for _ in range(5):
        begun = time.process_time()
        restored = unpack(pack(codes, bits), bits, 4096)
        seconds.append(time.process_time() - begun)
    assert torch.equal(restored, codes)
    assert codes.numel() / min(seconds) > 50e6
