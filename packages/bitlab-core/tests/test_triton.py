"""Triton's kernel: in the interpreter through the tests of all kernels, and on a GPU where there is one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from bitcore.config import BitQuantConfig
from bitcore.kernels import KernelRegistry

CPU_REASON = "it runs on a GPU, not on cpu (but with TRITON_INTERPRET=1)"


def test_the_interpreter_passes_the_tests_of_all_kernels():
    """What is interpreted proves the arithmetic; how fast it is, a GPU alone shows."""
    tests = Path(__file__).with_name("test_kernels.py")
    command = [sys.executable, "-m", "pytest", str(tests), "-q", "-k", "triton", "-p", "no:cacheprovider"]
    # The interpreter of Triton 3.5 makes numbers of arrays of one.
    command += ["-W", "ignore:Conversion of an array with ndim > 0 to a scalar:DeprecationWarning"]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:]
    assert "16 passed" in done.stdout
    assert "skipped" not in done.stdout


def test_it_says_what_it_lacks():
    kernel = KernelRegistry.get_kernel_by_name("triton")
    assert kernel.why_not(BitQuantConfig(), torch.device("cpu")) == CPU_REASON
    cuda = torch.device("cuda")
    assert kernel.is_compatible_with(BitQuantConfig(), cuda)
    assert "8 bits" in kernel.why_not(BitQuantConfig(activation_dtype="float32"), cuda)
    assert "columns" in kernel.why_not(BitQuantConfig(), cuda, (1, 1 << 25))
    assert KernelRegistry.get_kernel_for_config(BitQuantConfig(), cuda).name == "triton"
    assert not kernel.has_cpp_backend


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("granularity", ["per_token", "per_tensor"])
def test_a_gpu_gives_what_the_reference_gives(dtype, granularity):
    torch.manual_seed(0)
    config = BitQuantConfig(activation_granularity=granularity)
    reference = KernelRegistry.get_kernel_by_name("torch")
    for rows, columns in ((1, 1), (130, 77), (1000, 4100), (4096, 11008)):
        scale, packed = reference.prepare_weights(torch.randn(rows, columns), config)
        bias = torch.randn(rows)
        for inputs in (1, 2, 16, 33, 200):
            x = torch.randn(inputs, columns, dtype=dtype)
            on_gpu = [tensor.cuda() for tensor in (x, scale, packed, bias)]
            found = KernelRegistry.get_kernel_by_name("triton")(*on_gpu, config)
            assert torch.equal(found.cpu(), reference(x, scale, packed, bias, config)), (
                rows,
                columns,
                inputs,
            )


@pytest.mark.cuda
def test_the_layer_runs_on_a_gpu():
    from bitcore.ops import bitlinear

    weight, x = torch.randn(300, 200, device="cuda"), torch.randn(5, 200, device="cuda")
    scale, packed = bitlinear.prepare_weights(weight)
    out = bitlinear.forward(x, qweight=packed, qweight_scale=scale, training=False)
    assert out.device.type == "cuda"
    torch.testing.assert_close(out, bitlinear.forward(x, weight=weight))
    compiled = torch.compile(bitlinear.forward, fullgraph=True)
    assert torch.equal(compiled(x, qweight=packed, qweight_scale=scale, training=False), out)
