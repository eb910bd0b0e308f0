"""The configuration of the package: one object with three areas, the one in force, and scopes that differ.

    config = AutoRoundConfig(model_path="model", quantization={"bits": 2, "group_size": 32})
    config.quantization.group_size = 64
    config.update(memory={"max_ram_mb": 4000})

An area is what was set when it was read: `config.quantization` stays as it is when somebody else updates the
configuration, so that its fields always belong together. Read it again to see the change.
"""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Self, TypeVar, cast

from auto_round._config_areas import (
    EXPORT_FORMATS,
    ExportConfig,
    LayerSettings,
    MemoryConfig,
    QuantizationConfig,
)
from auto_round._config_base import Area, checked_path, known_keys
from auto_round._files import read_json_object, shown, write_json
from auto_round.exceptions import ConfigurationError

__all__ = [
    "EXPORT_FORMATS",
    "AutoRoundConfig",
    "ExportConfig",
    "LayerSettings",
    "MemoryConfig",
    "QuantizationConfig",
    "config_scope",
    "configure",
    "get_config",
    "load_config",
]

_FILE_VERSION = 1
_FILE_NAME = "auto_round_config.json"
_MOST_BYTES = 16 << 20
_DEVICE = re.compile(r"auto|cpu|cuda(:\d{1,3})?")
A = TypeVar("A", bound=Area)
_AREAS: dict[str, type[Area]] = {area.area: area for area in (MemoryConfig, QuantizationConfig, ExportConfig)}


@dataclass(frozen=True, kw_only=True)
class _State:
    """All settings at one time. Its areas are never handed out, so nothing in it changes."""

    model_path: str | None = None
    device: str = "auto"
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    quantization: QuantizationConfig = field(default_factory=QuantizationConfig)
    export: ExportConfig = field(default_factory=ExportConfig)

    def changed(self, changes: Mapping[str, Any], *, merge: bool) -> _State:
        """Return the state after the changes, a mapping for an area being added to it or to its defaults."""
        values: dict[str, Any] = {}
        for name, value in known_keys(changes, _FIELDS, "The configuration").items():
            if name == "model_path":
                values[name] = checked_path(value, name)
            elif name == "device":
                if not isinstance(value, str) or not _DEVICE.fullmatch(value):
                    raise ConfigurationError(
                        f"device is {shown(value)}; it must be auto, cpu, cuda or cuda:N."
                    )
                values[name] = value
            elif isinstance(value, _AREAS[name]):
                values[name] = _AREAS[name].from_dict(value.values())
            else:
                values[name] = (getattr(self, name) if merge else _AREAS[name]()).changed(value)
        return replace(self, **values)


_FIELDS = [state_field.name for state_field in fields(_State)]


