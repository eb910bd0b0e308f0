"""Turning modules into programs of torch.export and into TorchScript, with free axes where they hold."""

from __future__ import annotations

import operator
import warnings
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hamerspace._imports import need
from hamerspace.backends._pytorch_signature import OTHER_LENGTH, tensors_of, with_lengths
from hamerspace.exceptions import BackendError, first_line
from hamerspace.models.info import DEFAULT_LENGTH, ModelInfo, TensorSpec

_AGREEMENT = 1e-3


@dataclass(frozen=True, kw_only=True)
class Converted:
    """A converted model, with the inputs that it takes."""

    program: Any
    inputs: tuple[TensorSpec, ...]
    notes: tuple[str, ...]


@contextmanager
def quiet() -> Generator[None, None, None]:
    """Keep back what torch and torchao say about their own insides while they convert."""
    with warnings.catch_warnings():
        for category in (DeprecationWarning, FutureWarning, UserWarning, PendingDeprecationWarning):
            warnings.simplefilter("ignore", category)
        yield


def export(module: Any, info: ModelInfo, device: str = "cpu") -> Converted:
    """Export a module that takes tensors by position.

    Axes that have a name stay free where torch.export can prove that any length goes and the program agrees
    with the module at other lengths; else all are fixed, the batch to 1.

    Raises:
        BackendError: torch.export cannot follow the model.
    """
    failure: Exception | None = None
    if info.dynamic_axes:
        try:
            program = _export(module, with_lengths(info, 2, DEFAULT_LENGTH), info, device)
            inputs = _inputs_of(program, info)
            exported = replace(info, inputs=inputs)
            if _batch_is_free(info, inputs) and _agrees(program.module(), module, exported, device):
                return Converted(program=program, inputs=inputs, notes=_notes(info, inputs))
        except Exception as error:  # noqa: BLE001 - whatever a model raises under the tracer
            failure = error
    static = with_lengths(info, 1, DEFAULT_LENGTH)
    try:
        program = _export(module, static, static, device)
    except Exception as error:
        raise BackendError(f"torch.export cannot follow the model: {first_line(failure or error)}") from error
    return Converted(program=program, inputs=static.inputs, notes=_notes(info, static.inputs))


def trace(module: Any, info: ModelInfo) -> Converted:
    """Trace a module that takes tensors by position into TorchScript; axes are treated as by `export`.

    Raises:
        BackendError: the tracer cannot follow the model.
    """
    torch = need("torch")
    free = bool(info.dynamic_axes)
    for batch in (2, 1) if free else (1,):
        fixed = with_lengths(info, batch, DEFAULT_LENGTH)
        try:
            with quiet(), torch.no_grad():
                # Constants that hold for the example alone, of which it warns, `_agrees` finds.
                warnings.simplefilter("ignore", torch.jit.TracerWarning)
                example = tensors_of(fixed.draw(batch), info)
                program = torch.jit.trace(module, example, check_trace=False, strict=False).eval()
        except Exception as error:
            raise BackendError(f"torch.jit.trace cannot follow the model: {first_line(error)}") from error
        if batch == 2 and not _agrees(program, module, info):
            continue
        inputs = info.inputs if batch == 2 or not free else fixed.inputs
        return Converted(program=program, inputs=inputs, notes=_notes(info, inputs))
    raise BackendError("torch.jit.trace gave another model than it was given")


def layered(module: Any, info: ModelInfo) -> tuple[Any, ModelInfo]:
    """Return a module as torch.export follows it, which torch's tracers can follow, and what it takes.

    Linear layers and embeddings are layers again, so that they can be quantised as such. Models that look at
    lengths in their own code, as those of transformers do, cannot be traced as they are.

    Raises:
        BackendError: torch.export cannot follow the model.
    """
    torch = need("torch")
    made = export(module, info)
    found = made.program.module()
    for place, node in enumerate(list(found.graph.nodes)):
        if node.op == "call_module" and not node.users:  # it checks the lengths of inputs
            found.graph.erase_node(node)
        elif node.op == "call_function" and (pair := _layer_of(node, found)) is not None:
            layer, given = pair
            found.add_submodule(f"layer_{place}", layer)
            with found.graph.inserting_before(node):
                node.replace_all_uses_with(found.graph.call_module(f"layer_{place}", (given,)))
            found.graph.erase_node(node)
    found.graph.eliminate_dead_code()
    # A module of its own holds what the graph uses and nothing else.
    return torch.fx.GraphModule(found, found.graph).eval(), replace(info, inputs=made.inputs)


