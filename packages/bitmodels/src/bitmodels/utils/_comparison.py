"""How two models differ, measured."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, cast

import torch
from bitlayers import BitConv2d, BitEmbedding, BitLinear
from bitlayers.utils import check_finite, estimate_memory_usage, evaluating, median_times_ms
from torch import Tensor, nn

from bitmodels.exceptions import QuantizationError
from bitmodels.utils._batches import answer_of, device_of, is_shifted, output_of, split_batch

__all__ = ["compare_models"]

_DRAWN, _TOKENS, _SIDE = 256, 32, 32


@torch.no_grad()
def compare_models(
    original: nn.Module,
    quantized: nn.Module,
    data: Iterable[Any] | Tensor | None = None,
    *,
    rounds: int = 5,
    seed: int = 0,
) -> dict[str, Any]:
    """Measure what a ternary model loses and gains against the one that it was made of.

    Both are put in evaluation while they are measured, and left as they were.

    Args:
        original: The float model.
        quantized: The ternary one, deployed or not.
        data: Batches of inputs, or of inputs and targets, or mappings with `labels`; or one tensor of inputs.
            Without it inputs are drawn at random to the shape of the model's first layer.
        rounds: Turns in which both are timed, on the first batch.
        seed: Of inputs that are drawn.

    Returns:
        `accuracy_diff`: What is lost. With classes as targets, the accuracy of `original` less that of
            `quantized`; with numbers as targets, the same of the coefficient of determination; without
            targets, the share of outputs whose top, or with one value the sign, differs.
        `accuracy_basis`: On what that rests, in words.
        `accuracy_original`, `accuracy_quantized`: Of each, where there are targets; else None.
        `agreement`: The share of outputs whose top, or sign, is the same.
        `memory_reduction`: `1 - quantized_bytes / original_bytes`.
        `original_bytes`, `quantized_bytes`: What is stored, of the ternary model once it is deployed.
        `speedup`: `original_ms / quantized_ms`.
        `original_ms`, `quantized_ms`: Median time of the first batch on one thread, as
            `bitlayers.utils.median_times_ms` counts it.

    Raises:
        QuantizationError: There is no data, batches or outputs do not fit, no inputs could be drawn, or a
            ternary layer's weight holds NaN or infinity.
    """
    check_finite(quantized)
    drawn = data is None
    batches = [_drawn(original, quantized, seed)] if data is None else data
    batches = [batches] if isinstance(batches, Tensor) else batches
    tally, first = _Tally(), None
    devices = device_of(original), device_of(quantized)
    with evaluating(original, quantized):
        for batch in batches:
            pairs = [split_batch(batch, device) for device in devices]
            first = [pair[0] for pair in pairs] if first is None else first
            try:
                targets = pairs[0][1]
                out, own = answer_of(original, *pairs[0])
                other = output_of(quantized, pairs[1][0])
            except (RuntimeError, TypeError, ValueError, IndexError) as error:
                if not drawn:
                    raise
                raise QuantizationError(
                    f"the model does not take inputs drawn to its first layer's shape ({error}); give data."
                ) from error
            if targets is not None and is_shifted(out, targets, own):
                out, other, targets = out[:, :-1], other[:, :-1], targets[:, 1:]
            tally.add(out.cpu(), other.cpu(), None if targets is None else targets.cpu())
        if first is None:
            raise QuantizationError("data has no batches.")
        inputs = first
        original_ms, quantized_ms = median_times_ms(
            [lambda: output_of(original, inputs[0]), lambda: output_of(quantized, inputs[1])],
            rounds=rounds,
            device=devices[0],
        )
    original_bytes = estimate_memory_usage(original)["total_bytes"]
    quantized_bytes = estimate_memory_usage(quantized)["deployed_bytes"]
    return tally.result(drawn) | {
        "memory_reduction": 1 - quantized_bytes / original_bytes if original_bytes else 0.0,
        "original_bytes": original_bytes,
        "quantized_bytes": quantized_bytes,
        "speedup": original_ms / quantized_ms,
        "original_ms": original_ms,
        "quantized_ms": quantized_ms,
    }


@dataclass
class _Tally:
    """What is counted over batches, for each of two models."""

    same: int = 0
    outputs: int = 0
    signs: bool = False
    labelled: int = 0
    numeric: bool = False
    right: tuple[int, int] = (0, 0)
    errors: tuple[float, float] = (0.0, 0.0)
    total: float = 0.0
    squares: float = 0.0
    numbers: int = 0

    def add(self, first: Tensor, second: Tensor, targets: Tensor | None) -> None:
        if first.shape != second.shape:
            raise QuantizationError(
                f"the models' outputs have the shapes {list(first.shape)} and {list(second.shape)}."
            )
        self.signs = first.ndim == 0 or first.shape[-1] == 1
        tops = [out > 0 if self.signs else out.argmax(-1) for out in (first, second)]
        self.outputs += tops[0].numel()
        self.same += int((tops[0] == tops[1]).sum())
        if targets is None:
            return
        self.labelled += 1
        if targets.is_floating_point():
            if targets.shape != first.shape:
                raise QuantizationError(
                    f"outputs of shape {list(first.shape)} and targets of {list(targets.shape)} do not fit."
                )
            self.numeric = True
            wanted = targets.double()
            self.errors = cast(
                "tuple[float, float]",
                tuple(
                    before + float((out.double() - wanted).square().sum())
                    for before, out in zip(self.errors, (first, second), strict=True)
                ),
            )
            self.total += float(wanted.sum())
            self.squares += float(wanted.square().sum())
            self.numbers += wanted.numel()
            return
        if self.signs or targets.shape != tops[0].shape:
            raise QuantizationError(
                f"targets of shape {list(targets.shape)} name no classes of outputs {list(first.shape)}."
            )
        counted = targets != -100
        self.right = cast(
            "tuple[int, int]",
            tuple(
                before + int((top == targets)[counted].sum())
                for before, top in zip(self.right, tops, strict=True)
            ),
        )
        self.numbers += int(counted.sum())

    def result(self, drawn: bool) -> dict[str, Any]:
        if not self.outputs:
            raise QuantizationError("the models gave no outputs to compare.")
        agreement = self.same / self.outputs
        accuracies: tuple[float | None, float | None] = (None, None)
        top = "sign" if self.signs else "top output"
        of = f"{self.outputs} outputs"
        if self.labelled and self.numbers:
            if self.numeric:
                variance = max(self.squares - self.total**2 / self.numbers, 1e-300)
                accuracies = (1 - self.errors[0] / variance, 1 - self.errors[1] / variance)
                basis = f"coefficient of determination of {self.numbers} targets"
            else:
                accuracies = (self.right[0] / self.numbers, self.right[1] / self.numbers)
                basis = f"accuracy on {self.numbers} labels"
            difference = accuracies[0] - accuracies[1]
        else:
            difference = 1 - agreement
            source = "inputs drawn at random" if drawn else "the inputs given, which have no labels"
            basis = f"agreement, not accuracy: the share of {of} whose {top} differs, on {source}"
        return {
            "accuracy_diff": difference,
            "accuracy_basis": basis,
            "accuracy_original": accuracies[0],
            "accuracy_quantized": accuracies[1],
            "agreement": agreement,
        }


def _drawn(original: nn.Module, quantized: nn.Module, seed: int) -> Tensor:
    """Return random inputs of the shape that a model's first layer takes."""
    generator = torch.Generator().manual_seed(seed)
    for part in (*original.modules(), *quantized.modules()):
        if isinstance(part, nn.Linear | BitLinear):
            return torch.randn(_DRAWN, part.in_features, generator=generator)
        if isinstance(part, nn.Conv2d | BitConv2d):
            return torch.randn(_DRAWN // 8, part.in_channels, _SIDE, _SIDE, generator=generator)
        if isinstance(part, nn.Embedding | BitEmbedding):
            return torch.randint(part.num_embeddings, (_DRAWN // _TOKENS, _TOKENS), generator=generator)
    raise QuantizationError("the model's first layer is of no kind that inputs are drawn for; give data.")
