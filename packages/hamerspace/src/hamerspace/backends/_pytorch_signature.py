"""Models of torch under one signature: named tensors by position in, a tuple of tensors out."""

from __future__ import annotations

import copy
import inspect
import keyword
from dataclasses import replace
from typing import Any, Final

import numpy as np

from hamerspace._arrays import flatten_outputs
from hamerspace._imports import need
from hamerspace.backends.base import BuildContext
from hamerspace.models.info import DEFAULT_LENGTH, Array, Feeds, ModelInfo, TensorSpec
from hamerspace.models.pytorch import forward_names
from hamerspace.models.source import ModelSource

OTHER_LENGTH: Final = DEFAULT_LENGTH * 3 // 4
"""What free axes are tried with after a conversion at `DEFAULT_LENGTH`."""


def own_model(source: ModelSource, device: str = "cpu") -> Any:
    """Return a model in evaluation mode: a module that may be changed, without gradients, or TorchScript."""
    model = source.load()
    if source.info.form == "exported":
        return model.module().to(device)
    if source.info.form == "torchscript":
        return model.eval().to(device)
    if source.model is not None:
        model = copy.deepcopy(model)
    return model.eval().requires_grad_(False).to(device)


def positional(model: Any, info: ModelInfo) -> Any:
    """Wrap a model as a module that takes the inputs of ``info`` by position and gives a tuple of tensors."""
    torch = need("torch")
    names = [spec.name for spec in info.inputs]
    known = forward_names(model) if info.form != "exported" else None
    by_name = known is not None and all(name in known for name in names)

    def forward(self: Any, *tensors: Any) -> tuple[Any, ...]:
        named = dict(zip(names, tensors, strict=True))
        given = self.model(**named) if by_name else self.model(*tensors)
        return tuple(flatten_outputs(given)[1].values())

    positions = inspect.Parameter.POSITIONAL_OR_KEYWORD
    shown = [inspect.Parameter(name, positions) for name in ("self", *map(_identifier, names))]
    forward.__signature__ = inspect.Signature(shown)  # pyright: ignore[reportFunctionMemberAccess]
    wrapped = type("Positional", (torch.nn.Module,), {"forward": forward})()
    wrapped.model = model
    return wrapped


def _identifier(name: str) -> str:
    plain = "".join(one if one.isalnum() and one.isascii() else "_" for one in name)
    return f"input_{plain}" if not plain or plain[0].isdigit() or keyword.iskeyword(plain) else plain


def tensors_of(feeds: Feeds, info: ModelInfo, device: str = "cpu") -> tuple[Any, ...]:
    """Return arrays as tensors, in the order of the inputs."""
    torch = need("torch")
    return tuple(
        torch.from_numpy(np.require(feeds[spec.name], requirements=["C", "W"])).to(device)
        for spec in info.inputs
    )


def with_lengths(info: ModelInfo, batch: int, length: int) -> ModelInfo:
    """Return the same model with every free axis fixed."""
    return replace(info, inputs=tuple(_fixed(spec, batch, length) for spec in info.inputs))


def _fixed(spec: TensorSpec, batch: int, length: int) -> TensorSpec:
    shape = tuple(
        n if isinstance(n, int) else batch if axis == 0 else length for axis, n in enumerate(spec.shape)
    )
    return replace(spec, shape=shape)


def calibration_tensors(context: BuildContext, inputs: tuple[TensorSpec, ...]) -> list[tuple[Any, ...]]:
    """Return the calibration data as tensors, in parts of the batch where that is fixed."""
    batch = next((spec.batch for spec in inputs if spec.batch is not None), None)
    found: list[tuple[Any, ...]] = []
    for feeds in context.calibration or ():
        total = min((len(array) for array in feeds.values() if array.ndim), default=1)
        step = batch or total
        parts: list[dict[str, Array]] = [
            {name: array[start : start + step] for name, array in feeds.items()}
            for start in range(0, total - step + 1, step)
        ]
        found += [tensors_of(part, context.info, context.device) for part in parts]
    return found
