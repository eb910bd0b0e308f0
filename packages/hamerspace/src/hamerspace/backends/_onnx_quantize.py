"""Quantisation of ONNX models by ONNX Runtime's tools: dynamic, static, and of weights alone."""

from __future__ import annotations

import logging
import tempfile
import warnings
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from hamerspace._imports import need
from hamerspace.backends._onnx_embeddings import quantize_embeddings
from hamerspace.exceptions import BackendError, ConstraintError
from hamerspace.models import onnx
from hamerspace.models.info import Feeds

METHODS: Final = {"minmax": "MinMax", "entropy": "Entropy", "percentile": "Percentile"}
"""Ways to find the range of activations."""
_PRODUCTS: Final = ("MatMul", "Gemm")
_INT8_KERNELS: Final = 4
"""MatMulNBits' accuracy level at which activations are quantised too, to 8 bits, block by block."""
_SMALLEST_BLOCK: Final = 16


def quantize_dynamic(model: Any, *, reduce_range: bool = False) -> Any:
    """Return a model with weights of matrix products in int8 by channel, activations quantised as they come.

    Embeddings become int8 by row. Convolutions stay: their dynamic form is slower than float32.

    Raises:
        BackendError: the model has nothing of that kind.
    """
    found = quantize_embeddings(model)
    tools = need("onnxruntime.quantization")

    def run(source: Path, target: Path) -> None:
        tools.quantize_dynamic(
            source,
            target,
            op_types_to_quantize=list(_PRODUCTS),
            per_channel=True,
            reduce_range=reduce_range,
            weight_type=tools.QuantType.QInt8,
            extra_options={"MatMulConstBOnly": True, **_float_where_unknown()},
        )

    made = _through_files(model, run)
    if not found and not _uses(made, "DynamicQuantizeLinear"):
        raise BackendError("the model has no matrix product with constant weights, and no embedding")
    return made


def quantize_static(
    model: Any,
    batches: Sequence[Feeds],
    *,
    method: str = "minmax",
    reduce_range: bool = False,
) -> Any:
    """Return a model with weights in int8 by channel and activations in uint8, as nodes that quantise.

    A model with convolutions is quantised throughout; in others only matrix products are, and embeddings
    by row.

    Args:
        model: in float32.
        batches: inputs to find the ranges of activations with.
        method: ``minmax``, ``entropy`` or ``percentile``.
        reduce_range: weights of 7 bits, for x86 processors without VNNI, on which sums overflow.

    Raises:
        ConstraintError: there is no such method.
        BackendError: the model has nothing to quantise.
    """
    if method not in METHODS:
        raise ConstraintError(f"the calibration method is {method!r}; there are {', '.join(METHODS)}")
    tools = need("onnxruntime.quantization")
    convolves = _uses(model, "Conv")
    found = 0 if convolves else quantize_embeddings(model)

    class Reader(tools.CalibrationDataReader):
        """Gives the batches one by one."""

        def __init__(self) -> None:
            self._left: Iterator[Mapping[str, Any]] = iter(batches)

        def get_next(self) -> Mapping[str, Any] | None:
            return next(self._left, None)

    def run(source: Path, target: Path) -> None:
        prepared = source.with_name("prepared.onnx")
        tools.quant_pre_process(source, prepared, skip_symbolic_shape=True)
        _flatten_biases(prepared)
        tools.quantize_static(
            prepared,
            target,
            Reader(),
            quant_format=tools.QuantFormat.QDQ,
            op_types_to_quantize=None if convolves else list(_PRODUCTS),
            per_channel=True,
            reduce_range=reduce_range,
            activation_type=tools.QuantType.QUInt8,
            weight_type=tools.QuantType.QInt8,
            calibrate_method=getattr(tools.CalibrationMethod, METHODS[method]),
            extra_options=_float_where_unknown(),
        )

    made = _through_files(model, run)
    if not found and not _uses(made, "QuantizeLinear"):
        raise BackendError("the model has no convolution or matrix product with constant weights")
    return made


def _flatten_biases(path: Path) -> None:
    """Make biases of one row vectors, which is the same sum; ONNX Runtime's quantiser fails on rows."""
    model = onnx.open_model(path)
    biases = {node.input[2] for node in model.graph.node if node.op_type == "Gemm" and len(node.input) > 2}
    shared = {name for node in model.graph.node if node.op_type != "Gemm" for name in node.input}
    rows = [
        tensor
        for tensor in model.graph.initializer
        if tensor.name in biases - shared and len(tensor.dims) == 2 and tensor.dims[0] == 1
    ]
    for tensor in rows:
        del tensor.dims[0]
    if rows:
        onnx.save(model, path)


def quantize_weights(model: Any, *, bits: int, block_size: int) -> Any:
    """Return a model with weights of matrix products in 4 or 8 bits by blocks, and embeddings in 8 by row.

    Raises:
        ConstraintError: ``block_size`` is no power of two from 16 on.
        BackendError: the model has no matrix product with constant weights.
    """
    if block_size < _SMALLEST_BLOCK or block_size & (block_size - 1):
        raise ConstraintError(
            f"block_size is {block_size!r}; a power of two is wanted, {_SMALLEST_BLOCK} or more"
        )
    tools = need("onnxruntime.quantization.matmul_nbits_quantizer")
    held = need("onnxruntime.quantization.onnx_model").ONNXModel(model)
    held.replace_gemm_with_matmul()
    model = held.model
    quantize_embeddings(model)
    rows = _product_rows(model)
    if not rows:
        raise BackendError("the model has no matrix product with constant weights")
    # A block longer than a column is filled up with zeros.
    while block_size > max(_SMALLEST_BLOCK, min(rows)):
        block_size //= 2
    with _quiet():
        quantizer = tools.MatMulNBitsQuantizer(
            model,
            bits=bits,
            block_size=block_size,
            is_symmetric=bits == 8,
            accuracy_level=_INT8_KERNELS,
            op_types_to_quantize=("MatMul",),
        )
        quantizer.process()
    return quantizer.model.model


def _float_where_unknown() -> dict[str, Any]:
    """Let tensors count as float32 past operators of ONNX Runtime's own, for which no shapes are inferred."""
    return {"DefaultTensorType": onnx.element_types().FLOAT}


def _product_rows(model: Any) -> list[int]:
    dims = {tensor.name: list(tensor.dims) for tensor in model.graph.initializer}
    return [
        dims[node.input[1]][0]
        for node in model.graph.node
        if node.op_type == "MatMul" and len(dims.get(node.input[1], [])) == 2
    ]


def _uses(model: Any, operator: str) -> bool:
    return any(node.op_type == operator for node in model.graph.node)


def _through_files(model: Any, run: Callable[[Path, Path], None]) -> Any:
    """Let a tool that reads and writes files change a model."""
    with tempfile.TemporaryDirectory(prefix="hamerspace-") as room, _quiet():
        source, target = Path(room) / "float.onnx", Path(room) / "quantized.onnx"
        onnx.save(model, source)
        run(source, target)
        return onnx.open_model(target)


@contextmanager
def _quiet() -> Generator[None]:
    """Keep the tools' advice, which is written to the root logger, off the screen."""
    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        root.setLevel(level)
