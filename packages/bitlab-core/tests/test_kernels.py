"""Every kernel gives what the formula gives, to the bit, on shapes that are no multiple of anything."""

import os
import shutil
import subprocess
import sys

import pytest
import torch
from bitcore.config import BitQuantConfig
from bitcore.exceptions import KernelNotFoundError, QuantizationError
from bitcore.kernels import FORCE_VARIABLE, BitKernelBase, KernelRegistry, _native
from bitcore.ops import bitlinear, quantize_weight
from bitcore.packing import tiles
from hypothesis import given, settings
from hypothesis import strategies as st

CPU = torch.device("cpu")
NATIVE = [kernel.name for kernel in _native.KERNELS]
# Triton's programs run here in its interpreter, in a process of their own; see test_triton.py.
INTERPRETS = os.environ.get("TRITON_INTERPRET") == "1"
EVERY = ["triton"] if INTERPRETS else ["torch", *NATIVE]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def serving(name):
    kernel = KernelRegistry.get_kernel_by_name(name)
    reason = kernel.why_not(BitQuantConfig(), CPU)
    if reason is not None:
        pytest.skip(f"{name}: {reason}")
    return kernel


def by_the_formula(x, scale, codes, bias, config):
    """Integers as Python counts them, and each float operation by itself."""
    most = x.float().abs()
    most = most.amax(-1, keepdim=True) if config.scales_each_token else most.amax().view(1, 1)
    most = most.clamp(min=1e-5)
    qx = (x.float() * (1 / most * 127)).round().clamp(-128, 127).long()
    product = qx @ codes.long().t()
    out = product.float() * (most / 127 * scale.view(1, -1))
    return (out if bias is None else out + bias.float()).to(x.dtype)


@settings(deadline=None, max_examples=10 if INTERPRETS else 60)
@given(
    rows=st.integers(1, 200),
    columns=st.integers(1, 300),
    inputs=st.integers(1, 70),
    dtype=st.sampled_from(DTYPES),
    per_token=st.booleans(),
    per_channel=st.booleans(),
    has_bias=st.booleans(),
    seed=st.integers(0, 99),
)
@pytest.mark.parametrize("name", EVERY)
def test_every_kernel_is_exact(name, rows, columns, inputs, dtype, per_token, per_channel, has_bias, seed):
    kernel = serving(name)
    config = BitQuantConfig(
        weight_granularity="per_channel" if per_channel else "per_tensor",
        activation_granularity="per_token" if per_token else "per_tensor",
    )
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator)
    x = torch.randn(inputs, columns, generator=generator).to(dtype)
    bias = torch.randn(rows, generator=generator).to(dtype) if has_bias else None
    scale, packed = kernel.prepare_weights(weight, config)
    codes = quantize_weight(weight, config.weight_granularity)[1]
    assert torch.equal(tiles.unpack(packed, rows, columns), codes)
    expected = by_the_formula(x, scale, codes, bias, config)
    assert torch.equal(kernel(x, scale, packed, bias, config), expected)
    assert torch.equal(kernel.bind(scale, packed, bias, config)(x), expected)


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize(("rows", "columns"), [(768, 768), (130, 4100), (33, 11008)])
@pytest.mark.parametrize("inputs", [1, 16, 33])
def test_large_layers_are_exact(name, rows, columns, inputs):
    kernel = serving(name)
    x = torch.randn(inputs, columns)
    scale, packed = kernel.prepare_weights(torch.randn(rows, columns), BitQuantConfig())
    expected = by_the_formula(x, scale, tiles.unpack(packed, rows, columns), None, BitQuantConfig())
    assert torch.equal(kernel(x, scale, packed), expected)


@pytest.mark.parametrize("name", EVERY)
def test_extremes_do_not_overflow(name):
    """The largest sums that there are: all codes 1, all activations at an end of their range."""
    kernel = serving(name)
    columns = 20000
    packed = tiles.pack(torch.ones(17, columns, dtype=torch.int8))
    x = torch.full((3, columns), -2.0)
    x[1] = 2
    x[2, ::2] = 2
    out = kernel(x, torch.full((17,), 0.5), packed)
    assert torch.equal(out[0], torch.full((17,), -127.0 * columns) * (torch.tensor(2.0) / 127 * 0.5))
    assert torch.equal(out[1], -out[0])
    assert torch.equal(out[2], torch.zeros(17))


