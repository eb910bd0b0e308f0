"""The backend of PyTorch's own tools: torch.export, AOTInductor, TorchScript, torchao and ``torch.ao``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Final

from hamerspace._arrays import flatten_outputs
from hamerspace._imports import need
from hamerspace.artifact import Manifest
from hamerspace.backends._pytorch_compile import compile_package
from hamerspace.backends._pytorch_export import (
    Converted,
    export,
    freeze,
    layered,
    save_exported,
    save_torchscript,
    trace,
)
from hamerspace.backends._pytorch_prune import prune_in_place
from hamerspace.backends._pytorch_quantize import (
    by_pt2e,
    dynamic_in_place,
    fuse_for_x86,
    has_torch_ao,
    static_by_fx,
    weights_in_place,
)
from hamerspace.backends._pytorch_signature import (
    calibration_tensors,
    own_model,
    positional,
    tensors_of,
    with_lengths,
)
from hamerspace.backends.base import BaseBackend, BuildContext, Built, Candidate, Verdict
from hamerspace.exceptions import BackendError, BackendUnavailableError, UnsupportedError
from hamerspace.models.info import DEFAULT_LENGTH, ModelInfo
from hamerspace.runtimes.base import Runner, RunOptions
from hamerspace.runtimes.torch import PositionalRunner, open_compiled, open_runner

EXPORTED: Final = "model.pt2"
SCRIPT: Final = "model.pt"

_MOST_DRIFT: Final = 4.0
"""How much compiled int8 may add to the quantised model, as a share of the energy that quantising adds.

