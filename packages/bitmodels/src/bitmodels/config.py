"""What the configuration of a model is."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Self, cast

from bitcore.config import check_sizes
from bitcore.exceptions import nearest

from bitmodels.exceptions import QuantizationError

__all__ = ["ModelConfig"]


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Base of configurations: fields that are checked, and that go to a dictionary and back."""

    def to_dict(self) -> dict[str, Any]:
        """Return the fields by name, which `from_dict` takes."""
        return {field.name: _listed(getattr(self, field.name)) for field in dataclasses.fields(self)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Return the configuration with these fields; what is left out has its default.

        Raises:
            QuantizationError: A field is unknown, missing or impossible.
        """
        fields = [field.name for field in dataclasses.fields(cls)]
        for name in values:
            if name not in fields:
                known = ", ".join(fields)
                raise QuantizationError(
                    f"{cls.__name__} has no {name!r}, only {known}{nearest(name, fields)}"
                )
        given = {name: _frozen(value) for name, value in values.items()}
        try:
            return cls(**given)
        except TypeError as error:
            raise QuantizationError(f"{cls.__name__} cannot be made: {error}") from error


def _listed(value: Any) -> Any:
    return list(cast("tuple[Any, ...]", value)) if isinstance(value, tuple) else value


def _frozen(value: Any) -> Any:
    return tuple(cast("list[Any]", value)) if isinstance(value, list) else value


def check_positive(config: ModelConfig, *names: str) -> None:
    """Raise `QuantizationError` unless these fields are whole numbers above zero."""
    check_sizes(**{name: getattr(config, name) for name in names})


def check_share(config: ModelConfig, *names: str) -> None:
    """Raise `QuantizationError` unless these fields are from 0 to below 1."""
    for name in names:
        value = getattr(config, name)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1:
            raise QuantizationError(f"{name} is {value!r}; it must be from 0 to below 1.")
