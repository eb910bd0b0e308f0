"""From a model to kernels of TVM that can be tuned, and from tuned kernels to a library."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hamerspace._imports import need
from hamerspace.backends import _pytorch_export
from hamerspace.backends._pytorch_signature import own_model, positional
from hamerspace.backends._tvm_records import Kernel
from hamerspace.backends.base import BuildContext
from hamerspace.exceptions import BackendError
from hamerspace.models.info import ModelInfo, TensorSpec

_SCHEDULED = "tirx.is_scheduled"


@dataclass(frozen=True, kw_only=True)
class Lowered:
    """A model as kernels that are not tuned yet."""

    module: Any
    inputs: tuple[TensorSpec, ...]
    """With shapes that are fixed."""
    order: tuple[str, ...]
    """In which the compiled function takes them."""
    target: dict[str, Any]
    kernels: tuple[Kernel, ...]


def target_of_host(threads: int) -> dict[str, Any]:
    """Describe this machine's CPU as TVM wants it described."""
    codegen = need("tvm.target.codegen")
    return {
        "kind": "llvm",
        "mtriple": str(codegen.llvm_get_system_triple()),
        "mcpu": str(codegen.llvm_get_system_cpu()),
        "num-cores": threads,
    }


def fixed_inputs(info: ModelInfo) -> tuple[TensorSpec, ...]:
    """Return the inputs with a length for every axis: that of `TensorSpec.example_shape` where it is free."""
    return tuple(replace(spec, shape=spec.example_shape(1)) for spec in info.inputs)


def lower(context: BuildContext) -> Lowered:
    """Import a model, choose layouts, fold constants and fuse operators.

    Raises:
        BackendError: TVM cannot import it, as where it does not know an operator.
    """
    tvm, relax = need("tvm"), need("tvm.relax")
    inputs = fixed_inputs(context.info)
    through_torch = context.info.framework == "pytorch" and context.info.form != "torchscript"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            module, order = _from_torch(context, inputs) if through_torch else _from_onnx(context, inputs)
    except (ImportError, BackendError):
        raise
    except Exception as error:
        raise BackendError(f"TVM cannot import this model: {_first_line(error)}") from error
    passes = relax.transform
    target = target_of_host(context.threads)
    steps = [
        passes.FoldBatchnormToConv2D(),
        passes.DecomposeOpsForInference(),
        passes.FoldConstant(),
        # Channels last: a convolution's innermost loop then runs over memory that lies side by side.
        passes.ConvertLayout({"relax.nn.conv2d": ["NHWC", "HWIO"]}),
        passes.CanonicalizeBindings(),
        passes.FoldConstant(),
        relax.get_pipeline("zero"),
        # What only gives a tensor another shape is no kernel.
        passes.RewriteDataflowReshape(),
        passes.DeadCodeElimination(),
    ]
    try:
        with tvm.target.Target(target), tvm.transform.PassContext(opt_level=3):
            lowered = tvm.transform.Sequential(steps)(module)
        kernels = _kernels(lowered, target)
    except Exception as error:
        raise BackendError(f"TVM cannot lower this model: {_first_line(error)}") from error
    return Lowered(module=lowered, inputs=inputs, order=order, target=target, kernels=kernels)


def _kernels(module: Any, target: Mapping[str, Any]) -> tuple[Kernel, ...]:
    tvm = need("tvm")
    extract = need("tvm.s_tir.meta_schedule").relax_integration.extract_tasks
    tasks = extract(module, tvm.target.Target(dict(target)))
    return tuple(
        Kernel(
            name=str(task.task_name),
            weight=int(task.weight),
            module=str(tvm.ir.save_json(task.dispatched[0])),
        )
        for task in sorted(tasks, key=lambda task: str(task.task_name))
    )


def compile_tuned(lowered: Lowered, database: Any) -> Any:
    """Compile with the best schedule of each kernel.

    Raises:
        BackendError: a kernel has none. TVM would compile it as it stands and say so in its log alone; such
            kernels are 16 to 25 times slower than torch.
    """
    tvm, relax = need("tvm"), need("tvm.relax")
    lowering = need("tvm.relax.backend.cpu_generic.pipeline")
    target = tvm.target.Target(lowered.target)
    with target, database, tvm.transform.PassContext(opt_level=3):
        module = relax.transform.MetaScheduleApplyDatabase()(lowered.module)
        untuned = untuned_kernels(module)
        if untuned:
            raise BackendError(
                f"{len(untuned)} of {len(lowered.kernels)} kernels have no tuning record "
                f"({', '.join(untuned[:5])}), and would run many times slower than the original; "
                "tune again with more trials or time"
            )
        steps = [*lowering.dataflow_lower_passes(target), *lowering.finalize_passes(target)]
        return tvm.compile(module, target, relax_pipeline=tvm.transform.Sequential(steps))


def untuned_kernels(module: Any) -> list[str]:
    """Names of kernels that no schedule was applied to."""
    prim_func = need("tvm").tirx.PrimFunc
    return sorted(
        str(name.name_hint)
        for name, function in module.functions.items()
        if isinstance(function, prim_func) and not function.attrs.get(_SCHEDULED, False)
    )


def _from_torch(context: BuildContext, inputs: Sequence[TensorSpec]) -> tuple[Any, tuple[str, ...]]:
    fixed = replace(context.info, inputs=tuple(inputs))
    program = _pytorch_export.export(positional(own_model(context.source), fixed), fixed).program
    module = need("tvm.relax.frontend.torch").from_exported_program(program)
    order = tuple(spec.name for spec in inputs)
    if len(module["main"].params) != len(order):
        raise BackendError(f"TVM takes {len(module['main'].params)} inputs, and the model has {len(order)}")
    return module, order


def _from_onnx(context: BuildContext, inputs: Sequence[TensorSpec]) -> tuple[Any, tuple[str, ...]]:
    from hamerspace.models.conversion import onnx_path

    path = onnx_path(context)
    model = need("onnx").load(str(path))
    shapes = {spec.name: list(spec.shape) for spec in inputs}
    module = need("tvm.relax.frontend.onnx").from_onnx(model, shape_dict=shapes, dtype_dict=None)
    stored = {one.name for one in model.graph.initializer}
    order = tuple(str(one.name) for one in model.graph.input if one.name not in stored)
    if set(order) != set(shapes) or len(module["main"].params) != len(order):
        raise BackendError(f"the ONNX file takes {list(order)}, and the model takes {list(shapes)}")
    return module, order


def _first_line(error: Exception) -> str:
    """Return what an error of TVM says, without its native stack."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    said = [line for line in lines if not re.match(r"(File|Stack trace|\d+:|\[\d\d:)", line)]
    return f"{type(error).__name__}: {(said or lines or ['no message'])[-1][:300]}"


def export(executable: Any, path: Path) -> None:
    """Link a compiled model into a library.

    Raises:
        BackendError: the linker fails.
    """
    try:
        executable.export_library(str(path))
    except Exception as error:
        raise BackendError(f"the library cannot be linked: {_first_line(error)}") from error
