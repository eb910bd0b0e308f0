"""optimum-onnx: its exporter, ONNX Runtime's transformer optimiser and its dynamic quantisation."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np

from hamerspace._imports import need
from hamerspace.backends._optimum_export import export_config, offline
from hamerspace.backends.base import BuildContext, Built
from hamerspace.models.info import Array, Feeds

_MAIN: Final = "model.onnx"


def build(context: BuildContext) -> Built:
    """Export, optimise or quantise as the candidate says, and save what ``ORTModelFor...`` opens.

    Raises:
        UnsupportedError: Optimum cannot export the model.
    """
    info = context.info
    exported = context.once("optimum-onnx", lambda folder: _export(context, folder))
    with offline(), tempfile.TemporaryDirectory(prefix="hamerspace-") as room:
        runtime = need("optimum.onnxruntime")
        made = _STEPS[context.candidate.technique](runtime, exported, Path(room))
        model = _open(runtime, made, context.threads)
        # Saving copies every file of the model, under the name that opens without being told.
        model.save_pretrained(context.folder)
        saved = context.folder / model.path.name
        if saved.name != _MAIN:
            saved.rename(context.folder / _MAIN)

    def run(feeds: Feeds) -> Mapping[str, Array]:
        found = model(**{name: feeds[name] for name in model.input_names})
        return {spec.name: np.asarray(found[spec.name]) for spec in info.outputs} or dict(found)

    return Built(runtime="onnxruntime", main=_MAIN, alone=(_MAIN,), run=run)


def _open(runtime: Any, folder: Path, threads: int) -> Any:
    options = need("onnxruntime").SessionOptions()
    options.intra_op_num_threads = threads
    return runtime.ORTModelForCustomTasks.from_pretrained(
        folder,
        file_name=next(path.name for path in folder.iterdir() if path.suffix == ".onnx"),
        session_options=options,
        local_files_only=True,
        trust_remote_code=False,
    )


def _export(context: BuildContext, folder: Path) -> None:
    with offline():
        model = context.source.load()
        task, config = export_config(model, context.info, "onnx")
        need("optimum.exporters.onnx").onnx_export_from_model(
            model, folder, task=task, custom_onnx_configs={"model": config}, do_validation=False
        )


def _keep(_: Any, exported: Path, __: Path) -> Path:
    return exported


def _optimize(runtime: Any, exported: Path, room: Path) -> Path:
    config = runtime.AutoOptimizationConfig.O2()
    runtime.ORTOptimizer.from_pretrained(exported, file_names=[_MAIN]).optimize(
        save_dir=room, optimization_config=config
    )
    return room


def _quantize(runtime: Any, exported: Path, room: Path) -> Path:
    config = runtime.AutoQuantizationConfig.avx512_vnni(is_static=False, per_channel=True)
    runtime.ORTQuantizer.from_pretrained(exported, file_name=_MAIN).quantize(
        save_dir=room, quantization_config=config
    )
    return room


_STEPS: Final = {"ort-int8-dynamic": _quantize, "ort-graph": _optimize, "ort-fp32": _keep}
