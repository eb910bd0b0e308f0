"""Rounded weights of transformers models as a backend of hamerspace, which finds it by an entry point."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from hamerspace import BaseBackend, BuildContext, Built, Candidate, ModelInfo, Runner, TensorSpec
from hamerspace.backends import Manifest, Verdict
from hamerspace.models import Array, Feeds
from hamerspace.runtimes import RunOptions

from auto_round import AutoRound
from auto_round.exceptions import CheckpointError
from auto_round.export._auto_round import read_layer
from auto_round.export._files_beside import read_config
from auto_round.low_cpu_mem._checkpoint import CheckpointReader
from auto_round.low_cpu_mem._empty import import_transformers

__all__ = ["AutoRoundBackend"]

_CANDIDATES = (
    Candidate(
        backend="auto_round",
        technique="int4-weight",
        goal="quantize",
        description="weights of the blocks in 4 bits, groups of 128, rounded to nearest",
        bits=4,
        options={"bits": 4, "group_size": 128, "quality": "rtn"},
    ),
    Candidate(
        backend="auto_round",
        technique="int4-signround",
        goal="quantize",
        description="weights of the blocks in 4 bits, groups of 128, rounding trained by SignRound",
        needs_calibration=True,
        bits=4,
        options={"bits": 4, "group_size": 128, "quality": "signround", "iters": 200},
        time_limit_s=3600.0,
    ),
)


class AutoRoundBackend(BaseBackend):
    """Models of transformers, from their folder, with weights of few bits in the format ``auto_round``.

    What is saved is small; when it is opened here, weights become float32 again, so that memory and speed are
    those of the original. Loaders with kernels for the format compute on the packed weights.
    """

    name: ClassVar[str] = "auto_round"
    title: ClassVar[str] = "auto-round-core"
    modules: ClassVar[tuple[str, ...]] = ("torch", "transformers")
    distributions: ClassVar[tuple[str, ...]] = ("auto-round-core", "torch", "transformers")

    def supports_model(self, model_info: ModelInfo) -> Verdict:
        """Folders of transformers with token ids as input."""
        if model_info.form != "transformers" or model_info.path is None:
            return Verdict(False, "it takes models of transformers by their folder")
        if "input_ids" not in {spec.name for spec in model_info.inputs}:
            return Verdict(False, "it takes models of text, whose input is input_ids")
        return Verdict(True, "a folder of transformers")

    def candidates(self, model_info: ModelInfo, *, hardware: str = "cpu") -> list[Candidate]:
        """Return rounding to nearest, and SignRound where there is calibration data."""
        del hardware
        return list(_CANDIDATES) if self.supports_model(model_info) else []

    def build(self, context: BuildContext) -> Built:
        """Quantise from the model's folder into the context's.

        Raises:
            ValueError: the model has no repeated blocks, or a group size divides none of its layers.
        """
        torch.set_num_threads(context.threads)
        quantization: dict[str, Any] = {**context.candidate.options, "seed": context.seed}
        calibration = None
        if context.calibration is not None:
            ids = [torch.from_numpy(batch["input_ids"]) for batch in context.calibration]  # pyright: ignore[reportUnknownMemberType]
            calibration = torch.cat(ids)
            quantization |= {"nsamples": len(calibration), "seqlen": calibration.shape[1]}
        made = context.folder / "made"
        config = {
            "device": context.device,
            "quantization": quantization,
            "export": {"export_format": "auto_round"},
        }
        with AutoRound(
            str(context.info.path), config=config, calibration=calibration, progress=False
        ) as rounder:
            rounder.quantize()
            rounder.save(made)
        for path in made.iterdir():
            # The report is of the run, and no part of the model.
            if not path.name.startswith("quantization_report"):
                shutil.move(path, context.folder / path.name)
        shutil.rmtree(made)
        return Built(runtime="auto_round", main=".", notes=("weights become floats when it is opened here",))

    def open(self, manifest: Manifest, folder: Path, options: RunOptions) -> Runner:
        """Open an artifact of this backend.

        Raises:
            CheckpointError: the export is damaged.
        """
        if options.threads is not None:
            torch.set_num_threads(options.threads)
        return _Runner(open_export(folder).to(options.device), manifest, options.device)


def open_export(folder: Path) -> torch.nn.Module:
    """Return the model of a folder in the format ``auto_round``, with float32 weights.

    Names in the checkpoint have to be those of the model's own tensors, as `save_pretrained` writes them;
    experts, whose layers the format tells apart, are none.

    Raises:
        CheckpointError: it is none, or damaged, or of a model that transformers does not know.
    """
    transformers = import_transformers()
    model = _drawn_model(transformers, folder)
    with CheckpointReader(folder) as reader:
        names = list(reader.names)
        packed = {name.removesuffix(".qweight") for name in names if name.endswith(".qweight")}
        parts = {f"{name}.{end}" for name in packed for end in ("qweight", "qzeros", "scales")}
        state = {name: reader.read(name).float() for name in names if name not in parts}
    modules: dict[str, torch.nn.Module] = dict(model.named_modules())
    for name in packed:
        weight = read_layer(folder, name).dequantize()
        is_transposed = isinstance(modules.get(name), transformers.pytorch_utils.Conv1D)
        state[f"{name}.weight"] = weight.T if is_transposed else weight
    try:
        found = model.load_state_dict(state, strict=False)
    except RuntimeError as error:
        raise CheckpointError(f"{folder} does not fit its configuration: {error}") from error
    model.tie_weights()
    missing = set(found.missing_keys) - set(model._tied_weights_keys or ())
    if missing or found.unexpected_keys:
        wrong = [*sorted(missing), *found.unexpected_keys]
        raise CheckpointError(f"{folder} does not fit its configuration: {', '.join(wrong[:5])}.")
    return model.eval()


def _drawn_model(transformers: Any, folder: Path) -> Any:
    """Build what a folder's configuration describes, in float32 and with weights that are drawn."""
    given = read_config(folder)
    given.pop("quantization_config", None)
    kind = given.pop("model_type", None)
    try:
        config = transformers.AutoConfig.for_model(kind, **given)
        owner = getattr(transformers, (config.architectures or ["AutoModel"])[0])
        if not issubclass(owner, transformers.PreTrainedModel):
            raise TypeError(f"{owner.__name__} is no model")
        return owner(config)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{folder} describes no model that transformers can build: {error}") from error


class _Runner(Runner):
    def __init__(self, model: Any, manifest: Manifest, device: str) -> None:
        self._model, self._device = model, device
        self.inputs: tuple[TensorSpec, ...] = manifest.inputs
        self.outputs: tuple[TensorSpec, ...] = manifest.outputs

    def prepare(self, feeds: Feeds) -> dict[str, torch.Tensor]:
        owned = {spec.name: np.require(feeds[spec.name], requirements=["C", "W"]) for spec in self.inputs}
        return {name: torch.from_numpy(array).to(self._device) for name, array in owned.items()}  # pyright: ignore[reportUnknownMemberType]

    def run_prepared(self, prepared: Any) -> Any:
        with torch.inference_mode():
            given = self._model(**prepared)
            if self._device != "cpu":
                torch.cuda.synchronize()
            return given

    def run(self, feeds: Feeds) -> dict[str, Array]:
        given = self.run_prepared(self.prepare(feeds))
        return {spec.name: given[spec.name].float().cpu().numpy() for spec in self.outputs}
