"""Which module opens which runtime; each has ``open_runner(manifest, folder, options)``."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Final

from hamerspace.artifact import Manifest
from hamerspace.exceptions import ArtifactError
from hamerspace.runtimes.base import Runner, RunOptions

RUNTIMES: Final = {
    "torch_export": "hamerspace.runtimes.torch",
    "torchscript": "hamerspace.runtimes.torch",
    "aot_inductor": "hamerspace.runtimes.torch",
    "onnxruntime": "hamerspace.runtimes.onnxruntime",
    "openvino": "hamerspace.runtimes.openvino",
    "tflite": "hamerspace.runtimes.tensorflow",
    "keras": "hamerspace.runtimes.tensorflow",
    "saved_model": "hamerspace.runtimes.tensorflow",
    "tvm": "hamerspace.runtimes.tvm",
}


def open_runtime(manifest: Manifest, folder: Path, options: RunOptions) -> Runner:
    """Open an artifact's main file with its runtime.

    Raises:
        ArtifactError: the manifest names a runtime that is not known.
    """
    module = RUNTIMES.get(manifest.runtime)
    if module is None:
        raise ArtifactError(f"runtime {manifest.runtime!r} is not known; there are {', '.join(RUNTIMES)}")
    return importlib.import_module(module).open_runner(manifest, folder, options)
