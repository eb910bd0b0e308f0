"""What both halves of Optimum share: exports with exactly the inputs and outputs that a model is known by."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

from hamerspace._imports import need
from hamerspace.backends._openvino_quiet import quiet
from hamerspace.exceptions import UnsupportedError
from hamerspace.models.info import ModelInfo

Exporter = Literal["openvino", "onnx"]


def export_config(model: Any, info: ModelInfo, exporter: Exporter) -> tuple[str, Any]:
    """Return the task of a model of transformers, told by its class, and Optimum's export configuration.

    Optimum's own signatures leave out what their task has no need of, as the pooled output of a BERT, and ask
    for inputs that a caller may leave out. So the configuration is narrowed to the model's known signature.

    Raises:
        UnsupportedError: Optimum cannot export this architecture, or not these inputs.
    """
    tasks = need("optimum.exporters.tasks").TasksManager
    # Importing it registers what can be exported.
    need(f"optimum.exporters.{exporter}.model_configs")
    try:
        task = tasks.infer_task_from_model(model, library_name="transformers")
        make = tasks.get_exporter_config_constructor(
            exporter=exporter, model=model, task=task, library_name="transformers"
        )
        config = make(model.config)
    except (KeyError, ValueError, NotImplementedError) as error:
        raise UnsupportedError(
            f"Optimum cannot export {type(model).__name__}: {next(iter(str(error).splitlines()), '')}"
        ) from error
    inputs = [spec.name for spec in info.inputs]
    unknown = [name for name in inputs if name not in config.inputs]
    if unknown:
        raise UnsupportedError(
            f"Optimum exports {type(model).__name__} with the inputs {list(config.inputs)}, without {unknown}"
        )
    _narrow_(config, inputs, [spec.name for spec in info.outputs])
    return task, config


def _narrow_(config: Any, inputs: Sequence[str], outputs: Sequence[str]) -> None:
    kind: Any = type(config)  # pyright: ignore[reportUnknownVariableType]

    def narrow_inputs(self: Any) -> dict[str, Any]:
        offered = kind.inputs.fget(self)
        return {name: offered[name] for name in inputs}

    def narrow_outputs(self: Any) -> dict[str, Any]:
        offered = kind.outputs.fget(self)
        return {name: offered.get(name, {0: "batch_size"}) for name in outputs} if outputs else offered

    # Both are properties, and models are exported by what the class says.
    members = {"inputs": property(narrow_inputs), "outputs": property(narrow_outputs)}
    config.__class__ = type(kind.__name__, (kind,), members)


@contextmanager
def offline() -> Generator[None]:
    """Keep Optimum and what it calls from printing, from warning, and from asking the network."""
    constants = need("huggingface_hub.constants")
    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = True
    try:
        with quiet():
            yield
    finally:
        constants.HF_HUB_OFFLINE = before
