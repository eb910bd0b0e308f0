"""The result of an optimisation: the model, how it was found, and how it can be saved."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path

from hamerspace.artifact import Manifest
from hamerspace.core.config import OptimizationConfig
from hamerspace.core.report import CompressionReport
from hamerspace.runtimes.base import RunOptions
from hamerspace.runtimes.callable import LoadedModel
from hamerspace.saving import save_artifact


class OptimizationResult:
    """An optimised model that was proven: saved, reloaded in a fresh process, compared and measured there.

    Its files lie in a temporary folder that goes with this object; `save_model` keeps them.
    """

    def __init__(
        self,
        folder: Path,
        manifest: Manifest,
        report: CompressionReport,
        config: OptimizationConfig,
        owner: object = None,
    ) -> None:
        self.folder = folder
        self.manifest = manifest
        self.report = report
        self.config = config
        self._owner = owner

    def __repr__(self) -> str:
        report = self.report
        return (
            f"OptimizationResult({report.backend_used}/{report.technique_used}, "
            f"{report.optimized_metrics.size_mb:.2f} MB, {report.latency_improvement_ratio:.2f}x, "
            f"constraints_satisfied={report.constraints_satisfied})"
        )

    @cached_property
    def optimized_model(self) -> LoadedModel:
        """The model as one callable; it takes and gives tensors of torch, TensorFlow or numpy."""
        from hamerspace.loading import find

        options = RunOptions(device=self.report.optimized_metrics.hardware, allow_native=True)
        return find(self.folder).as_model(options, owner=self._owner)

    @property
    def forms(self) -> tuple[str, ...]:
        """Endings that `save_model` takes; a name without an ending is a folder."""
        return self.manifest.endings

    def save_model(self, path: str | Path) -> Path:
        """Save the model; the ending chooses the form, and `hamerspace.load` opens each.

        ``.pt`` and a folder are always possible, ``.pt2``, ``.onnx``, ``.xml``, ``.tflite`` and ``.so`` where
        the runtime has that form (`forms` lists them). Where the model is no TorchScript, ``.pt`` is a zip of
        the folder that only `hamerspace.load` opens.

        Raises:
            UnsupportedError: the model cannot have this form; the message lists those that it can have.
            FileExistsError: it is a folder with other things in it.
        """
        return save_artifact(self.folder, self.manifest, Path(path))

    def save_config(self, path: str | Path) -> Path:
        """Save what the result was made with; `Optimizer.from_config` repeats it."""
        return self.config.save(path)

    def save_report(self, path: str | Path) -> Path:
        """Save the report as ``.txt``, ``.md``, ``.json`` or ``.html``.

        Raises:
            UnsupportedError: another ending.
        """
        return self.report.save(path)
