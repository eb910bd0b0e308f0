"""Quantisation of a model's weights, block by block."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from auto_round.quantization._autoround import AutoRound
    from auto_round.quantization._quantized import QuantizedWeight
    from auto_round.quantization._report import (
        BlockReport,
        EndToEndReport,
        LayerReport,
        QuantizationReport,
    )

__all__ = [
    "AutoRound",
    "BlockReport",
    "EndToEndReport",
    "LayerReport",
    "QuantizationReport",
    "QuantizedWeight",
]

# Loaded when first used: the parts of this package that export and report import need each other.
_HOMES = {
    "AutoRound": "_autoround",
    "BlockReport": "_report",
    "EndToEndReport": "_report",
    "LayerReport": "_report",
    "QuantizationReport": "_report",
    "QuantizedWeight": "_quantized",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
