"""All configurations of a run in one file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self, cast

from llm_trainer._files import shown
from llm_trainer.config._base import SECTIONS, check_type, hint, read_mapping, write_mapping
from llm_trainer.config._data import DataConfig
from llm_trainer.config._model import ModelConfig
from llm_trainer.config._training import TrainingConfig
from llm_trainer.exceptions import ConfigurationError


@dataclass
class RunConfig:
    """The model, the training and the data, as a file with those three sections describes them.

    There, the section `model` may begin with `preset: name`; its other fields then change that preset.

    Raises:
        ConfigurationError: A section is not of its type.
    """

    model: ModelConfig = field(default_factory=ModelConfig)
    """Architecture; its `vocab_size` becomes the tokenizer's."""
    training: TrainingConfig = field(default_factory=TrainingConfig)
    """Settings of the training."""
    data: DataConfig = field(default_factory=DataConfig)
    """Text and rows."""

    def __post_init__(self) -> None:
        check_type(self.model, ModelConfig, "model")
        check_type(self.training, TrainingConfig, "training")
        check_type(self.data, DataConfig, "data")

    def to_dict(self) -> dict[str, Any]:
        """Return the sections as plain values."""
        return {
            "model": self.model.to_dict(),
            "training": self.training.to_dict(),
            "data": self.data.to_dict(),
        }

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Self:
        """Build the configurations; a section or field that is not there has its defaults.

        Raises:
            ConfigurationError: A section or field is unknown (the nearest known one is named), or a value is
                impossible.
        """
        check_type(content, Mapping, "What RunConfig.from_dict takes", ConfigurationError)
        known = sorted(SECTIONS)
        sections: dict[str, dict[str, Any]] = {}
        for name, section in content.items():
            if name not in known:
                raise ConfigurationError(
                    f"A run's configuration has no section {shown(name)}; {hint(name, known)}"
                )
            if not isinstance(section, Mapping):
                raise ConfigurationError(
                    f"The section {name!r} must hold fields, not a {type(section).__name__}."
                )
            sections[name] = dict(cast("Mapping[str, Any]", section))
        model = sections.get("model", {})
        preset = model.pop("preset", None)
        return cls(
            ModelConfig.from_dict(model) if preset is None else ModelConfig.preset(preset, **model),
            TrainingConfig.from_dict(sections.get("training", {})),
            DataConfig.from_dict(sections.get("data", {})),
        )

    def save(self, path: str | Path) -> None:
        """Write the three sections to a `.json`, `.yaml` or `.yml` file."""
        write_mapping(Path(path), self.to_dict(), ConfigurationError)

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a file of sections.

        Raises:
            ConfigurationError: The ending or the content is not one of a configuration, or a YAML file is
                missing or cannot be read.
            FormatError: A JSON file is missing, cannot be read, or is not JSON.
        """
        return cls.from_dict(read_mapping(Path(path), ConfigurationError))