Fused kernels round once where the graph of quantise and dequantise nodes rounds twice, a value that falls
to the other side changes the next layer's, and so on: in the end it is another quantisation of the same
model. Two such that are independent of each other differ by twice the energy.
"""

_ALL: Final = ("module", "transformers", "exported", "torchscript")
_GRAPHS: Final = ("module", "transformers", "exported")
_MODULES: Final = ("module", "transformers")

_TECHNIQUES: Final[tuple[tuple[Candidate, tuple[str, ...], tuple[str, ...]], ...]] = (
    (
        Candidate(
            backend="pytorch",
            technique="int8-static-compiled",
            forms=(".pt2",),
            goal="quantize",
            description="int8 weights and activations, calibrated by PT2E and compiled by AOTInductor",
            needs_calibration=True,
            bits=8,
            expected_speed=4.0,
        ),
        _GRAPHS,
        ("cpu",),
    ),
    (
        Candidate(
            backend="pytorch",
            technique="int8-static",
            forms=(".pt",),
            goal="quantize",
            description="int8 weights and activations, calibrated by FX of torch.ao, as TorchScript",
            needs_calibration=True,
            bits=8,
            expected_speed=3.5,
        ),
        _MODULES,
        ("cpu",),
    ),
    (
        Candidate(
            backend="pytorch",
            technique="int8-dynamic",
            forms=(".pt",),
            goal="quantize",
            description="int8 weights, and activations quantised as they come; embeddings in int8 too",
            bits=8,
            expected_speed=3.0,
        ),
        _MODULES,
        ("cpu",),
    ),
    (
        Candidate(
            backend="pytorch",
            technique="int8-dynamic-compiled",
            forms=(".pt2",),
            goal="quantize",
            description="int8 linear layers by PT2E, activations as they come, compiled by AOTInductor",
            bits=8,
            expected_speed=3.0,
        ),
        _GRAPHS,
        ("cpu",),
    ),
    (
        Candidate(
            backend="pytorch",
            technique="int8-weight",
            forms=(".pt2",),
            goal="quantize",
            description="int8 weights of linear layers and embeddings by torchao; activations stay float",
            bits=8,
        ),
        _MODULES,
        ("cpu", "cuda"),
    ),
    (
        Candidate(
            backend="pytorch",
            technique="int4-weight",
            forms=(".pt2",),
            goal="quantize",
            description="int4 weights of linear layers in groups of 32, int8 embeddings, by torchao",
            bits=4,
        ),
        _MODULES,
        ("cpu",),
    ),
    (
        Candidate(
            backend="pytorch",
            technique="compiled",
            forms=(".pt2",),
            goal="graph",
            description="compiled ahead of time by AOTInductor, float32",
            expected_speed=2.2,
        ),
        _GRAPHS,
        ("cpu", "cuda"),
    ),
    (
        Candidate(
            backend="pytorch",
            technique="torchscript",
            forms=(".pt",),
            goal="graph",
            description="TorchScript, frozen: weights become constants and batch norms are folded",
            expected_speed=1.2,
        ),
        _ALL,
        ("cpu", "cuda"),
    ),
    (
        Candidate(
            backend="pytorch",
            technique="export",
            forms=(".pt2",),
            goal="graph",
            description="a torch.export archive, which runs without the model's own code, float32",
        ),
        _GRAPHS,
        ("cpu", "cuda"),
    ),
    (
        Candidate(
            backend="pytorch",
            technique="l1-50",
            forms=(".pt2",),
            goal="prune",
            description="the smaller half of each layer's weights becomes zero; neither smaller nor faster",
            options={"amount": 0.5},
        ),
        _MODULES,
        ("cpu", "cuda"),
    ),
)
"""Each technique with the forms of model and the devices that it goes for."""


class PyTorchBackend(BaseBackend):
    """Models of torch in torch's own runtimes.

    Every artifact takes its inputs by position, in the source's order, and gives a tuple of tensors.
    """

    name: ClassVar[str] = "pytorch"
    title: ClassVar[str] = "PyTorch"
    modules: ClassVar[tuple[str, ...]] = ("torch", "torchao")
    distributions: ClassVar[tuple[str, ...]] = ("torch", "torchao")
    extra: ClassVar[str] = "pytorch"

    def supports_model(self, model_info: ModelInfo) -> Verdict:
        """Models of torch alone."""
        if model_info.framework != "pytorch":
            return Verdict(False, f"it takes models of torch, and this one is of {model_info.framework}")
        if model_info.form not in _ALL:
            return Verdict(False, f"it does not know models of the form {model_info.form!r}")
        return Verdict(True, "a model of torch")

    def candidates(self, model_info: ModelInfo, *, hardware: str = "cpu") -> list[Candidate]:
        """Recipes for the model's form.

        TorchScript has lost its layers and can only be frozen; an exported program is compiled, and quantised
        by its graph alone.
        """
        if not self.supports_model(model_info):
            return []
        device = "cuda" if hardware in ("cuda", "gpu") else "cpu"
        return [
            candidate
            for candidate, forms, devices in _TECHNIQUES
            if model_info.form in forms and device in devices
        ]

    def build(self, context: BuildContext) -> Built:
        """Convert, quantise or prune a copy of the model.

        Raises:
            UnsupportedError: the technique is not for this model.
            BackendError: torch cannot follow the model.
        """
        make = _RECIPES.get(context.candidate.technique)
        if make is None:
            raise UnsupportedError(
                f"backend pytorch has no {context.candidate.technique!r}; it has {', '.join(_RECIPES)}"
            )
        torch = need("torch")
        torch.set_num_threads(context.threads)
        torch.manual_seed(context.seed)
        return make(context)

    def open(self, manifest: Manifest, folder: Path, options: RunOptions) -> Runner:
        """Open an artifact of this backend."""
        return open_runner(manifest, folder, options)


def _as_exported(context: BuildContext, module: Any, *notes: str, operators: tuple[str, ...] = ()) -> Built:
    made = export(module, context.info, context.device)
    save_exported(made.program, context.folder / EXPORTED)
    return Built(
        runtime="torch_export",
        main=EXPORTED,
        options={"operators": list(operators)},
        alone=(EXPORTED,),
        run=_runner(module, made, context).run,
        inputs=made.inputs,
        notes=(*notes, *made.notes),
    )


def _as_torchscript(context: BuildContext, module: Any, made: Converted, *notes: str) -> Built:
    save_torchscript(made.program, context.folder / SCRIPT)
    return Built(
        runtime="torchscript",
        main=SCRIPT,
        alone=(SCRIPT,),
        run=_runner(module, made, context).run,
        inputs=made.inputs,
        notes=(*notes, *made.notes),
    )


def _as_compiled(
    context: BuildContext, module: Any, made: Converted, *notes: str, autotune: bool = True
) -> Built:
    """Compile a program; ``module`` is what it has to agree with."""
    work, path = (context.cache or context.shared) / "inductor", context.folder / EXPORTED
    compile_package(made.program, path, threads=context.threads, work=work, autotune=autotune)
    return Built(
        runtime="aot_inductor",
        main=EXPORTED,
        options={"device": context.device},
        alone=(EXPORTED,),
        run=_runner(module, made, context).run,
        inputs=made.inputs,
        notes=(*notes, *made.notes, "native code for this kind of processor, which runs when it is opened"),
    )


def _runner(module: Any, made: Converted, context: BuildContext) -> PositionalRunner:
    return PositionalRunner(module, made.inputs, context.info.outputs, context.device)


def _wrapped(context: BuildContext) -> Any:
    return positional(own_model(context.source, context.device), context.info)


def _exported(context: BuildContext) -> Built:
    return _as_exported(context, _wrapped(context))


def _compiled(context: BuildContext) -> Built:
    module = _wrapped(context)
    return _as_compiled(context, module, export(module, context.info, context.device))


def _torchscript(context: BuildContext) -> Built:
    module = _wrapped(context)
    if context.info.form == "torchscript":
        # What was frozen before has no mode of its own any more.
        frozen = freeze(module.model) if hasattr(module.model, "training") else module.model
        made = Converted(program=frozen, inputs=context.info.inputs, notes=())
    else:
        try:
            traced = trace(module, context.info)
        except BackendError:
            module, info = layered(module, context.info)
            traced = trace(module, info)
        made = Converted(program=freeze(traced.program), inputs=traced.inputs, notes=traced.notes)
    return _as_torchscript(context, module, made)


def _int8_dynamic(context: BuildContext) -> Built:
    if not has_torch_ao():
        raise BackendUnavailableError(
            "this torch has no torch.ao.quantization; int8-dynamic-compiled does it"
        )
    model = own_model(context.source)
    note = dynamic_in_place(model)
    module = positional(model, context.info)
    try:
        made = trace(module, context.info)
    except BackendError:
        module, info = layered(_wrapped(context), context.info)
        note = dynamic_in_place(module)
        made = trace(module, info)
    return _as_torchscript(context, module, made, note)


def _int8_static(context: BuildContext) -> Built:
    if not has_torch_ao():
        raise BackendUnavailableError("this torch has no torch.ao.quantization; int8-static-compiled does it")
    batches = calibration_tensors(context, context.info.inputs)
    example = batches[0] if batches else tensors_of(context.example(), context.info)
    info = context.info
    try:
        module = positional(static_by_fx(own_model(context.source), example, batches), info)
    except UnsupportedError:
        plain, info = layered(_wrapped(context), info)
        batches = calibration_tensors(context, info.inputs)
        module = static_by_fx(plain, batches[0] if batches else tensors_of(info.draw(1), info), batches)
    return _as_torchscript(context, module, trace(module, info))


def _int8_compiled(context: BuildContext, *, dynamic: bool) -> Built:
    # The operators of oneDNN hold for one shape.
    fixed = with_lengths(context.info, 1, DEFAULT_LENGTH)
    example = tensors_of(fixed.draw(1, context.seed), fixed)
    batches = calibration_tensors(context, fixed.inputs) or [example]
    module = _wrapped(context)
    quantised = by_pt2e(export(module, fixed).program, batches, dynamic=dynamic)
    made = export(fuse_for_x86(quantised, example), fixed)
    note = "compiled for the shapes " + ", ".join(f"{one.name} {list(one.shape)}" for one in fixed.inputs)
    built = _as_compiled(context, quantised, made, note, autotune=False)
    compiled = open_compiled(context.folder / EXPORTED, context.device)
    _check_drift(module, quantised, compiled, batches[:4])
    return replace(built, run=_runner(compiled, made, context).run)


def _check_drift(module: Any, quantised: Any, compiled: Any, batches: Sequence[tuple[Any, ...]]) -> None:
    """Raise unless compiled int8 is as near to the quantised model as another quantisation would be."""
    torch = need("torch")
    added = drift = total = 0.0
    with torch.inference_mode():
        for batch in batches:
            outputs = (flatten_outputs(run(*batch))[1].values() for run in (module, quantised, compiled))
            for wanted, rounded, given in zip(*outputs, strict=True):
                a, b, c = wanted.double(), rounded.double(), given.double()
                total += float((a * a).sum())
                added += float(((b - a) ** 2).sum())
                drift += float(((c - b) ** 2).sum())
    if not drift <= _MOST_DRIFT * added + 1e-6 * total:
        energy = max(total, 1e-30)
        raise BackendError(
            f"compiling changed the int8 model: its outputs moved by {drift / energy:.2g} of their energy, "
            f"and by {added / energy:.2g} when it was quantised"
        )


def _weights(context: BuildContext, bits: int) -> Built:
    model = own_model(context.source, context.device)
    note = weights_in_place(model, bits)
    return _as_exported(context, positional(model, context.info), note, operators=("torchao",))


def _pruned(context: BuildContext) -> Built:
    model = own_model(context.source, context.device)
    note = prune_in_place(model, context.candidate.options["amount"])
    return _as_exported(context, positional(model, context.info), note)


_RECIPES: Final[dict[str, Callable[[BuildContext], Built]]] = {
    "int8-static-compiled": lambda context: _int8_compiled(context, dynamic=False),
    "int8-static": _int8_static,
    "int8-dynamic": _int8_dynamic,
    "int8-dynamic-compiled": lambda context: _int8_compiled(context, dynamic=True),
    "int8-weight": lambda context: _weights(context, 8),
    "int4-weight": lambda context: _weights(context, 4),
    "compiled": _compiled,
    "torchscript": _torchscript,
    "export": _exported,
    "l1-50": _pruned,
}
