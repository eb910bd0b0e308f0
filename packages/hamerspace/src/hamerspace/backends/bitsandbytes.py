"""The backend of bitsandbytes: linear layers in int8 and in 4-bit NormalFloat, on CPU and CUDA.

The weights are quantised by bitsandbytes and multiplied by the operators that it registers with torch. Its
own layers keep parts of their state outside of tensors, which torch.export cannot follow, so that the weights
move into layers with plain buffers; the artifact is a torch.export archive and holds no pickle.

NF4 is that of QLoRA, Dettmers et al. 2023, https://arxiv.org/abs/2305.14314; int8 is the vector-wise
quantisation of LLM.int8(), Dettmers et al. 2022, https://arxiv.org/abs/2208.07339, without its outliers.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Generator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, ClassVar, Final

from hamerspace._imports import need
from hamerspace.artifact import Manifest
from hamerspace.backends._pytorch_export import quiet
from hamerspace.backends._pytorch_layers import embeddings_in_place, replace_layers
from hamerspace.backends.base import BaseBackend, BuildContext, Built, Candidate, Verdict
from hamerspace.backends.modules import own_module, save_module, takes_modules
from hamerspace.exceptions import UnsupportedError
from hamerspace.models.info import ModelInfo
from hamerspace.runtimes.base import Runner, RunOptions
from hamerspace.runtimes.torch import open_runner

BLOCK: Final = 64
"""Weights that share a scale in nf4."""

_CANDIDATES: Final = (
    Candidate(
        backend="bitsandbytes",
        technique="int8",
        forms=(".pt2",),
        goal="quantize",
        description="int8 linear layers, activations quantised by row as they come; int8 embeddings",
        bits=8,
    ),
    Candidate(
        backend="bitsandbytes",
        technique="nf4",
        forms=(".pt2",),
        goal="quantize",
        description="linear layers in 4-bit NormalFloat with quantised scales; int8 embeddings",
        bits=4,
    ),
)


class BitsAndBytesBackend(BaseBackend):
    """Modules of torch and transformers, whose linear layers it can find."""

    name: ClassVar[str] = "bitsandbytes"
    title: ClassVar[str] = "bitsandbytes"
    modules: ClassVar[tuple[str, ...]] = ("torch", "bitsandbytes")
    distributions: ClassVar[tuple[str, ...]] = ("bitsandbytes", "torch")
    extra: ClassVar[str] = "bitsandbytes"

    def supports_model(self, model_info: ModelInfo) -> Verdict:
        """Modules alone: TorchScript and exported programs have no layers any more."""
        return takes_modules(model_info)

    def candidates(self, model_info: ModelInfo, *, hardware: str = "cpu") -> list[Candidate]:
        """int8 and nf4."""
        del hardware
        return list(_CANDIDATES) if self.supports_model(model_info) else []

    def build(self, context: BuildContext) -> Built:
        """Quantise linear layers and embeddings, and export the model.

        Raises:
            UnsupportedError: there is no linear layer, or no such technique.
            BackendError: torch.export cannot follow the model.
        """
        make = _LAYERS.get(context.candidate.technique)
        if make is None:
            raise UnsupportedError(
                f"backend bitsandbytes has no {context.candidate.technique!r}; it has {', '.join(_LAYERS)}"
            )
        torch = need("torch")
        torch.set_num_threads(context.threads)
        # In a list, so that a model that is one layer has a place where the layer is replaced.
        held = torch.nn.ModuleList([own_module(context)])
        with offline(), quiet(), torch.no_grad():
            found = replace_layers(held, torch.nn.Linear, make)
            if not found:
                raise UnsupportedError("the model has no linear layers for bitsandbytes to quantise")
            tables = embeddings_in_place(held)
        return save_module(
            context,
            held[0],
            options={"operators": ["bitsandbytes"]},
            notes=(f"{found} linear layers and {tables} embeddings were quantised",),
        )

    def open(self, manifest: Manifest, folder: Path, options: RunOptions) -> Runner:
        """Open an artifact of this backend."""
        with offline(), quiet():
            return open_runner(manifest, folder, options)


@contextmanager
def offline() -> Generator[None, None, None]:
    """Keep bitsandbytes from fetching kernels when it is imported, as it does on some processors."""
    logger = logging.getLogger("bitsandbytes")
    level, before = logger.level, os.environ.get("HF_HUB_OFFLINE")
    logger.setLevel(logging.ERROR)  # it warns that it could not fetch them
    os.environ["HF_HUB_OFFLINE"] = "1"
    try:
        yield
    finally:
        logger.setLevel(level)
        if before is None:
            del os.environ["HF_HUB_OFFLINE"]
        else:
            os.environ["HF_HUB_OFFLINE"] = before


def _int8_linear(layer: Any) -> Any:
    torch = need("torch")
    functional = need("bitsandbytes.functional")
    weight, scale, _ = functional.int8_vectorwise_quant(layer.weight.detach().to(torch.float16).contiguous())
    return _int8_class()(weight, scale.float(), layer.bias)


def _nf4_linear(layer: Any) -> Any:
    functional = need("bitsandbytes.functional")
    packed, state = functional.quantize_4bit(
        layer.weight.detach().contiguous(), blocksize=BLOCK, compress_statistics=True, quant_type="nf4"
    )
    return _nf4_class()(packed, state, layer.bias)


_LAYERS: Final[dict[str, Callable[[Any], Any]]] = {"int8": _int8_linear, "nf4": _nf4_linear}


@cache
def _int8_class() -> Any:
    torch = need("torch")

    class Int8Linear(torch.nn.Module):
        """Weights of int8 with a scale a row; inputs are rounded to int8 by row."""

        def __init__(self, weight_NK: Any, scale_N: Any, bias: Any) -> None:
            super().__init__()  # pyright: ignore[reportUnknownMemberType]
            self.register_buffer("weight", weight_NK)
            self.register_buffer("scale", scale_N)
            self.bias = bias

        def forward(self, x: Any) -> Any:
            rows_MK = x.reshape(-1, x.shape[-1])
            largest_M = rows_MK.abs().amax(dim=1).clamp_min(1e-12)
            rounded_MK = (rows_MK * (127.0 / largest_M.unsqueeze(-1))).round().to(torch.int8)
            given_MN = torch.ops.bitsandbytes.int8_scaled_mm(
                rounded_MK, self.weight, largest_M.float(), self.scale, dtype=x.dtype
            )
            given = given_MN.reshape(*x.shape[:-1], self.weight.shape[0])
            return given if self.bias is None else given + self.bias

    return Int8Linear


@cache
def _nf4_class() -> Any:
    torch = need("torch")

    class NF4Linear(torch.nn.Module):
        """Weights in NF4; the scales of their blocks are int8 with scales of their own."""

        def __init__(self, packed: Any, state: Any, bias: Any) -> None:
            super().__init__()  # pyright: ignore[reportUnknownMemberType]
            self.register_buffer("weight", packed)
            self.register_buffer("scales", state.absmax)
            self.register_buffer("scales_scale", state.state2.absmax)
            self.register_buffer("scales_code", state.state2.code)
            self.register_buffer("scales_offset", state.offset)
            self.shape = [int(n) for n in state.shape]
            self.bias = bias

        def forward(self, x: Any) -> Any:
            return torch.ops.bitsandbytes.gemm_4bit(
                x,
                self.weight,
                self.shape,
                self.scales_scale,
                BLOCK,
                "nf4",
                bias=self.bias,
                absmax_8bit=self.scales,
                absmax_code=self.scales_code,
                absmax_offset=self.scales_offset,
            )

    return NF4Linear