@pytest.mark.parametrize("name", NATIVE)
def test_sums_of_the_most_columns_fit_and_more_columns_are_refused(name):
    kernel = serving(name)
    columns = 1 << 19
    packed = tiles.pack(torch.ones(1, columns, dtype=torch.int8))
    out = kernel(torch.full((2, columns), 2.0), torch.ones(1), packed)
    assert torch.equal(out, torch.full((2, 1), 127.0 * columns) * (torch.tensor(2.0) / 127))
    assert "columns" in kernel.why_not(BitQuantConfig(), CPU, (1, columns + 1))
    more = tiles.pack(torch.ones(1, columns + 16, dtype=torch.int8))
    with pytest.raises(QuantizationError, match="columns"):
        kernel(torch.ones(1, columns + 16), torch.ones(1), more)


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_not_finite_stays_in_its_row(name, dtype):
    kernel = serving(name)
    x = torch.ones(4, 40, dtype=dtype)
    x[1, 3], x[2, 39] = torch.nan, torch.inf
    scale, packed = kernel.prepare_weights(torch.randn(20, 40), BitQuantConfig())
    out = kernel(x, scale, packed)
    assert out[1:3].isnan().all()
    assert torch.equal(out[[0, 3]], kernel(x[[0, 3]], scale, packed))
    assert out[0].isfinite().all()


@pytest.mark.parametrize("name", EVERY)
def test_inputs_of_any_form(name):
    kernel = serving(name)
    scale, packed = kernel.prepare_weights(torch.randn(20, 40), BitQuantConfig())
    x = torch.randn(2, 3, 40)
    out = kernel(x, scale, packed)
    assert out.shape == (2, 3, 20)
    assert torch.equal(kernel(x[1, 2], scale, packed), out[1, 2])
    spread = torch.randn(40, 6).t()
    assert torch.equal(kernel(spread, scale, packed), kernel(spread.contiguous(), scale, packed))
    assert kernel(x[:0], scale, packed).shape == (0, 3, 20)
    double = kernel(x.double(), scale, packed)
    assert double.dtype == torch.float64
    assert torch.equal(double.float(), out)


@pytest.mark.parametrize("name", EVERY)
def test_operands_that_do_not_fit_are_refused_before_memory_is_touched(name):
    kernel = serving(name)
    scale, packed = kernel.prepare_weights(torch.randn(20, 40), BitQuantConfig())
    call = kernel.bind(scale, packed)
    call(torch.randn(3, 40))
    for wrong in (
        torch.randn(3, 400),
        torch.randn(3, 4),
        torch.tensor(1.0),
        torch.ones(3, 40, dtype=torch.int32),
    ):
        with pytest.raises(QuantizationError):
            call(wrong)
        with pytest.raises(QuantizationError):
            kernel(wrong, scale, packed)
    for operands in ((scale[:10], packed), (scale, packed[:16]), (scale, packed, torch.ones(3))):
        with pytest.raises(QuantizationError):
            kernel(torch.randn(3, 40), *operands)


@pytest.mark.parametrize("name", NATIVE)
def test_threads_change_no_bit(name):
    kernel = serving(name)
    scale, packed = kernel.prepare_weights(torch.randn(1000, 2000), BitQuantConfig())
    single, several = torch.randn(1, 2000), torch.randn(40, 2000)
    expected = [kernel(x, scale, packed) for x in (single, several)]
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        found = [kernel(x, scale, packed) for x in (single, several)]
    finally:
        torch.set_num_threads(before)
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


@pytest.mark.skipif(shutil.which("g++") is None, reason="there is no C++ compiler here")
def test_the_native_kernels_were_built():
    assert _native.missing_library() is None
    assert KernelRegistry.get_kernel_by_name("avx2").has_cpp_backend
    assert not KernelRegistry.get_kernel_by_name("torch").has_cpp_backend


