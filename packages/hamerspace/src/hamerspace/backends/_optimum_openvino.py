"""optimum-intel: its exporter, and its quantiser of OpenVINO's graphs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import numpy as np

from hamerspace._imports import need
from hamerspace.backends._openvino_convert import fix_shapes_, inputs_of
from hamerspace.backends._openvino_quiet import load_nncf
from hamerspace.backends._optimum_export import export_config, offline
from hamerspace.backends.base import BuildContext, Built
from hamerspace.exceptions import UnsupportedError
from hamerspace.models.info import Array, Feeds
from hamerspace.runtimes.openvino import properties

_MAIN: Final = "openvino_model.xml"


def build(context: BuildContext) -> Built:
    """Export, quantise as the candidate says, and save what ``OVModelFor...`` opens.

    Raises:
        UnsupportedError: Optimum cannot export the model, or calibration data are missing.
    """
    candidate, info = context.candidate, context.info
    if candidate.needs_calibration and not context.calibration:
        raise UnsupportedError(f"{candidate.name} needs calibration data; give validation_data")
    load_nncf()
    exported = context.once("optimum-openvino", lambda folder: _export(context, folder))
    precision = str(candidate.options.get("precision", "f32"))
    with offline():
        intel = need("optimum.intel")
        model = intel.OVModelForCustomTasks.from_pretrained(
            exported,
            local_files_only=True,
            trust_remote_code=False,
            compile=False,
            device="CPU",
            ov_config=properties(precision, "LATENCY", context.threads),
        )
        fix_shapes_(model.model, info.inputs)
        quantization = _quantization(candidate.options)
        if quantization is not None:
            data = _calibration(context) if candidate.needs_calibration else None
            intel.OVQuantizer.from_pretrained(model).quantize(
                calibration_dataset=data, ov_config=intel.OVConfig(quantization_config=quantization)
            )
        model.compile()
        model.save_pretrained(context.folder)

    def run(feeds: Feeds) -> Mapping[str, Array]:
        found = model(**{name: feeds[name] for name in model.input_names})
        return {spec.name: np.asarray(found[spec.name]) for spec in info.outputs} or dict(found)

    return Built(
        runtime="openvino",
        main=_MAIN,
        options={"precision": precision, "hint": "LATENCY"},
        alone=(_MAIN, "openvino_model.bin"),
        run=run,
        inputs=inputs_of(model.model, info.inputs),
    )


def _export(context: BuildContext, folder: Any) -> None:
    with offline():
        model = context.source.load()
        task, config = export_config(model, context.info, "openvino")
        need("optimum.exporters.openvino").export_from_model(
            model,
            folder,
            task=task,
            stateful=False,
            custom_export_configs={"model": config},
            ov_config=need("optimum.intel").OVConfig(dtype="fp32"),
        )


def _quantization(options: Mapping[str, Any]) -> Any:
    intel = need("optimum.intel")
    bits = options.get("weight_bits")
    if options.get("activations"):
        return intel.OVQuantizationConfig(bits=8)
    if bits is None:
        return None
    if bits == 8:
        return intel.OVWeightQuantizationConfig(bits=8)
    # Optimum's own default leaves a part of the matrices at 8 bits, and fails where rows do not divide into
    # groups of 128: there the largest smaller group that fits is taken.
    return intel.OVWeightQuantizationConfig(bits=4, sym=False, ratio=1.0, group_size_fallback="adjust")


def _calibration(context: BuildContext) -> Any:
    return load_nncf().Dataset([dict(batch) for batch in context.calibration or ()])
