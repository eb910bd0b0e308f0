"""The layers of a model whose weights are quantised, and the blocks that they stand in."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import cast

from torch import Tensor, nn

from auto_round.exceptions import QuantizationError
from auto_round.low_cpu_mem._weights import named_modules


@dataclass(frozen=True, kw_only=True, slots=True)
class Layer:
    """One weight that is multiplied by: of a Linear, of GPT-2's Conv1D, or of all experts at once."""

    name: str
    """Full name of the module; of experts, that of the parameter."""
    module: nn.Module
    """What holds the weight."""
    attribute: str
    """The weight's name in it."""
    transposed: bool
    """The weight is stored as [.., in, out]."""

    @property
    def weight(self) -> nn.Parameter:
        """The weight as it is in the module now."""
        return getattr(self.module, self.attribute)

    @property
    def parameter_name(self) -> str:
        """Full name of the weight."""
        return self.name if self.name.endswith(f".{self.attribute}") else f"{self.name}.{self.attribute}"

    @property
    def width(self) -> int:
        """The inputs of the layer, which are the weights in a row."""
        return self.weight.shape[-2 if self.transposed else -1]

    @contextmanager
    def named_in_errors(self) -> Generator[None]:
        """Have a `QuantizationError` within a `with` begin with the layer's name."""
        try:
            yield
        except QuantizationError as failure:
            raise QuantizationError(f"{self.name}: {failure}") from failure

    def matrix(self, stored: Tensor) -> Tensor:
        """Return a weight, or its gradient, as a matrix [rows, in], a view where it can be one.

        The rows of all experts come one expert after another.
        """
        matrix = stored.transpose(-1, -2) if self.transposed else stored
        return matrix if matrix.ndim == 2 else matrix.reshape(-1, matrix.shape[-1])

    @contextmanager
    def open(self, stored: Tensor) -> Generator[Tensor]:
        """Give a weight as a matrix [rows, in] to be written; it has what was written afterwards."""
        matrix = self.matrix(stored)
        yield matrix
        if self.transposed and stored.ndim > 2:
            # Experts that are stored the other way round have no such view, so the matrix is a copy.
            stored.copy_(matrix.view(*stored.shape[:-2], stored.shape[-1], -1).transpose(-1, -2))


def find_layers(root: nn.Module, prefix: str = "") -> Iterator[Layer]:
    """Yield the layers below a module, in its order, under their full names.

    Linear layers, transformers' Conv1D, and the three-dimensional weights of modules of experts. Routers,
    which hold their weight themselves, are none.
    """
    for name, module in named_modules(root, prefix):
        if isinstance(module, nn.Linear):
            yield Layer(name=name, module=module, attribute="weight", transposed=False)
        elif _is_conv1d(module):
            yield Layer(name=name, module=module, attribute="weight", transposed=True)
        else:
            transposed = bool(getattr(module, "is_transposed", False))
            for attribute, parameter in cast(
                "Iterator[tuple[str, Tensor]]", module.named_parameters(recurse=False)
            ):
                if parameter.ndim == 3 and "expert" in type(module).__name__.lower():
                    yield Layer(
                        name=f"{name}.{attribute}", module=module, attribute=attribute, transposed=transposed
                    )


def _is_conv1d(module: nn.Module) -> bool:
    # By name, so that transformers need not be there for a model that does without it.
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf") and hasattr(module, "weight")


def find_blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """Return the name of the model's list of repeated blocks, and the list.

    That is the outermost `ModuleList` of modules of one kind that have layers; where there are several, the
    one that holds the most weights.

    Raises:
        QuantizationError: There is none.
    """
    found: dict[str, nn.ModuleList] = {}
    for name, module in named_modules(model, ""):
        inside = any(name.startswith(f"{outer}.") for outer in found)
        if isinstance(module, nn.ModuleList) and len(module) and not inside:
            kinds = {type(block) for block in module}
            if len(kinds) == 1 and next(find_layers(module[0]), None) is not None:
                found[name] = module
    if not found:
        raise QuantizationError(
            f"{type(model).__name__} has no list of repeated blocks (an nn.ModuleList of modules of one kind "
            "that hold Linear layers), which is what is quantised, one block after another."
        )
    name = max(found, key=lambda name: sum(weight.numel() for weight in found[name].parameters()))
    return name, found[name]