def test_the_fastest_kernel_that_can_serve_is_chosen(monkeypatch):
    monkeypatch.delenv(FORCE_VARIABLE, raising=False)
    reasons = KernelRegistry.explain(BitQuantConfig())
    assert list(reasons) == KernelRegistry.list_available_kernels()
    first = next(name for name, reason in reasons.items() if reason == "can serve")
    assert KernelRegistry.get_kernel_for_config(BitQuantConfig()).name == first
    floats = BitQuantConfig(activation_dtype="float32")
    assert KernelRegistry.get_kernel_for_config(floats).name == "torch"
    assert "8 bits" in KernelRegistry.explain(floats)["avx2"]
    assert "not on meta" in KernelRegistry.explain(BitQuantConfig(), "meta")["amx"]
    assert not KernelRegistry.get_kernel_by_name("avx2").is_compatible_with(BitQuantConfig(), "meta")


def test_the_environment_forces_a_kernel(monkeypatch):
    monkeypatch.setenv(FORCE_VARIABLE, "torch")
    assert KernelRegistry.get_kernel_for_config(BitQuantConfig()).name == "torch"
    monkeypatch.setenv(FORCE_VARIABLE, "avx2")
    with pytest.raises(
        KernelNotFoundError, match=rf"{FORCE_VARIABLE} asks for avx2, but it needs activations"
    ):
        KernelRegistry.get_kernel_for_config(BitQuantConfig(activation_dtype="float32"))
    monkeypatch.setenv(FORCE_VARIABLE, "avx3")
    with pytest.raises(KernelNotFoundError, match=r"no kernel 'avx3' among .*; did you mean avx2\?"):
        KernelRegistry.get_kernel_for_config(BitQuantConfig())


def test_a_kernel_of_ones_own_is_used(monkeypatch):
    monkeypatch.setattr(KernelRegistry, "_kernels", KernelRegistry._kernels)
    monkeypatch.delenv(FORCE_VARIABLE, raising=False)

    @KernelRegistry.register
    class Own(BitKernelBase):
        name, priority = "own", 99

        def why_not(self, config, device, shape=None):
            return None if shape == (20, 40) else "it knows one shape"

        def __call__(self, x, qweight_scale, qweight, bias=None, config=None):
            return torch.full((*x.shape[:-1], 20), 7.0)

    assert KernelRegistry.list_available_kernels()[0] == "own"
    scale, packed = bitlinear.prepare_weights(torch.randn(20, 40))
    out = bitlinear.forward(torch.randn(3, 40), qweight=packed, qweight_scale=scale, training=False)
    assert torch.equal(out, torch.full((3, 20), 7.0))
    assert KernelRegistry.get_kernel_for_config(BitQuantConfig(), shape=(20, 41)).name != "own"


def test_a_library_that_cannot_be_loaded_is_said(tmp_path):
    """In a process of its own, since a library is loaded once."""
    program = """
        import pathlib, sys, torch
        from bitcore.config import BitQuantConfig
        from bitcore.kernels import KernelRegistry, _native
        from bitcore.ops import bitlinear
        _native.LIBRARY = pathlib.Path(sys.argv[1])
        print(KernelRegistry.explain(BitQuantConfig())["avx2"])
        print(KernelRegistry.get_kernel_for_config(BitQuantConfig()).name)
    """
    damaged = tmp_path / "libbitcore.so"
    damaged.write_bytes(b"no library")
    for path, message in ((damaged, "cannot be loaded"), (tmp_path / "none.so", "without a C++ compiler")):
        command = [sys.executable, "-c", "\n".join(line.strip() for line in program.splitlines()), path]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        reason, chosen = done.stdout.splitlines()
        assert message in reason
        assert chosen == "torch"


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (torch.ones(3), r"not \[3\]"),
        (torch.ones(2, 2, 2), "is a matrix"),
        (torch.ones(2, 2, dtype=torch.int32), "int32"),
        (torch.ones(0, 2), "holds nothing"),
        (torch.tensor([[1.0, torch.nan]]), "1 of 2 weights are NaN or infinite"),
        (torch.tensor([[torch.inf, 1.0]]), "1 of 2 weights"),
    ],
)
def test_weights_that_cannot_be_packed_are_refused(weight, message):
    with pytest.raises(QuantizationError, match=message):
        bitlinear.prepare_weights(weight)
