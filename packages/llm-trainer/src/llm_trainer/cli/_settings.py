"""From files and options to configurations; nothing here needs torch, so that mistakes are told at once."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from pathlib import Path
from typing import Any, cast

import yaml

from llm_trainer._files import shown
from llm_trainer.config import DataConfig, ModelConfig, RunConfig
from llm_trainer.config._base import SECTIONS, hint, read_mapping, write_mapping
from llm_trainer.exceptions import ConfigurationError, FormatError

Content = dict[str, Any]
TRAINED_KINDS = ("bpe", "char")
"""What `DataConfig.tokenizer` may be besides a folder."""


def read_run(
    path: Path | None,
    *,
    output_dir: Path | None = None,
    resume: str | None = None,
    preset: str | None = None,
    train_file: str | None = None,
    changes: Iterable[str] = (),
) -> RunConfig:
    """Return the configuration of a run, with the folders of its output.

    Args:
        path: File of sections; None is an empty one.
        output_dir: Folder of the run, instead of the file's; `./output` where both have none.
        resume: Checkpoint to go on from, or `latest`.
        preset: Model, instead of the file's section.
        train_file: Text, instead of the file's.
        changes: `section.field=value`, the value in YAML; they come last.

    Raises:
        ConfigurationError: A key is unknown, a value impossible, or two do not fit together.
    """
    changes = list(changes)
    if path is None and preset is None and not changes:
        raise ConfigurationError("Give --config FILE, or --preset NAME with --train-file PATH.")
    content = {} if path is None else _read(path)
    model, training, data = (_section(content, name) for name in ("model", "training", "data"))
    if preset is not None:
        model.clear()
        model["preset"] = preset
    if train_file is not None:
        data["train_file"] = train_file
    for change in changes:
        _change(content, change)
    if output_dir is not None:
        training["output_dir"] = str(output_dir)
    elif training.get("output_dir") is None:
        training["output_dir"] = "output"
    if resume is not None:
        training["resume_from_checkpoint"] = resume
    training.setdefault("checkpoint_dir", _checkpoints(training["output_dir"]))
    # What the data section leaves open follows the model.
    shape = RunConfig.from_dict({"model": model}).model
    data.setdefault("max_length", shape.max_seq_len)
    data.setdefault("vocab_size", shape.vocab_size)
    run = RunConfig.from_dict(content)
    check_length(run.data, run.model)
    if run.data.tokenizer in TRAINED_KINDS:
        # It becomes the tokenizer's, which has no more than this.
        run.model = dataclasses.replace(run.model, vocab_size=run.data.vocab_size)
    return run


def save_run(run: RunConfig, path: Path) -> None:
    """Write a run's configuration so that `train --config` repeats it, also into another folder."""
    content = run.to_dict()
    training = content["training"]
    del training["resume_from_checkpoint"]
    if training["checkpoint_dir"] == _checkpoints(training["output_dir"]):
        del training["checkpoint_dir"]
    write_mapping(path, content, ConfigurationError)


def read_data(path: Path) -> tuple[DataConfig, bool]:
    """Return the data section of a run's file, or a file of data settings alone, and whether it says
    `max_length`.
    """
    content = _read(path)
    if content.keys() <= SECTIONS and content:
        content = _section(content, "data")
    return DataConfig.from_dict(content), "max_length" in content


def read_evaluation_text(path: Path | None, file: str | None) -> tuple[DataConfig, bool]:
    """Return what `evaluate` reads, and whether the length of its rows is asked for.

    Raises:
        ConfigurationError: There is none or two, or it cannot be read.
    """
    if (path is None) == (file is None):
        raise ConfigurationError("Give the text to evaluate on: either --dataset-config FILE or --file PATH.")
    if path is None:
        return DataConfig(validation_file=file, min_length=1), False
    return read_data(path)


def check_length(data: DataConfig, model: ModelConfig) -> None:
    """Refuse rows that are longer than the model reads.

    Raises:
        ConfigurationError: They are.
    """
    if data.max_length > model.max_seq_len:
        raise ConfigurationError(
            f"data.max_length ({data.max_length}) is more than model.max_seq_len ({model.max_seq_len}); "
            f"lower the one, as with data.max_length={model.max_seq_len}, or raise the other."
        )


def _read(path: Path) -> Content:
    try:
        return read_mapping(path, ConfigurationError)
    except FormatError as error:
        # A file of ours that is no JSON is damaged; one that was written by hand is wrong.
        raise ConfigurationError(str(error)) from error


def _checkpoints(output_dir: object) -> str:
    return str(Path(str(output_dir)) / "checkpoints")


def _section(content: Content, name: str) -> Content:
    section = content.setdefault(name, {})
    if section is None:
        # A heading with nothing under it.
        section = content[name] = {}
    if not isinstance(section, dict):
        raise ConfigurationError(
            f"The section {name!r} must hold fields, not a {type(section).__name__} ({shown(section)})."
        )
    return cast("Content", section)


def _change(content: Content, change: str) -> None:
    target, equals, text = change.partition("=")
    section, dot, name = target.strip().partition(".")
    if not (equals and dot and name):
        raise ConfigurationError(
            f"--set {change}: write SECTION.FIELD=VALUE, such as training.max_steps=100."
        )
    if section not in SECTIONS:
        raise ConfigurationError(f"--set {change}: {hint(section, sorted(SECTIONS))}")
    try:
        content[section][name] = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigurationError(f"--set {change}: the value is not valid YAML: {error}") from error
