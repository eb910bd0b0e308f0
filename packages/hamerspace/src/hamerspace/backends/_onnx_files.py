"""Finishing ONNX models: made small, written, and described."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

from hamerspace._imports import need
from hamerspace.backends.base import BuildContext, Built
from hamerspace.models import onnx
from hamerspace.models.conversion import onnx_path
from hamerspace.models.info import Array, Feeds, TensorSpec
from hamerspace.runtimes.base import RunOptions
from hamerspace.runtimes.onnxruntime import Level, OnnxRunner, open_session

MAIN = "model.onnx"


def converted(context: BuildContext) -> Any:
    """Return the context's model as a ``ModelProto`` of one's own, with weights, and small."""
    return compact(onnx.open_model(onnx_path(context)))


def finish(context: BuildContext, model: Any, *, level: Level = "all", notes: Iterable[str] = ()) -> Built:
    """Write a model into the context's folder; ``level`` is for ONNX Runtime when it opens it."""
    compact(model)
    inputs = _inputs(model, context.info.inputs)
    onnx.save(model, context.folder / MAIN)
    alone = not onnx.data_files(onnx.open_model(context.folder / MAIN, weights=False))
    return Built(
        runtime="onnxruntime",
        main=MAIN,
        options={"level": level},
        alone=(MAIN,) if alone else (),
        run=_in_memory(model, context, level) if alone else None,
        inputs=inputs if inputs != context.info.inputs else None,
        notes=tuple(notes),
    )


def run_once(model: Any, context: BuildContext, level: Level = "all") -> dict[str, Array]:
    """Run a model on the context's example."""
    return dict(_in_memory(model, context, level)(context.example()))


def compact(model: Any) -> Any:
    """Take out of a model what no runtime needs, and return it.

    That is documentation, records of exporters, shapes in between, tensors that nothing uses or that are
    there twice, and long names in between. Names of inputs and outputs stay.
    """
    graph = model.graph
    model.doc_string = graph.doc_string = ""
    del (
        model.metadata_props[:],
        graph.metadata_props[:],
        graph.value_info[:],
        graph.quantization_annotation[:],
    )
    stored = {tensor.name for tensor in graph.initializer}
    _keep(graph.input, lambda value: value.name not in stored)
    for node in graph.node:
        node.doc_string = ""
        del node.metadata_props[:]
    for value in (*graph.input, *graph.output):
        value.doc_string = ""
        del value.metadata_props[:]
    if any(_has_subgraph(node) for node in graph.node):
        return model
    _merge_equal(graph)
    used = {name for node in graph.node for name in node.input} | {value.name for value in graph.output}
    _keep(graph.initializer, lambda tensor: tensor.name in used)
    _shorten(graph)
    domains = {node.domain for body in (graph, *model.functions) for node in body.node}
    _keep(model.opset_import, lambda entry: entry.domain in domains or not entry.domain)
    return model


def replace_nodes(graph: Any, change: Callable[[Any], list[Any] | None]) -> int:
    """Replace each node for which ``change`` gives others by these, and return how many there were."""
    nodes: list[Any] = []
    changed = 0
    for node in graph.node:
        others = change(node)
        changed += others is not None
        nodes.extend([node] if others is None else others)
    kept = [need("onnx").NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del graph.node[:]
    graph.node.extend(kept)
    return changed


def with_domain(model: Any, domain: str = "com.microsoft") -> None:
    """Declare that a model uses operators of a domain."""
    if all(entry.domain != domain for entry in model.opset_import):
        model.opset_import.add(domain=domain, version=1)


def _in_memory(model: Any, context: BuildContext, level: Level) -> Callable[[Feeds], Mapping[str, Array]]:
    opened: list[OnnxRunner] = []
    content = model.SerializeToString()

    def run(feeds: Feeds) -> dict[str, Array]:
        if not opened:
            session = open_session(content, RunOptions(threads=context.threads), level=level)
            opened.append(OnnxRunner(session, context.info.inputs, context.info.outputs))
        return opened[0].run(feeds)

    return run


def _inputs(model: Any, specs: tuple[TensorSpec, ...]) -> tuple[TensorSpec, ...]:
    """Return the specs with lengths that the model has fixed."""
    shapes = {value.name: value.type.tensor_type.shape.dim for value in model.graph.input}
    return tuple(
        replace(
            spec,
            shape=tuple(
                fixed.dim_value if isinstance(length, str) and fixed.dim_value > 0 else length
                for length, fixed in zip(spec.shape, shapes[spec.name], strict=True)
            ),
        )
        for spec in specs
    )


def _keep(entries: Any, wanted: Callable[[Any], bool]) -> None:
    kept = [entry for entry in entries if wanted(entry)]
    if len(kept) < len(entries):
        copies: list[Any] = []
        for entry in kept:
            copies.append(type(entry)())
            copies[-1].CopyFrom(entry)
        del entries[:]
        entries.extend(copies)


def _has_subgraph(node: Any) -> bool:
    return any(attribute.HasField("g") or attribute.graphs for attribute in node.attribute)


def _merge_equal(graph: Any) -> None:
    """Let nodes that use a copy of a tensor use the first of its kind."""
    first: dict[bytes, str] = {}
    instead: dict[str, str] = {}
    for tensor in graph.initializer:
        name, tensor.name = tensor.name, ""
        tensor.doc_string = ""
        key = hashlib.sha256(tensor.SerializeToString(deterministic=True)).digest()
        tensor.name = name
        instead[name] = first.setdefault(key, name)
    for node in graph.node:
        for place, name in enumerate(node.input):
            node.input[place] = instead.get(name, name)


def _shorten(graph: Any) -> None:
    fixed = {value.name for value in (*graph.input, *graph.output)}
    short: dict[str, str] = {name: name for name in fixed} | {"": ""}

    def rename(name: str) -> str:
        if name not in short:
            candidate = f"t{len(short)}"
            while candidate in fixed:
                candidate += "_"
            short[name] = candidate
        return short[name]

    for tensor in graph.initializer:
        tensor.name = rename(tensor.name)
    for place, node in enumerate(graph.node):
        node.name = f"n{place}"
        for names in (node.input, node.output):
            for slot, name in enumerate(names):
                names[slot] = rename(name)