class AutoRoundConfig:
    """All settings, valid at all times: what would make them invalid raises and changes nothing.

    Any number of threads may read and change one configuration. Whoever reads an area, `to_dict` or `copy`
    sees a change whole or not at all.

    Args:
        model_path: Folder or name of the model.
        device: `auto` (a GPU if there is one), `cpu`, `cuda` or `cuda:N`.
        memory: How much memory may be used; an area may be given as a mapping of its fields.
        quantization: What the weights become.
        export: What is written, and where.

    Raises:
        ConfigurationError: A key is unknown, a value is of the wrong type or impossible, or values contradict
            each other. The message says what is allowed.
    """

    def __init__(
        self,
        model_path: str | os.PathLike[str] | None = None,
        device: str = "auto",
        memory: MemoryConfig | Mapping[str, Any] | None = None,
        quantization: QuantizationConfig | Mapping[str, Any] | None = None,
        export: ExportConfig | Mapping[str, Any] | None = None,
    ) -> None:
        self._lock = threading.RLock()
        self._file: Path | None = None
        areas = {"memory": memory, "quantization": quantization, "export": export}
        given = {name: area for name, area in areas.items() if area is not None}
        changes = {"model_path": model_path, "device": device, **given}
        self._state = _State().changed(changes, merge=False)

    @property
    def model_path(self) -> str | None:
        """Folder or name of the model."""
        return self._state.model_path

    @model_path.setter
    def model_path(self, value: str | os.PathLike[str] | None) -> None:
        self._change({"model_path": value})

    @property
    def device(self) -> str:
        """Where the model runs."""
        return self._state.device

    @device.setter
    def device(self, value: str) -> None:
        self._change({"device": value})

    @property
    def memory(self) -> MemoryConfig:
        """How much memory may be used, as it is set now."""
        return self._attached(self._state.memory)

    @memory.setter
    def memory(self, value: MemoryConfig | Mapping[str, Any]) -> None:
        self._change({"memory": value}, merge=False)

    @property
    def quantization(self) -> QuantizationConfig:
        """What the weights become, as it is set now."""
        return self._attached(self._state.quantization)

    @quantization.setter
    def quantization(self, value: QuantizationConfig | Mapping[str, Any]) -> None:
        self._change({"quantization": value}, merge=False)

    @property
    def export(self) -> ExportConfig:
        """What is written, and where, as it is set now."""
        return self._attached(self._state.export)

    @export.setter
    def export(self, value: ExportConfig | Mapping[str, Any]) -> None:
        self._change({"export": value}, merge=False)

    def update(self, **changes: Any) -> Self:
        """Change some settings, all of them or (if one is wrong) none, and return this configuration.

        A mapping given for an area changes the fields that it names and leaves the others; an area object
        replaces the area. Values are replaced, not merged: `layer_config` and `ignore_layers` too.

        Raises:
            ConfigurationError: The configuration would not be valid; it is as it was.
        """
        self._change(changes)
        return self

    def to_dict(self) -> dict[str, Any]:
        """Return all settings as plain values that JSON can hold, the areas as dictionaries."""
        state = self._state
        values = {name: getattr(state, name) for name in _FIELDS}
        return {name: v.to_dict() if isinstance(v, Area) else v for name, v in values.items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Build a configuration from a mapping; what it lacks gets its default.

        Raises:
            ConfigurationError: As the constructor.
        """
        config = cls()
        config._change(values)
        return config

    def copy(self) -> Self:
        """Return a configuration with the same settings. It has no file of its own yet."""
        config = type(self)()
        config._state = self._state
        return config

    def save(self, path: str | os.PathLike[str] | None = None) -> Path:
        """Write the configuration to a JSON file, whole or not at all, and return its path.

        Args:
            path: The file. None means the one that was last saved to or that this was loaded from; without
                one, `auto_round_config.json` in `export.export_path`.

        Raises:
            ConfigurationError: `path` is None and there is neither, it is a folder, or it is no path.
            OSError: It cannot be written.
        """
        state, target = self._state, self._file
        if path is not None:
            target = Path(checked_path(path, "path") or "")
        elif target is None:
            if state.export.export_path is None:
                raise ConfigurationError(
                    "This configuration has no file yet and export.export_path is None: name a file, as in "
                    "save('config.json'), or set export_path."
                )
            target = Path(state.export.export_path) / _FILE_NAME
        if target.is_dir():
            raise ConfigurationError(f"{target} is a folder; name a file in it, such as {_FILE_NAME}.")
        target = target.absolute()
        write_json(target, {"format_version": _FILE_VERSION, **self.to_dict()})
        self._file = target
        return target

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Return the configuration in a JSON file that `save` wrote, or one written by hand.

        A file by hand may leave out the format version and anything that shall have its default.

        Raises:
            ConfigurationError: The file is missing, is not JSON, is of a later format, or its content is no
                valid configuration. The message names the file.
        """
        file = Path(os.fspath(path))
        content = read_json_object(file, ConfigurationError, _MOST_BYTES)
        version = content.pop("format_version", _FILE_VERSION)
        if not isinstance(version, int) or isinstance(version, bool) or not 1 <= version <= _FILE_VERSION:
            raise ConfigurationError(
                f"{file} has format version {shown(version)}; this release of auto-round-core reads "
                f"{_FILE_VERSION}. If a later one wrote it, upgrade."
            )
        try:
            config = cls.from_dict(content)
        except ConfigurationError as failure:
            raise ConfigurationError(f"{file}: {failure}") from None
        config._file = file.absolute()
        return config

    def _attached(self, area: A) -> A:
        def commit(changes: Mapping[str, Any]) -> Area:
            return getattr(self._change({area.area: changes}), area.area)

        return area.attached(commit)

    def _change(self, changes: Mapping[str, Any], *, merge: bool = True) -> _State:
        _point_into_areas(changes)
        with self._lock:
            self._state = self._state.changed(changes, merge=merge)
            return self._state

    def _take_over(self, other: AutoRoundConfig) -> None:
        with self._lock:
            self._state, self._file = other._state, other._file

    def __setattr__(self, name: str, value: Any) -> None:
        if not name.startswith("_"):
            known_keys({name: value}, _FIELDS, "The configuration")
        super().__setattr__(name, value)

    def __eq__(self, other: object) -> bool:
        return self._state == other._state if isinstance(other, AutoRoundConfig) else NotImplemented

    def __repr__(self) -> str:
        values = ", ".join(f"{name}={getattr(self._state, name)!r}" for name in _FIELDS)
        return f"{type(self).__name__}({values})"

    def __reduce__(self) -> tuple[Any, ...]:
        # Locks can be neither copied nor pickled.
        return type(self).from_dict, (self.to_dict(),)


def _point_into_areas(changes: object) -> None:
    """Say of a field that was given outside its area where it belongs."""
    for key in cast("Mapping[object, Any]", changes) if isinstance(changes, Mapping) else ():
        for name, area in _AREAS.items():
            if key in [area_field.name for area_field in fields(area)]:
                raise ConfigurationError(f"{key} belongs to an area; give it as {name}={{{key!r}: ...}}.")


_PROCESS = AutoRoundConfig()
_SCOPED: ContextVar[AutoRoundConfig | None] = ContextVar("auto_round_config", default=None)


def get_config() -> AutoRoundConfig:
    """Return the configuration in force: that of the innermost `config_scope`, or the process's only one."""
    scoped = _SCOPED.get()
    return _PROCESS if scoped is None else scoped


def configure(**changes: Any) -> AutoRoundConfig:
    """Change the configuration in force, as `AutoRoundConfig.update` does, and return it.

    Raises:
        ConfigurationError: It would not be valid; it is as it was.
    """
    return get_config().update(**changes)


def load_config(path: str | os.PathLike[str]) -> AutoRoundConfig:
    """Give the configuration in force all settings of a file, and return it.

    What the file leaves out gets its default, whatever it was before.

    Raises:
        ConfigurationError: As `AutoRoundConfig.load`; the configuration is as it was.
    """
    config = get_config()
    config._take_over(AutoRoundConfig.load(path))  # pyright: ignore[reportPrivateUsage]: of this module
    return config


@contextmanager
def config_scope(
    config: AutoRoundConfig | Mapping[str, Any] | None = None, **changes: Any
) -> Generator[AutoRoundConfig]:
    """Have a configuration of its own in force within a `with`, and the one before it again afterwards.

    Only the code within sees it, and the asyncio tasks that it starts. Other threads and tasks do not, nor
    do threads that are started within, unless they run in a copy of the context (`contextvars.copy_context`,
    `asyncio.to_thread`).

    Args:
        config: Where it begins, which stays as it is; None means the configuration in force.
        **changes: What is changed, as by `AutoRoundConfig.update`.

    Raises:
        ConfigurationError: It would not be valid.
    """
    if isinstance(config, Mapping):
        config = AutoRoundConfig.from_dict(config)
    scoped = (get_config() if config is None else config).copy().update(**changes)
    token = _SCOPED.set(scoped)
    try:
        yield scoped
    finally:
        _SCOPED.reset(token)
