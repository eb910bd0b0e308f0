"""For backends that change a module of torch: a copy of it to change, and how the changed one is saved."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from hamerspace.backends._pytorch_export import export, save_exported
from hamerspace.backends._pytorch_signature import own_model, positional
from hamerspace.backends.base import BuildContext, Built, Verdict
from hamerspace.models.info import ModelInfo
from hamerspace.runtimes.torch import PositionalRunner

__all__ = ["own_module", "save_module", "takes_modules"]

_MAIN: Final = "model.pt2"


def takes_modules(model_info: ModelInfo) -> Verdict:
    """Say whether a model is a module, whose layers can be replaced."""
    if model_info.framework != "pytorch":
        return Verdict(False, f"it takes models of torch, and this one is of {model_info.framework}")
    if model_info.form not in ("module", "transformers"):
        return Verdict(False, f"it replaces layers, and {model_info.form} models have none any more")
    return Verdict(True, "a module of torch")


def own_module(context: BuildContext) -> Any:
    """Return a copy of the context's module that may be changed, in evaluation mode and without gradients."""
    return own_model(context.source, context.device)


def save_module(
    context: BuildContext, module: Any, *, options: Mapping[str, Any], notes: tuple[str, ...] = ()
) -> Built:
    """Export a changed module into the context's folder; the runtime is ``torch_export``.

    Args:
        context: of the build.
        module: takes and gives what the source's module does.
        options: for the runtime.
        notes: for the user.

    Raises:
        BackendError: torch.export cannot follow the model.
    """
    wrapped = positional(module, context.info)
    made = export(wrapped, context.info, context.device)
    save_exported(made.program, context.folder / _MAIN)
    return Built(
        runtime="torch_export",
        main=_MAIN,
        options={"device": context.device, **options},
        alone=(_MAIN,),
        run=PositionalRunner(wrapped, made.inputs, context.info.outputs, context.device).run,
        inputs=made.inputs,
        notes=(*notes, *made.notes),
    )
