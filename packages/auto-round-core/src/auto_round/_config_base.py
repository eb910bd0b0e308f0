"""What the areas of the configuration share: checked assignment, plain values, single checks."""

from __future__ import annotations

import dataclasses
import difflib
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar, Self, cast

from auto_round._files import shown
from auto_round.exceptions import ConfigurationError

MOST = 2**31 - 1
"""The largest integer that a setting takes unless it says otherwise."""


@dataclasses.dataclass(kw_only=True)
class Area(ABC):
    """A part of the configuration whose fields are valid together at all times.

    Assigning a field checks the whole area first and changes nothing if it would be wrong. An area that an
    `AutoRoundConfig` handed out passes the assignment on to it.
    """

    area: ClassVar[str]
    """What a configuration calls it."""
    _commit: ClassVar[Callable[[Mapping[str, Any]], Area] | None] = None
    """Of an area that a configuration handed out, what changes it there and returns the outcome."""

    def __post_init__(self) -> None:
        self.validate()
        object.__setattr__(self, "_complete", True)

    def __setattr__(self, name: str, value: Any) -> None:
        if "_complete" not in self.__dict__:
            object.__setattr__(self, name, value)
            return
        changed = (self._commit or self.changed)({name: value})
        # One store, so that a field that follows another is never seen without it.
        object.__setattr__(self, "__dict__", {**self.__dict__, **changed.values()})

    def __reduce__(self) -> tuple[Any, ...]:
        # A copy belongs to no configuration, and a mapping proxy can be neither copied nor pickled.
        return type(self).from_dict, (self.to_dict(),)

    @abstractmethod
    def validate(self) -> None:
        """Check every field, and the fields against each other.

        Raises:
            ConfigurationError: A value is impossible; the message says what is allowed.
        """

    def values(self) -> dict[str, Any]:
        """Return the fields as they are."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain values that JSON can hold."""
        return {name: _plain(value) for name, value in self.values().items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Build an area from a mapping; fields that it lacks get their defaults.

        Raises:
            ConfigurationError: It is no mapping, a key is unknown (the nearest known one is named) or a value
                is impossible.
        """
        return cls(**cls._known(values))

    def changed(self, changes: Mapping[str, Any]) -> Self:
        """Return an area with some fields changed; this one stays as it is.

        Raises:
            ConfigurationError: As `from_dict`.
        """
        return type(self)(**{**self.values(), **self._known(changes)})

    def attached(self, commit: Callable[[Mapping[str, Any]], Area]) -> Self:
        """Return a copy that hands assignments to `commit`."""
        copy = object.__new__(type(self))
        object.__setattr__(copy, "__dict__", {**self.__dict__, "_commit": commit})
        return copy

    @classmethod
    def _known(cls, values: object) -> Mapping[str, Any]:
        names = [field.name for field in dataclasses.fields(cls)]
        return known_keys(values, names, f"The area {cls.area!r}")

    # The checks

    def _check_int(self, *names: str, least: int, most: int = MOST, optional: bool = False) -> None:
        for name in names:
            value = getattr(self, name)
            if optional and value is None:
                continue
            if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
                self._refuse(name, f"an integer from {least} to {most}{' or None' if optional else ''}")

    def _check_rate(self, *names: str) -> None:
        """Check numbers above zero, which become floats, or None."""
        for name in names:
            value = getattr(self, name)
            if value is None:
                continue
            is_number = isinstance(value, int | float) and not isinstance(value, bool)
            if not is_number or not 0 < value < 2**1000:
                self._refuse(name, "a number above 0 or None")
            object.__setattr__(self, name, float(value))

    def _check_choice(self, name: str, allowed: Sequence[object]) -> None:
        value = getattr(self, name)
        if not isinstance(value, str | int) or isinstance(value, bool) or value not in allowed:
            near = nearest(value, [choice for choice in allowed if isinstance(choice, str)])
            self._refuse(name, f"one of {', '.join(map(repr, allowed))}{near}")

    def _check_flags(self, *names: str) -> None:
        for name in names:
            if not isinstance(getattr(self, name), bool):
                self._refuse(name, "True or False")

    def _check_paths(self, *names: str) -> None:
        """Check paths, which become text, or None."""
        for name in names:
            object.__setattr__(self, name, checked_path(getattr(self, name), f"{self.area}.{name}"))

    def _refuse(self, name: str, allowed: str) -> None:
        raise ConfigurationError(f"{self.area}.{name} is {shown(getattr(self, name))}; it must be {allowed}.")


def known_keys(values: object, known: Sequence[str], owner: str) -> Mapping[str, Any]:
    """Return `values` if it is a mapping of which each key is known; say what was meant otherwise."""
    if not isinstance(values, Mapping):
        raise ConfigurationError(
            f"{owner} takes a mapping of its fields, but got a {type(values).__name__}: {shown(values)}."
        )
    for key in cast("Mapping[object, Any]", values):
        if not isinstance(key, str) or key not in known:
            hint = nearest(key, known) or f"; it has {', '.join(known)}"
            raise ConfigurationError(f"{owner} has no field {shown(key)}{hint}.")
    return cast("Mapping[str, Any]", values)


def checked_path(value: object, name: str) -> str | None:
    """Return a path as text, or None."""
    if value is None:
        return None
    is_path = isinstance(value, str | os.PathLike)
    path: object = os.fspath(cast("str | os.PathLike[Any]", value)) if is_path else None
    if not isinstance(path, str) or not path or "\0" in path:
        raise ConfigurationError(
            f"{name} is {shown(value)}; it must be a path that is not empty and has no zero byte, or None."
        )
    return path


def nearest(name: object, known: Iterable[str]) -> str:
    """Say which of the known names was probably meant, or nothing."""
    # Long names take difflib long, and no setting has one.
    near = difflib.get_close_matches(name[:100], known, n=1, cutoff=0.5) if isinstance(name, str) else []
    return f" (did you mean {near[0]!r}?)" if near else ""


def _plain(value: object) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(entry) for key, entry in cast("Mapping[str, object]", value).items()}
    return list(cast("tuple[object, ...]", value)) if isinstance(value, tuple) else value
