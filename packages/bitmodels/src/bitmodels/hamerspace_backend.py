"""Ternary conversion as a backend of hamerspace, which finds it through ``hamerspace.backends``."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import ClassVar

# Registers the operator that saved programs call.
import bitcore.kernels  # noqa: F401  # pyright: ignore[reportUnusedImport]
from bitcore.config import BitQuantConfig
from bitlayers.utils import deploy_layers, ternary_layers
from hamerspace import BaseBackend, BuildContext, Built, Candidate, ModelInfo, Runner
from hamerspace.backends import Manifest, Verdict
from hamerspace.backends.modules import own_module, save_module, takes_modules
from hamerspace.runtimes import RunOptions, open_runtime

from bitmodels.utils import convert_pytorch_model

__all__ = ["BitModelsBackend"]

_TERNARY = Candidate(
    backend="bitmodels",
    technique="ternary",
    forms=(".pt2",),
    goal="quantize",
    description="linear layers with weights of -1, 0 and 1; far from the original without training after it",
    bits=2,
)


class BitModelsBackend(BaseBackend):
    """Linear layers become ternary and compute on packed weights.

    Without training after the conversion most models lose much: the measured fidelity tells. A model that was
    trained ternary (`bitmodels.utils.finetune`) keeps what it learned.
    """

    name: ClassVar[str] = "bitmodels"
    title: ClassVar[str] = "bitmodels"
    modules: ClassVar[tuple[str, ...]] = ("torch", "bitmodels")
    distributions: ClassVar[tuple[str, ...]] = ("bitmodels", "bitlayers", "bitlab-core", "torch")

    def supports_model(self, model_info: ModelInfo) -> Verdict:
        """Modules alone: TorchScript and exported programs have no layers any more."""
        return takes_modules(model_info)

    def candidates(self, model_info: ModelInfo, *, hardware: str = "cpu") -> list[Candidate]:
        """Return the one recipe there is."""
        del hardware
        return [_TERNARY] if self.supports_model(model_info) else []

    def build(self, context: BuildContext) -> Built:
        """Convert, pack and export.

        Raises:
            ValueError: the model has no linear layer, or one that holds NaN.
            BackendError: torch.export cannot follow the model.
        """
        with warnings.catch_warnings():
            # That conversion without training loses accuracy is measured here, and told in the report.
            warnings.simplefilter("ignore")
            converted = convert_pytorch_model(own_module(context), BitQuantConfig())
        count = len(ternary_layers(converted))
        deploy_layers(converted)
        return save_module(context, converted, options={}, notes=(f"{count} linear layers are ternary",))

    def open(self, manifest: Manifest, folder: Path, options: RunOptions) -> Runner:
        """Open an artifact of this backend."""
        return open_runtime(manifest, folder, options)
