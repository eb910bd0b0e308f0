"""What layers take and how they differ, measured."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import contextmanager
from typing import cast

import torch
from bitcore.exceptions import QuantizationError
from torch import Tensor, nn

from bitlayers._ternary import TernaryLayer

__all__ = [
    "check_finite",
    "compare_layers",
    "deploy_layers",
    "estimate_memory_usage",
    "evaluating",
    "median_times_ms",
    "ternary_layers",
]


def ternary_layers(module: nn.Module) -> dict[str, TernaryLayer]:
    """Return the ternary layers of a module by their names; the module itself has the name ''."""
    parts = cast("Iterable[tuple[str, nn.Module]]", module.named_modules())
    return {name: part for name, part in parts if isinstance(part, TernaryLayer)}


def check_finite(module: nn.Module) -> None:
    """Look at the float weight of each ternary layer.

    Raises:
        QuantizationError: One holds NaN or infinity; the message names its layer.
    """
    for name, layer in ternary_layers(module).items():
        if layer.weight is not None and not layer.weight.is_meta and not bool(layer.weight.isfinite().all()):
            raise QuantizationError(f"the weight of {name or 'the layer'} holds NaN or infinity.")


def deploy_layers(module: nn.Module) -> nn.Module:
    """Deploy each ternary layer of a module, put the module in evaluation, and return it.

    Raises:
        QuantizationError: A weight holds NaN or infinity; the message names its layer. None is deployed then.
    """
    check_finite(module)
    for layer in ternary_layers(module).values():
        layer.deploy()
    return module.eval()


def estimate_memory_usage(module: nn.Module) -> dict[str, float]:
    """Return what a module's parameters and buffers take, in bytes, and what they would take otherwise.

    Tensors that are used twice count once, and what evaluation keeps beside float weights does not count.

    Args:
        module: A layer or a model, on any device, also meta.

    Returns:
        `total_bytes`: What is held now.
        `float32_bytes`: What the same module takes with all of its weights in 32 bits.
        `deployed_bytes`: What is left after `deploy`.
        `ternary_weights`: How many weights are ternary.
        `bits_per_ternary_weight`: Stored bits of each after `deploy`, padding and scales included; 0.0 where
            there is none.
        `reduction`: `1 - deployed_bytes / float32_bytes`; 0.0 where there is nothing.
    """
    # A weight that layers share counts once, until each has packed its own.
    layers = list(
        {
            id(layer) if layer.weight is None else id(layer.weight): layer
            for layer in ternary_layers(module).values()
        }.values()
    )
    packs = {id(t) for layer in layers for t in (layer.weight, layer.qweight, layer.qweight_scale)}
    held = {id(t): t for t in (*module.parameters(), *module.buffers())}
    others = [tensor for key, tensor in held.items() if key not in packs]
    other_now = sum(tensor.nbytes for tensor in others)
    other_float32 = sum(
        tensor.numel() * 4 if tensor.is_floating_point() else tensor.nbytes for tensor in others
    )
    weights = sum(layer.weight_count for layer in layers)
    packed = sum(layer.packed_bytes for layer in layers)
    now = sum(layer.packed_bytes if layer.weight is None else layer.weight.nbytes for layer in layers)
    float32 = other_float32 + weights * 4
    return {
        "total_bytes": other_now + now,
        "float32_bytes": float32,
        "deployed_bytes": other_now + packed,
        "ternary_weights": weights,
        "bits_per_ternary_weight": packed * 8 / weights if weights else 0.0,
        "reduction": 1 - (other_now + packed) / float32 if float32 else 0.0,
    }


@contextmanager
def evaluating(*modules: nn.Module) -> Generator[None]:
    """Put modules in evaluation for the time of a `with`, and each of their parts back to what it was."""
    training = [part for module in modules for part in module.modules() if part.training]
    try:
        # Those that are in evaluation already keep what they have packed.
        for module in modules:
            if any(part.training for part in module.modules()):
                module.eval()
        yield
    finally:
        for part in training:
            part.training = True
            if isinstance(part, TernaryLayer):
                part.forget_packed()


def median_times_ms(
    calls: Sequence[Callable[[], object]],
    *,
    rounds: int = 5,
    device: torch.device | str = "cpu",
    threads: int = 1,
    round_ms: float = 20.0,
) -> list[float]:
    """Time calls in turns, so that what else the machine does falls on all of them.

    Args:
        calls: What is timed; each is called at least twice before.
        rounds: How many turns each gets.
        device: Where they compute; other devices than the CPU are waited for.
        threads: Of torch, while they run.
        round_ms: About how long a turn lasts, in milliseconds; a call that takes longer is a turn.

    Returns:
        For each the median over its turns of the mean time of a call, in milliseconds: on the CPU with one
        thread that of the processor, which other work on the machine moves little; else wall time.

    Raises:
        QuantizationError: `rounds` is below 1.
    """
    if rounds < 1:
        raise QuantizationError(f"rounds is {rounds}; it must be 1 or more.")
    on_cpu = torch.device(device).type == "cpu"
    clock = time.process_time if on_cpu and threads == 1 else time.perf_counter

    def turn_ms(call: Callable[[], object], count: int) -> float:
        start = clock()
        for _ in range(count):
            call()
        if not on_cpu:
            torch.accelerator.synchronize()
        return (clock() - start) * 1000 / count

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        counts: list[int] = []
        for call in calls:
            turn_ms(call, 1)
            counts.append(max(1, round(round_ms / max(turn_ms(call, 1), 1e-4))))
        turns = [[turn_ms(call, n) for call, n in zip(calls, counts, strict=True)] for _ in range(rounds)]
    finally:
        torch.set_num_threads(before)
    return [statistics.median(column) for column in zip(*turns, strict=True)]


@torch.no_grad()
def compare_layers(reference: nn.Module, layer: nn.Module, x: Tensor, *, rounds: int = 5) -> dict[str, float]:
    """Measure how far the outputs of two layers lie apart, what each takes, and how long each takes.

    Both are put in evaluation while they are measured, and left as they were.

    Args:
        reference: What is compared with, such as a `torch.nn.Linear`.
        layer: What stands in its place, such as a `BitLinear`.
        x: Inputs of both.
        rounds: In how many turns both are timed, one after the other; each lasts about 20 ms.

    Returns:
        `max_abs_error`: The largest difference of two outputs.
        `relative_error`: The norm of the difference over the norm of the reference's output.
        `cosine_similarity`: Of all outputs as one vector.
        `reference_bytes`, `layer_bytes`: What is held now, as `estimate_memory_usage` counts.
        `memory_reduction`: `1 - layer_bytes / reference_bytes`.
        `reference_ms`, `layer_ms`: Median time of a call in milliseconds, as `median_times_ms` counts it.
        `speedup`: `reference_ms / layer_ms`.

    Raises:
        QuantizationError: The outputs differ in shape, or `rounds` is below 1.
    """
    with evaluating(reference, layer):
        expected, out = reference(x).double(), layer(x).double()
        if expected.shape != out.shape:
            raise QuantizationError(
                f"the outputs have the shapes {list(expected.shape)} and {list(out.shape)}."
            )
        reference_ms, layer_ms = median_times_ms(
            [lambda: reference(x), lambda: layer(x)], rounds=rounds, device=x.device
        )
    bytes_ = [estimate_memory_usage(part)["total_bytes"] for part in (reference, layer)]
    difference, norm = out - expected, expected.norm().item()
    return {
        "max_abs_error": difference.abs().max().item() if difference.numel() else 0.0,
        "relative_error": difference.norm().item() / norm if norm else float(bool(difference.any())),
        "cosine_similarity": torch.cosine_similarity(expected.flatten(), out.flatten(), 0).item(),
        "reference_bytes": bytes_[0],
        "layer_bytes": bytes_[1],
        "memory_reduction": 1 - bytes_[1] / bytes_[0] if bytes_[0] else 0.0,
        "reference_ms": reference_ms,
        "layer_ms": layer_ms,
        "speedup": reference_ms / layer_ms,
    }