def _layer_of(node: Any, module: Any) -> tuple[Any, Any] | None:
    """Return the layer that a call of its function stands for, and what it is given."""
    torch = need("torch")
    aten, nn = torch.ops.aten, torch.nn

    def held(one: Any) -> Any:
        is_held = isinstance(one, torch.fx.Node) and one.op == "get_attr"
        return operator.attrgetter(one.target)(module) if is_held else None

    if node.target is aten.linear.default:
        given, weight, bias = (*node.args, None)[:3]
        value = held(weight)
        if value is None or (bias is not None and held(bias) is None):
            return None
        layer = nn.Linear(value.shape[1], value.shape[0], bias=bias is not None, device="meta")
        layer.weight = nn.Parameter(value, requires_grad=False)
        if bias is not None:
            layer.bias = nn.Parameter(held(bias), requires_grad=False)
        return layer, given
    if node.target is aten.embedding.default and (value := held(node.args[0])) is not None:
        return nn.Embedding.from_pretrained(value), node.args[1]
    return None


def save_exported(program: Any, path: Path) -> None:
    """Write an exported program, without the paths and lines of the source that it was made from."""
    torch = need("torch")
    for module in program.graph_module.modules():
        for node in module.graph.nodes if isinstance(module, torch.fx.GraphModule) else ():
            node.meta.pop("stack_trace", None)
    with quiet():
        torch.export.save(program, str(path))


def save_torchscript(program: Any, path: Path) -> None:
    """Write TorchScript."""
    with quiet():
        need("torch").jit.save(program, str(path))


def freeze(program: Any) -> Any:
    """Return TorchScript with weights as constants."""
    with quiet():
        return need("torch").jit.freeze(program)


def _export(module: Any, fixed: ModelInfo, info: ModelInfo, device: str) -> Any:
    torch = need("torch")
    example = tensors_of(fixed.draw(2), info, device)
    axes = tuple(
        {axis: torch.export.Dim.AUTO for axis, length in enumerate(spec.shape) if isinstance(length, str)}
        for spec in info.inputs
    )
    with quiet(), torch.no_grad():
        return torch.export.export(module, example, dynamic_shapes=axes if any(axes) else None, strict=False)


def _inputs_of(program: Any, info: ModelInfo) -> tuple[TensorSpec, ...]:
    """Inputs with the axes that the export has fixed as they are now."""
    values = {node.name: node.meta["val"] for node in program.graph.nodes if node.op == "placeholder"}
    found: list[TensorSpec] = []
    for spec, name in zip(info.inputs, program.graph_signature.user_inputs, strict=True):
        lengths = values[name].shape
        shape = tuple(
            given if isinstance(given, int) or not isinstance(length, int) else length
            for given, length in zip(spec.shape, lengths, strict=True)
        )
        found.append(replace(spec, shape=shape))
    return tuple(found)


def _batch_is_free(info: ModelInfo, inputs: tuple[TensorSpec, ...]) -> bool:
    """Whether no batch that is free in the source was fixed to that of the example."""
    return all(
        after.batch is None
        for before, after in zip(info.inputs, inputs, strict=True)
        if before.shape and before.batch is None
    )


def _agrees(program: Any, module: Any, info: ModelInfo, device: str = "cpu") -> bool:
    """Whether a conversion gives what the module gives at lengths that it was not made with."""
    torch = need("torch")
    for batch, length in ((1, OTHER_LENGTH), (3, DEFAULT_LENGTH)):
        feeds = tensors_of(with_lengths(info, batch, length).draw(batch, seed=1), info, device)
        try:
            with torch.no_grad():
                wanted, given = module(*feeds), program(*feeds)
        except Exception:  # noqa: BLE001 - a conversion that fails does not hold
            return False
        for one, other in zip(wanted, given, strict=True):
            if one.shape != other.shape:
                return False
            scale = max(float(one.abs().max()), 1e-6) if one.numel() else 1.0
            if one.numel() and float((one.double() - other.double()).abs().max()) > _AGREEMENT * scale:
                return False
    return True


def _notes(info: ModelInfo, inputs: tuple[TensorSpec, ...]) -> tuple[str, ...]:
    fixed = [
        f"{after.name} {list(after.shape)}"
        for before, after in zip(info.inputs, inputs, strict=True)
        if before.shape != after.shape
    ]
    return (f"shapes were fixed, as the conversion holds for no others: {', '.join(fixed)}",) if fixed else ()
