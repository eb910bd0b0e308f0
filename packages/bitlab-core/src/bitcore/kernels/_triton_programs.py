# What a program says is for Triton, which has no types that pyright knows.
# pyright: basic, reportCallIssue=false, reportGeneralTypeIssues=false, reportOperatorIssue=false
"""Triton's programs. Loading this module loads triton."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_STEP = 16
"""Columns in a step of the tiles' layout."""
_TILE = 64
"""Rows in a tile."""


@triton.jit
def _round_rows(x, codes, scales, most, columns, stride, GIVEN: tl.constexpr, BLOCK: tl.constexpr):
    """Round one row of activations to 8 bits; its scale becomes NaN where the row is not finite."""
    row = tl.program_id(0).to(tl.int64)
    offsets = tl.arange(0, BLOCK)
    if GIVEN:
        largest = tl.load(most)
    else:
        found = tl.zeros((BLOCK,), tl.float32)
        for start in range(0, columns, BLOCK):
            inside = start + offsets < columns
            value = tl.abs(tl.load(x + row * columns + start + offsets, inside, 0.0).to(tl.float32))
            # As the comparison is false for NaN, it counts as infinite.
            found = tl.maximum(found, tl.where(value < float("inf"), value, float("inf")))
        largest = tl.max(found, 0)
    finite = largest < float("inf")
    largest = tl.where(finite, tl.maximum(largest, 1e-5), 1.0)
    factor = tl.div_rn(1.0, largest) * 127.0
    tl.store(scales + row, tl.where(finite, tl.div_rn(largest, 127.0), float("nan")))
    for start in range(0, stride, BLOCK):
        inside = start + offsets < columns
        value = tl.load(x + row * columns + start + offsets, inside, 0.0).to(tl.float32)
        # Adding and taking away 1.5 * 2**23 rounds to the nearest whole number, halves to even.
        whole = (value * factor + 12582912.0) - 12582912.0
        whole = tl.where(finite, tl.minimum(tl.maximum(whole, -128.0), 127.0), 0.0)
        tl.store(codes + row * stride + start + offsets, whole.to(tl.int8), start + offsets < stride)


@triton.jit
def _multiply(
    codes,
    scales,
    qweight,
    qweight_scale,
    bias,
    out,
    inputs,
    rows,
    padded_rows,
    stride,
    HAS_BIAS: tl.constexpr,
    SINGLE: tl.constexpr,
    M: tl.constexpr,
    STEPS: tl.constexpr,
):
    """Multiply M rows of codes by one tile of 64 rows of the weight.

    A byte of the tile's step s, row l and column j holds in plane p the code, plus one, of column
    16 s + 4 p + j. For one p the columns k = (s, j) of STEPS steps are one operand of a dot product.
    """
    tile, block = tl.program_id(0), tl.program_id(1)
    first = tile * 64
    tile_rows = tl.minimum(64, padded_rows - first)
    k = tl.arange(0, STEPS * 4)
    step, j = k // 4, k % 4
    lane = tl.arange(0, 64)
    m = block * M + tl.arange(0, M)
    base = qweight + first.to(tl.int64) * (stride // 4)
    total = tl.zeros((64,), tl.int32) if SINGLE else tl.zeros((M, 64), tl.int32)
    for start in range(0, stride // 16, STEPS):
        known = start + step < stride // 16
        held = known[:, None] & (lane < tile_rows)[None, :]
        where = ((start + step) * (tile_rows * 4) + j)[:, None] + (lane * 4)[None, :]
        bytes_ = tl.load(base + where, held, 85)
        for p in tl.static_range(4):
            weight = ((bytes_ >> (2 * p)) & 3).to(tl.int8) - 1
            column = (start + step) * 16 + 4 * p + j
            if SINGLE:
                x = tl.load(codes + column, known, 0)
                total += tl.sum(x.to(tl.int32)[:, None] * weight.to(tl.int32), 0)
            else:
                x = tl.load(
                    codes + m.to(tl.int64)[:, None] * stride + column[None, :],
                    (m < inputs)[:, None] & known[None, :],
                    0,
                )
                total += tl.dot(x, weight.to(tl.int8), out_dtype=tl.int32)
    n = first + lane
    weight_scale = tl.load(qweight_scale + n, n < rows, 0.0)
    if SINGLE:
        value = total.to(tl.float32) * (tl.load(scales) * weight_scale)
        if HAS_BIAS:
            value += tl.load(bias + n, n < rows, 0.0).to(tl.float32)
        tl.store(out + n, value.to(out.dtype.element_ty), n < rows)
    else:
        x_scale = tl.load(scales + m, m < inputs, 0.0)
        value = total.to(tl.float32) * (x_scale[:, None] * weight_scale[None, :])
        if HAS_BIAS:
            value += tl.load(bias + n, n < rows, 0.0).to(tl.float32)[None, :]
        places = out + m.to(tl.int64)[:, None] * rows + n[None, :]
        tl.store(places, value.to(out.dtype.element_ty), (m < inputs)[:, None] & (n < rows)[None, :])


def linear(
    x: Tensor, qweight_scale: Tensor, qweight: Tensor, bias: Tensor | None, most: Tensor | None, out: Tensor
) -> None:
    """Write a layer's output.

    Args:
        x: fp32, bf16 or fp16 [inputs, columns], one of each at least.
        qweight_scale: fp32 [rows].
        qweight: In the layout of `bitcore.packing.tiles`.
        bias: [rows].
        most: The largest magnitude of all of x, fp32 [1], where there is one scale for all.
        out: [inputs, rows], in x's dtype.
    """
    x, qweight = x.contiguous(), qweight.contiguous()
    (inputs, columns), rows = x.shape, len(qweight_scale)
    stride = columns + -columns % _STEP
    codes = torch.empty((inputs, stride), dtype=torch.int8, device=x.device)
    scales = torch.empty(inputs, device=x.device)
    # Fused, a product and the sum after it would be rounded once, and the kernels differ.
    _round_rows[(inputs,)](
        x,
        codes,
        scales,
        scales if most is None else most,
        columns,
        stride,
        GIVEN=most is not None,
        BLOCK=min(4096, triton.next_power_of_2(stride)),
        enable_fp_fusion=False,
    )
    single = inputs == 1
    block = 16 if inputs <= 16 else 32 if inputs <= 32 else 64
    _multiply[(triton.cdiv(rows, _TILE), triton.cdiv(inputs, block))](
        codes,
        scales,
        qweight,
        qweight_scale.contiguous(),
        qweight_scale if bias is None else bias.contiguous(),
        out,
        inputs,
        rows,
        qweight.shape[0],
        stride,
        HAS_BIAS=bias is not None,
        SINGLE=single,
        M=block,
        STEPS=16 if single else 8,
        enable_fp_fusion=False,
    )
