"""What the configurations share: reading and writing themselves, and the checks of single values."""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import os
import sys
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self, cast

import yaml

from llm_trainer._files import read_json_object, shown, write_json, write_text
from llm_trainer.exceptions import ConfigurationError, LLMTrainerError

SECTIONS = {"model", "training", "data"}
"""What a file with several configurations calls them."""


@dataclasses.dataclass
class Config(ABC):
    """Base of the configurations: `validate` runs at construction; call it again after changing a field."""

    error: ClassVar[type[ConfigurationError]] = ConfigurationError
    section: ClassVar[str]

    def __post_init__(self) -> None:
        self.validate()

    def __setattr__(self, name: str, value: Any) -> None:
        known = [field.name for field in dataclasses.fields(self)]
        if name not in known:
            raise self.error(f"{type(self).__name__} has no field {name!r}; {hint(name, known)}")
        super().__setattr__(name, value)

    @abstractmethod
    def validate(self) -> None:
        """Check every field.

        Raises:
            ConfigurationError: A value is impossible; the message says what is allowed.
        """

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain values that JSON and YAML can hold."""
        return {
            field.name: list(cast("tuple[Any, ...]", value)) if isinstance(value, tuple) else value
            for field in dataclasses.fields(self)
            for value in [getattr(self, field.name)]
        }

    @classmethod
    def from_dict(cls, config_dict: Mapping[str, Any]) -> Self:
        """Build a configuration from a mapping; fields that it lacks get their defaults.

        Raises:
            ConfigurationError: It is no mapping, a key is unknown (the nearest known one is named) or a value
                is impossible.
        """
        check_type(config_dict, Mapping, f"What {cls.__name__}.from_dict takes", cls.error)
        known = [field.name for field in dataclasses.fields(cls)]
        for key in config_dict:
            if key not in known:
                raise cls.error(f"{cls.__name__} has no field {shown(key)}; {hint(key, known)}")
        return cls(**config_dict)

    def save(self, path: str | Path) -> None:
        """Write the configuration to a `.json`, `.yaml` or `.yml` file."""
        write_mapping(Path(path), self.to_dict(), self.error)

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a configuration that `save` wrote, or one written by hand; or its section of a file with the
        sections `model`, `training` and `data`.

        Raises:
            ConfigurationError: The ending is none of the known ones, a YAML file is missing or cannot be
                read, or the content is not a valid configuration.
            FormatError: A JSON file is missing, cannot be read, or is not JSON.
        """
        content = read_mapping(Path(path), cls.error)
        # A file of sections, as RunConfig has it, holds this configuration in one of them.
        if content.keys() <= SECTIONS and isinstance(content.get(cls.section), dict):
            content = content[cls.section]
        return cls.from_dict(content)

    def _check_int(self, name: str, *, least: int, most: int = 2**31 - 1, optional: bool = False) -> None:
        value = getattr(self, name)
        if optional and value is None:
            return
        if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
            high = f" and at most {most}" if isinstance(value, int) and value > most else ""
            self._refuse(name, f"an integer of at least {least}{high}{' or None' if optional else ''}")

    def _check_float(
        self,
        name: str,
        *,
        least: float = 0.0,
        most: float = math.inf,
        open_low: bool = False,
        open_high: bool = False,
        optional: bool = False,
    ) -> None:
        """Check a finite number in an interval, whose ends count unless they are open; text such as "1e-4"
        (which is how YAML reads it) is converted.
        """
        value = getattr(self, name)
        if optional and value is None:
            return
        if isinstance(value, str):
            try:
                value = float(value)
            except ValueError:
                value = math.nan
            setattr(self, name, value)
        inside = (
            isinstance(value, int | float)
            and not isinstance(value, bool)
            and abs(value) <= sys.float_info.max
            and (value > least if open_low else value >= least)
            and (value < most if open_high else value <= most)
        )
        if not inside:
            low = f"{'above' if open_low else 'at least'} {least:g}"
            high = "" if math.isinf(most) else f" and {'below' if open_high else 'at most'} {most:g}"
            self._refuse(name, f"a number {low}{high}{' or None' if optional else ''}")

    def _check_choice(self, name: str, allowed: Sequence[str]) -> None:
        if getattr(self, name) not in allowed:
            self._refuse(name, "one of " + ", ".join(json.dumps(choice) for choice in allowed))

    def _check_flags(self, *names: str) -> None:
        for name in names:
            if not isinstance(getattr(self, name), bool):
                self._refuse(name, "True or False")

    def _check_text(self, *names: str, optional: bool = False) -> None:
        for name in names:
            value = getattr(self, name)
            if not (optional and value is None) and not (isinstance(value, str) and value):
                self._refuse(name, f"text that is not empty{' or None' if optional else ''}")

    def _check_paths(self, *names: str) -> None:
        """Check paths, which become text, or None."""
        for name in names:
            value = getattr(self, name)
            if value is None:
                continue
            if not isinstance(value, str | os.PathLike):
                self._refuse(name, "a path or None")
            path = os.fspath(cast("str", value))
            if "\0" in path:
                self._refuse(name, "a path without a zero byte")
            setattr(self, name, path)

    def _refuse(self, name: str, allowed: str) -> None:
        raise self.error(
            f"{type(self).__name__}.{name} is {shown(getattr(self, name))}; it must be {allowed}."
        )


