"""Graphs of OpenVINO from models of torch, TensorFlow and ONNX."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

from hamerspace._arrays import flatten_outputs
from hamerspace._imports import need
from hamerspace.backends._openvino_quiet import quiet
from hamerspace.backends.base import BuildContext
from hamerspace.exceptions import BackendError
from hamerspace.models.info import TensorSpec
from hamerspace.runtimes.openvino import core

FILE = "model.xml"


def graph_of(context: BuildContext) -> Any:
    """Return the context's model as an ``openvino.Model`` in its own precision, which may be changed.

    Inputs and outputs have the names of ``context.info``; axes that have a name there are of any length,
    unless the model could be traced for one length alone. The conversion is made once a run.

    Raises:
        BackendError: no road leads to OpenVINO, with the reason of each.
        ImportError: what a conversion needs is not installed.
    """
    folder = context.once("openvino", lambda folder: _convert(context, folder))
    return core().read_model(folder / FILE)


def inputs_of(graph: Any, specs: Sequence[TensorSpec]) -> tuple[TensorSpec, ...]:
    """Return the signature's inputs with the lengths that the graph has along axes that were to be free."""
    shapes = {name: port.get_partial_shape() for port in graph.inputs for name in port.get_names()}
    return tuple(
        replace(
            spec,
            shape=tuple(
                axis.get_length() if isinstance(length, str) and axis.is_static else length
                for length, axis in zip(spec.shape, shapes[spec.name], strict=True)
            ),
        )
        if spec.name in shapes
        else spec
        for spec in specs
    )


def _convert(context: BuildContext, folder: Path) -> None:
    """Take the first road that leads to a graph, and save it without losing precision."""
    failures: list[str] = []
    for title, road in _roads(context):
        try:
            with quiet():
                graph = road(context)
                _name_(graph.inputs, [spec.name for spec in context.info.inputs])
                _name_(graph.outputs, [spec.name for spec in context.info.outputs])
                fix_shapes_(graph, context.info.inputs)
                graph.validate_nodes_and_infer_types()
                folder.mkdir(exist_ok=True)
                need("openvino").save_model(graph, folder / FILE, compress_to_fp16=False)
        except ImportError:
            raise
        except Exception as error:  # noqa: BLE001 - exporters raise anything, and another road may lead on
            failures.append(f"{title}: {type(error).__name__}: {next(iter(str(error).splitlines()), '')}")
        else:
            return
    raise BackendError(f"{context.info.name} cannot be converted to OpenVINO; by " + "; by ".join(failures))


def _roads(context: BuildContext) -> list[tuple[str, Callable[[BuildContext], Any]]]:
    direct: list[tuple[str, Callable[[BuildContext], Any]]] = []
    if context.info.framework == "tensorflow":
        direct = [("SavedModel", _from_tensorflow)]
    elif context.info.framework == "pytorch" and context.info.form != "torchscript":
        direct = [("torch.export", _from_torch)]
    return [*direct, ("ONNX", _from_onnx)]


def _from_torch(context: BuildContext) -> Any:
    from hamerspace.models.pytorch import call, evaluating

    torch, openvino = need("torch"), need("openvino")
    info = context.info
    model = context.source.load()
    body = model.module() if info.form == "exported" else model
    form = "module" if info.form == "exported" else info.form
    names = [spec.name for spec in info.inputs]

    class Flat(torch.nn.Module):
        """The model with tensors by position in and a tuple of tensors out."""

        body: Any

        def forward(self, *tensors: Any) -> tuple[Any, ...]:
            given = call(self.body, form, names, dict(zip(names, tensors, strict=True)))
            return tuple(flatten_outputs(given)[1].values())

    # A batch of 1 would be taken for a constant where it is to be free.
    feeds = tuple(torch.from_numpy(array) for array in info.draw(2, context.seed).values())
    free = tuple(
        {axis: torch.export.Dim.DYNAMIC for axis, length in enumerate(spec.shape) if isinstance(length, str)}
        for spec in info.inputs
    )
    shapes = {"tensors": free} if any(free) else None
    flat: Any = Flat()
    flat.body = body
    # An exported program refuses to be told its mode, so `eval` cannot be called.
    flat.training = False
    mode = nullcontext() if info.form == "exported" else evaluating(body)
    with mode, torch.no_grad():
        program = torch.export.export(flat, feeds, dynamic_shapes=shapes, strict=False)
    graph = openvino.convert_model(program)
    if len(graph.inputs) != len(names):
        # Which one is missing cannot be told here, and the ONNX road keeps names.
        raise BackendError(f"the graph uses {len(graph.inputs)} of the inputs {names}")
    # Weights are shared with the program: it has to live as long as the graph.
    graph.program = program
    return graph


def _from_tensorflow(context: BuildContext) -> Any:
    from hamerspace.models.tensorflow import export_saved_model

    with tempfile.TemporaryDirectory(prefix="hamerspace-") as room:
        folder = Path(room) / "saved_model"
        export_saved_model(context.source, folder)
        return need("openvino").convert_model(str(folder))


def _from_onnx(context: BuildContext) -> Any:
    from hamerspace.models.conversion import onnx_path

    return need("openvino").convert_model(str(onnx_path(context)))


def _name_(ports: Sequence[Any], wanted: Sequence[str]) -> None:
    """Give inputs or outputs their names: by the names that they have, else by position.

    Raises:
        BackendError: there are not as many, and they have other names.
    """
    if not wanted:
        return
    known = {name: port for port in ports for name in port.get_names()}
    if any(name not in known for name in wanted) and len(ports) == len(wanted):
        known = dict(zip(wanted, ports, strict=True))
    found = {name: known[name] for name in wanted if name in known}
    if len(found) < min(len(wanted), len(ports)):
        raise BackendError(f"the graph has {[list(port.get_names()) for port in ports]}, not {list(wanted)}")
    for name, port in found.items():
        tensor = port.get_tensor()
        # A tensor that is input and output, or output twice, keeps every name.
        tensor.set_names({name, *(other for other in tensor.get_names() if other in wanted)})


def fix_shapes_(graph: Any, specs: Sequence[TensorSpec]) -> None:
    """Fix the lengths that the signature fixes; free axes stay as the conversion has them."""
    openvino = need("openvino")
    shapes: dict[Any, Any] = {}
    for spec in specs:
        port = next((port for port in graph.inputs if spec.name in port.get_names()), None)
        if port is None:
            continue
        have = port.get_partial_shape()
        axes = list(have) if have.rank.is_static else [openvino.Dimension() for _ in spec.shape]
        shapes[port] = openvino.PartialShape(
            [
                openvino.Dimension(length) if isinstance(length, int) else axis
                for length, axis in zip(spec.shape, axes, strict=True)
            ]
        )
    graph.reshape(shapes)
