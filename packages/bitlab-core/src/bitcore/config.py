"""How weights and activations are quantised."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, Self, get_args

from bitcore.exceptions import QuantizationError, nearest

__all__ = [
    "ActivationDtype",
    "ActivationGranularity",
    "BitQuantConfig",
    "WeightGranularity",
    "check_field",
    "check_sizes",
]

WeightGranularity = Literal["per_tensor", "per_channel"]
ActivationDtype = Literal["int8", "float32"]
ActivationGranularity = Literal["per_tensor", "per_channel", "per_token"]

_ALLOWED: dict[str, tuple[str, ...]] = {
    "weight_granularity": get_args(WeightGranularity),
    "activation_dtype": get_args(ActivationDtype),
    "activation_granularity": get_args(ActivationGranularity),
}


@dataclass(frozen=True)
class BitQuantConfig:
    """How a ternary layer quantises its weights and what it is given. The defaults are those of BitNet b1.58.

    Raises:
        QuantizationError: A value is none of those that are allowed; the message names them.
    """

    weight_granularity: WeightGranularity = "per_tensor"
    """One scale for the whole weight, or one for each output (row)."""
    activation_dtype: ActivationDtype = "int8"
    """Inputs are rounded to 8 bits, or left as they are."""
    activation_granularity: ActivationGranularity = "per_token"
    """One scale for all inputs of a call, or one for each token: a row along the last dimension.

    `per_channel` means the same as `per_token`, since a row of the matrix of inputs is what gets the scale,
    never one of its features. `per_tensor` makes what a row gives depend on the rows beside it."""

    def __post_init__(self) -> None:
        for field in fields(self):
            check_field(field.name, getattr(self, field.name))

    @property
    def quantizes_activations(self) -> bool:
        """Whether inputs are rounded to 8 bits."""
        return self.activation_dtype == "int8"

    @property
    def scales_each_token(self) -> bool:
        """Whether each row of inputs has a scale of its own."""
        return self.activation_granularity != "per_tensor"

    def to_dict(self) -> dict[str, str]:
        """Return the fields by name, which `from_dict` takes."""
        return asdict(self)

    @classmethod
    def of(cls, given: Self | Mapping[str, Any] | None) -> Self:
        """Return what was given: a configuration, its fields by name, or None for the defaults.

        Raises:
            QuantizationError: It is something else, or a key or a value is unknown.
        """
        if given is None:
            return cls()
        if isinstance(given, cls):
            return given
        if isinstance(given, Mapping):
            return cls.from_dict(given)
        raise QuantizationError(f"a quant_config is a BitQuantConfig or a dictionary, not {given!r}.")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Return the configuration with these fields; what is left out has its default.

        Raises:
            QuantizationError: A key or a value is unknown.
        """
        for name in values:
            if name not in _ALLOWED:
                raise QuantizationError(f"{name!r} is none of {', '.join(_ALLOWED)}{nearest(name, _ALLOWED)}")
        return cls(**values)


def check_field(name: str, value: object) -> None:
    """Raise `QuantizationError` unless a field of `BitQuantConfig` may have this value."""
    allowed = _ALLOWED[name]
    if value not in allowed:
        raise QuantizationError(f"{name} is {value!r}; it must be one of {', '.join(allowed)}.")


def check_sizes(**sizes: object) -> None:
    """Raise `QuantizationError` unless all sizes are whole numbers above zero."""
    for name, size in sizes.items():
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise QuantizationError(f"{name} is {size!r}; it must be a whole number above zero.")