def check_type(
    value: object, wanted: type[Any], name: str, error: type[LLMTrainerError] | None = None
) -> None:
    """Refuse an object of another type: a dictionary where a configuration is needed, for instance.

    Args:
        value: What was given.
        wanted: The type that is needed.
        name: What the value is called.
        error: What is raised; None means that of the configuration `wanted`.

    Raises:
        LLMTrainerError: It is not a `wanted`.
    """
    if isinstance(value, wanted):
        return
    remedy = ""
    if issubclass(type(value), Mapping) and hasattr(wanted, "from_dict"):
        remedy = f"; make one with {wanted.__name__}.from_dict(...)"
    raise (error or getattr(wanted, "error", ConfigurationError))(
        f"{name} must be a {wanted.__name__}, but is of type {type(value).__name__}: {shown(value)}{remedy}."
    )


def hint(name: object, known: Sequence[str]) -> str:
    """Name what was probably meant, or all that is known."""
    near = difflib.get_close_matches(str(name)[:100], known, n=1, cutoff=0.5) if isinstance(name, str) else []
    return f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(known)}."


def write_mapping(path: Path, content: Mapping[str, Any], error: type[ConfigurationError]) -> None:
    """Write plain values in the format that the path's ending names."""
    if _is_json(path, error):
        write_json(path, content)
    else:
        write_text(path, yaml.safe_dump(content, sort_keys=False))


def read_mapping(path: Path, error: type[ConfigurationError]) -> dict[str, Any]:
    """Read a mapping in the format that the path's ending names.

    Raises:
        ConfigurationError: The ending is none of the known ones, a YAML file is missing or cannot be read, or
            the content is not a mapping.
        FormatError: A JSON file is missing, cannot be read, or is not JSON.
    """
    if _is_json(path, error):
        return read_json_object(path)
    try:
        content: object = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise error(f"{path} does not exist.") from None
    except OSError as failure:
        raise error(f"{path} cannot be read: {failure.strerror}.") from failure
    except (yaml.YAMLError, ValueError, OverflowError, RecursionError) as failure:
        # PyYAML lets through what Python says of an impossible date, number or depth.
        raise error(f"{path} is not valid YAML: {failure}") from failure
    if not isinstance(content, dict):
        raise error(f"{path} must hold a mapping of fields, but holds a {type(content).__name__}.")
    return cast("dict[str, Any]", content)


def _is_json(path: Path, error: type[ConfigurationError]) -> bool:
    if path.suffix == ".json":
        return True
    if path.suffix in {".yaml", ".yml"}:
        return False
    raise error(f"{path} must end in .json, .yaml or .yml to say its format.")
