"""int8 and int4 of torch: torchao for weights, PT2E for compiled code, ``torch.ao`` where it is faster."""

from __future__ import annotations

import logging
from collections.abc import Generator, Iterable
from contextlib import contextmanager
from typing import Any, Final

from hamerspace._imports import need
from hamerspace.backends._pytorch_export import quiet
from hamerspace.backends._pytorch_layers import embeddings_in_place
from hamerspace.exceptions import BackendError, UnsupportedError, first_line

GROUP: Final = 32
"""Weights that share a scale in int4."""


def has_torch_ao() -> bool:
    """Whether torch still has the quantisation of ``torch.ao``, which it calls deprecated."""
    try:
        with quiet():
            return all(
                hasattr(need(f"torch.ao.quantization.{module}"), name)
                for module, name in (("quantize", "quantize_dynamic"), ("quantize_fx", "convert_fx"))
            )
    except ImportError:
        return False


def dynamic_in_place(module: Any) -> str:
    """Quantise a module's linear, recurrent and embedding layers by ``torch.ao``; activations when it runs.

    Raises:
        UnsupportedError: it has no such layers.
    """
    nn = need("torch").nn
    layers = (nn.Linear, nn.LSTM, nn.GRU)
    found = sum(isinstance(one, layers) for one in module.modules())
    tables = embeddings_in_place(module)
    if not found and not tables:
        raise UnsupportedError("the model has no linear, recurrent or embedding layers to quantise")
    with quiet(), _engine(), _no_tips():
        ao = need("torch.ao.quantization")
        ao.quantize_dynamic(module, dict.fromkeys(layers, ao.default_dynamic_qconfig), inplace=True)
    return f"{found} linear and recurrent layers and {tables} embeddings were quantised"


def static_by_fx(module: Any, example: tuple[Any, ...], batches: Iterable[tuple[Any, ...]]) -> Any:
    """Return a quantised copy of a module, calibrated, by FX of ``torch.ao``.

    Raises:
        UnsupportedError: torch.fx cannot trace the module.
    """
    torch = need("torch")
    with quiet(), _engine(), _no_tips(), torch.no_grad():
        fx = need("torch.ao.quantization.quantize_fx")
        mapping = need("torch.ao.quantization").get_default_qconfig_mapping("x86")
        try:
            prepared = fx.prepare_fx(module, mapping, example)
        except Exception as error:
            raise UnsupportedError(
                f"torch.fx cannot trace the model ({first_line(error)}); int8-static-compiled needs no such "
                "trace"
            ) from error
        for batch in batches:
            prepared(*batch)
        return fx.convert_fx(prepared)


def weights_in_place(module: Any, bits: int) -> str:
    """Quantise the weights of linear layers to 8 or 4 bits, and embeddings to 8, with torchao.

    Raises:
        UnsupportedError: no layer has a shape that goes.
    """
    torch = need("torch")
    with quiet():
        ao = need("torchao.quantization")
        linear = [one for one in module.modules() if isinstance(one, torch.nn.Linear)]
        if bits == 8:
            taken, config = linear, ao.Int8WeightOnlyConfig()
        else:
            taken = [one for one in linear if one.in_features % GROUP == 0 and one.out_features % 16 == 0]
            config = need("torchao.prototype.quantization.int4").PrototypeInt4WeightOnlyConfig(
                group_size=GROUP, set_inductor_config=False
            )
        tables = embeddings_in_place(module)
        if not taken and not tables:
            raise UnsupportedError(f"the model has no linear or embedding layers that go into {bits} bits")
        chosen = {id(layer) for layer in taken}

        def is_chosen(layer: Any, name: str) -> bool:
            del name
            return id(layer) in chosen

        ao.quantize_(module, config, filter_fn=is_chosen)
        need("torchao.utils").unwrap_tensor_subclass(module)
    left = len(linear) - len(taken)
    return f"{len(taken)} linear layers in {bits} bits, {tables} embeddings in 8" + (
        f"; {left} linear layers, whose shapes do not fit, were left alone" if left else ""
    )


def by_pt2e(program: Any, batches: Iterable[tuple[Any, ...]], *, dynamic: bool) -> Any:
    """Return an exported program's module with quantise and dequantise nodes, for inductor to fuse on x86.

    Raises:
        BackendError: torchao's quantiser fails on the graph.
    """
    torch = need("torch")
    with quiet(), torch.no_grad():
        steps = need("torchao.quantization.pt2e.quantize_pt2e")
        x86 = need("torchao.quantization.pt2e.quantizer.x86_inductor_quantizer")
        quantizer = x86.X86InductorQuantizer()
        quantizer.set_global(x86.get_default_x86_inductor_quantization_config(is_dynamic=dynamic))
        try:
            prepared = steps.prepare_pt2e(program.module(), quantizer)
            for batch in batches:
                prepared(*batch)
            return steps.convert_pt2e(prepared)
        except Exception as error:
            raise BackendError(f"PT2E cannot quantise the model: {first_line(error)}") from error


def fuse_for_x86(converted: Any, example: tuple[Any, ...]) -> Any:
    """Put int8 operators of oneDNN in the place of dequantise, multiply and quantise in what `by_pt2e` gave.

    AOTInductor does not do so by itself, and would multiply in float32. Shapes become those of ``example``.

    Raises:
        BackendError: torchao cannot lower the graph.
    """
    torch = need("torch")
    with quiet(), torch.no_grad():
        try:
            lower = need("torchao.quantization.pt2e.lowering").lower_pt2e_quantized_to_x86
            lowered = lower(converted, example)
        except Exception as error:
            raise BackendError(f"torchao cannot lower the int8 graph to x86: {first_line(error)}") from error
    # Convolutions of oneDNN give their channels last, where a view of a contiguous tensor does not hold.
    for node in lowered.graph.nodes:
        if node.target is torch.ops.aten.view.default:
            node.target = torch.ops.aten.reshape.default
    # AOTInductor copies buffers by their strides, which weights packed by oneDNN lack; parameters it keeps.
    for name, packed in list(lowered.named_buffers()):
        if packed.is_mkldnn:
            delattr(lowered, name)
            lowered.register_parameter(name, torch.nn.Parameter(packed, requires_grad=False))
    lowered.recompile()
    return lowered


@contextmanager
def _engine() -> Generator[None, None, None]:
    """Use the int8 kernels of x86 where torch has them."""
    quantized = need("torch").backends.quantized
    before = quantized.engine
    if "x86" in quantized.supported_engines:
        quantized.engine = "x86"
    try:
        yield
    finally:
        quantized.engine = before


@contextmanager
def _no_tips() -> Generator[None, None, None]:
    """Keep back the log lines about moving to torchao: which of the two runs is chosen here."""
    logger = logging.getLogger("torch.ao.quantization")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)
