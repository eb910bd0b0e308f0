"""What a quantisation did, layer by layer and block by block, as a value and as JSON."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, cast

import torch

from auto_round._files import write_json
from auto_round.config_manager import LayerSettings
from auto_round.quantization._grouping import row_chunks
from auto_round.quantization._pieces import WeightRows
from auto_round.quantization._quantized import QuantizedWeight

_FORMAT_VERSION = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerReport:
    """How one layer was quantised."""

    name: str
    settings: LayerSettings
    weights: int
    """How many weights it has."""
    sqnr_db: float
    """Signal to noise of its weights, 10 log10(sum w**2 / sum (w - w_q)**2); infinite where exact."""
    loss: float
    """Mean squared error of its weights. What they do to the block's output is in the block's losses."""
    stored_bits: float
    """Bits for each weight, scales and zero points included."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BlockReport:
    """How one block was quantised. Losses are mean squared errors of its output over all samples."""

    name: str
    layers: tuple[LayerReport, ...]
    loss_before: float | None = None
    """Rounded to nearest, given what the quantised blocks before it put out; None where nothing was run."""
    loss_after: float | None = None
    best_step: int | None = None
    """The step of training whose parameters were kept; None where nothing was trained."""
    step_losses: tuple[float, ...] = ()
    """Of each step's batch, as a share of what rounding to nearest loses on that batch."""
    wall_s: float = 0.0
    peak_mb: float = 0.0
    """Largest resident set of the process while it was worked on, in MB of 2**20 bytes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EndToEndReport:
    """How all scales were trained together.

    Losses are KL divergences of the quantised model's predictions from the float model's, in nats a token.
    """

    loss_before: float
    """With the scales that the blocks were given."""
    loss_after: float
    """With those that were kept; no larger than before."""
    samples: int
    """On how many samples both were measured."""
    held_out: bool
    """Those were kept out of the training; where there are few samples, none are."""
    best_step: int
    """After how many steps the scales were kept; 0 where no step made them better, and they are as before."""
    step_losses: tuple[float, ...] = ()
    """Of each step's batch, before the step."""
    wall_s: float = 0.0
    peak_mb: float = 0.0
    """Largest resident set of the process meanwhile, in MB of 2**20 bytes."""


@dataclass(kw_only=True)
class QuantizationReport:
    """A whole quantisation."""

    model: str
    """Path or class of the model."""
    configuration: Mapping[str, Any]
    blocks: list[BlockReport] = field(default_factory=list[BlockReport])
    outside: list[LayerReport] = field(default_factory=list[LayerReport])
    """Layers outside the blocks."""
    end_to_end: EndToEndReport | None = None
    """None where scales were not trained end to end; else the blocks and layers above are as before that."""
    memory: list[tuple[float, float]] = field(default_factory=list[tuple[float, float]])
    """Seconds since the start, and the process's resident set in MB of 2**20 bytes."""
    notes: list[str] = field(default_factory=list[str])
    """What was decided on the way, such as to keep activations on disk."""

    @property
    def layers(self) -> list[LayerReport]:
        """All layers, those of the blocks first."""
        return [layer for block in self.blocks for layer in block.layers] + self.outside

    @property
    def average_bits(self) -> float:
        """Mean of the stored bits over all quantised weights."""
        layers = self.layers
        weights = sum(layer.weights for layer in layers)
        return sum(layer.weights * layer.stored_bits for layer in layers) / max(1, weights)

    @property
    def wall_s(self) -> float:
        """Seconds that the blocks took."""
        return sum(block.wall_s for block in self.blocks)

    @property
    def peak_mb(self) -> float:
        """Largest resident set of the process during the work, in MB of 2**20 bytes."""
        peaks = [block.peak_mb for block in self.blocks]
        return max([*peaks, self.end_to_end.peak_mb] if self.end_to_end else peaks, default=0.0)

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain values that JSON can hold; infinite figures are None."""
        values = {
            "format_version": _FORMAT_VERSION,
            "average_bits": self.average_bits,
            "wall_s": self.wall_s,
            "peak_mb": self.peak_mb,
            **asdict(self),
        }
        return _finite(values)

    def save_json(self, path: Path) -> None:
        """Write the report as JSON, whole or not at all."""
        write_json(path, self.to_dict())


def layer_report(name: str, weight: WeightRows, quantized: QuantizedWeight) -> LayerReport:
    """Compare a float weight [rows, in] with what it became."""
    count = math.prod(weight.shape)
    signal = noise = 0.0
    for rows in row_chunks(*quantized.codes.shape):
        part = QuantizedWeight(
            settings=quantized.settings,
            codes=quantized.codes[rows],
            scale=quantized.scale[rows],
            zero=None if quantized.zero is None else quantized.zero[rows],
            global_scale=quantized.global_scale,
        )
        values = weight[rows].float()
        signal += float(values.square().sum(dtype=torch.float64))
        noise += float(values.sub(part.dequantize()).square_().sum(dtype=torch.float64))
    sqnr = math.inf if noise == 0 else 10 * math.log10(max(signal, 1e-300) / noise)
    return LayerReport(
        name=name,
        settings=quantized.settings,
        weights=count,
        sqnr_db=sqnr,
        loss=noise / count,
        stored_bits=_stored_bits(quantized) / count,
    )


def _stored_bits(weight: QuantizedWeight) -> float:
    bits = weight.codes.numel() * weight.settings.bits + weight.scale.numel() * weight.scale.itemsize * 8
    if weight.zero is not None:
        bits += weight.zero.numel() * weight.settings.bits
    return bits


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(entry) for key, entry in cast("Mapping[str, Any]", value).items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_finite(entry) for entry in cast("Sequence[Any]", value)]
    return None if isinstance(value, float) and not math.isfinite(value) else value
