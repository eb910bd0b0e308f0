"""Quantised weights that wait on disk to be exported, a file for each block.

Codes are packed to their bits, so that the files take what the quantised model takes. Format version 1: for a
layer NAME the safetensors file holds `NAME:codes` (int32 words of `packing`, [rows, words]), `NAME:scale`
and, where there are some, `NAME:zero` and `NAME:global_scale`; the file's metadata holds the settings. Scales
that were trained later are in a file of their own beside it, which holds `NAME:scale` alone.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from safetensors import torch as safetensors_torch
from torch import Tensor

from auto_round._files import write_atomically
from auto_round.config_manager import LayerSettings
from auto_round.exceptions import ExportError
from auto_round.low_cpu_mem._checkpoint import CheckpointReader
from auto_round.packing._bitstream import pack, unpack
from auto_round.quantization._quantized import QuantizedWeight

_save = cast("Callable[[dict[str, Tensor], Path, dict[str, str]], None]", safetensors_torch.save_file)  # pyright: ignore
_PARTS = ("scale", "zero", "global_scale")
# E4M3 scales are kept as bytes: not every reader of safetensors knows the type.
_BYTES = {torch.float8_e4m3fn: torch.uint8}


class ResultStore:
    """Writes what blocks became, and reads single layers back.

    Args:
        folder: A folder of its own, which must be there.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._files: dict[str, Path] = {}
        self._scales: dict[str, Path] = {}
        self._settings: dict[str, tuple[LayerSettings, int]] = {}

    @property
    def layers(self) -> dict[str, LayerSettings]:
        """The layers that were written, and how each is quantised."""
        return {name: settings for name, (settings, _) in self._settings.items()}

    def write(self, name: str, weights: Mapping[str, QuantizedWeight]) -> None:
        """Write the layers of one block to a file of this name, whole or not at all.

        Raises:
            ExportError: It cannot be written, as on a disk that is full.
        """
        tensors: dict[str, Tensor] = {}
        for layer, weight in weights.items():
            codes = weight.codes.cpu()
            tensors[f"{layer}:codes"] = pack(codes, weight.settings.bits)
            for part in _PARTS:
                value: Tensor | None = getattr(weight, part)
                if value is not None:
                    value = value.cpu().contiguous()
                    tensors[f"{layer}:{part}"] = value.view(_BYTES.get(value.dtype, value.dtype))
        about = {layer: [asdict(w.settings), w.codes.shape[1]] for layer, w in weights.items()}
        metadata = {"format_version": "1", "layers": json.dumps(about)}
        path = self._write(name, tensors, metadata)
        for layer, weight in weights.items():
            self._files[layer] = path
            self._settings[layer] = weight.settings, weight.codes.shape[1]
            self._scales.pop(layer, None)

    def replace_scales(self, scales: Iterable[tuple[str, Mapping[str, Tensor]]]) -> None:
        """Have layers read with other scales from now on: all of them, or after any failure none.

        Args:
            scales: Names of files, each with the new scales of some layers by their names, in the shape and
                type of the old ones. They are taken one after another, so that one is in memory at a time.

        Raises:
            ExportError: As for `write`.
        """
        found: dict[str, Path] = {}
        try:
            for name, by_layer in scales:
                tensors = {f"{layer}:scale": scale.cpu().contiguous() for layer, scale in by_layer.items()}
                path = self._write(name, tensors, {"format_version": "1"})
                found.update(dict.fromkeys(by_layer, path))
        except BaseException:
            for path in set(found.values()):
                path.unlink(missing_ok=True)
            raise
        # What a name stands for is known in this process alone, and changes here at once.
        self._scales = {**self._scales, **found}

    def read(self, layer: str) -> QuantizedWeight:
        """Return one layer."""
        settings, width = self._settings[layer]
        with CheckpointReader(self._files[layer]) as reader:
            parts: dict[str, Any] = {
                part: reader.read(f"{layer}:{part}") for part in _PARTS if f"{layer}:{part}" in reader
            }
            codes = unpack(reader.read(f"{layer}:codes"), settings.bits, width)
        if layer in self._scales:
            with CheckpointReader(self._scales[layer]) as reader:
                parts["scale"] = reader.read(f"{layer}:scale")
        if settings.weight_dtype == "nvfp4":
            parts["scale"] = parts["scale"].view(torch.float8_e4m3fn)
        return QuantizedWeight(settings=settings, codes=codes, **parts)

    def _write(self, name: str, tensors: dict[str, Tensor], metadata: dict[str, str]) -> Path:
        path = self.folder / f"{name}.safetensors"
        try:
            write_atomically(path, lambda temporary: _save(tensors, temporary, metadata))
        except (OSError, SafetensorError) as failure:
            raise ExportError(
                f"{path} cannot be written: {failure}. Quantised weights wait in memory.workspace_dir until "
                "they are saved; set it to a folder with room for them."
            ) from failure
        return path
