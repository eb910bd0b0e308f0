"""What a result was made with, so that it can be made again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Final, cast

from hamerspace._checks import number, positive_integer
from hamerspace.artifact import digest_of, read_json, write_json
from hamerspace.core.constraints import MIN_COSINE, Constraints
from hamerspace.core.goals import OptimizationGoal, goal_of
from hamerspace.exceptions import ArtifactError, ConstraintError, ModelNotFoundError
from hamerspace.models.info import ModelInfo

FORMAT: Final = 1


@dataclass(frozen=True, kw_only=True)
class OptimizationConfig:
    """An optimisation that was done: of which model, for what, and by which recipe."""

    goal: OptimizationGoal
    constraints: Constraints
    model: ModelInfo
    model_hash: str | None = None
    """SHA-256 of the model's file, or of the list of its files; None of a live model."""
    backend: str | None = None
    """Of the chosen recipe."""
    technique: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict[str, Any])
    preferred_backends: tuple[str, ...] = ()
    calibrated: bool = False
    """Whether the recipe took calibration data, which is needed again."""
    threads: int = 1
    rounds: int = 9
    """That the original and a candidate ran in turn."""
    time_limit_s: float | None = None
    """Of each step, as the caller gave it."""
    memory_limit_mb: float | None = None
    """Of each process, in MB of 2**20 bytes."""
    min_cosine: float = MIN_COSINE
    """What counted as faithful."""
    seed: int = 0
    versions: Mapping[str, str] = field(default_factory=dict[str, str])

    def __post_init__(self) -> None:
        for name in ("threads", "rounds"):
            positive_integer(name, getattr(self, name))
        for name in ("time_limit_s", "memory_limit_mb", "min_cosine"):
            if (value := getattr(self, name)) is not None or name == "min_cosine":
                number(name, value, lambda _: True, "it is a number")
        if not all(one is None or isinstance(one, str) for one in (self.backend, self.technique)):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise ConstraintError(f"the recipe is {self.backend!r}/{self.technique!r}; names are wanted")
        if not isinstance(self.options, Mapping):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise ConstraintError(f"options is {self.options!r}; options by name are wanted")

    def to_dict(self) -> dict[str, Any]:
        """Return plain data."""
        return {
            "format": FORMAT,
            **asdict(self),
            "goal": self.goal.value,
            "options": dict(self.options),
            "versions": dict(self.versions),
        }

    def save(self, path: str | Path) -> Path:
        """Write it as JSON."""
        target = Path(path)
        write_json(target, self.to_dict())
        return target

    @classmethod
    def load(cls, path: str | Path) -> OptimizationConfig:
        """Read what `save` wrote.

        Raises:
            ModelNotFoundError: there is no such file.
            ArtifactError: it is no configuration, or one of a newer format.
        """
        where = Path(path)
        if not where.is_file():
            raise ModelNotFoundError(f"there is no configuration at {where}")
        return config_from_dict(read_json(where), str(where))


def config_from_dict(data: Any, where: str) -> OptimizationConfig:
    """Read what `OptimizationConfig.to_dict` gave.

    Raises:
        ArtifactError: it is none, damaged, or of a newer format.
    """
    if not isinstance(data, dict) or data.get("format") != FORMAT:  # pyright: ignore[reportUnknownMemberType]
        raise ArtifactError(f"{where} is no configuration of hamerspace of the format {FORMAT}")
    entries = cast("Any", data)
    given: dict[str, Any] = {str(name): value for name, value in entries.items() if name != "format"}
    if unknown := sorted(set(given) - {one.name for one in fields(OptimizationConfig)}):
        raise ArtifactError(f"{where} has unknown entries {unknown}")
    try:
        given["goal"] = goal_of(given["goal"])
        given["constraints"] = Constraints.from_dict(given["constraints"])
        given["model"] = ModelInfo.from_dict(given["model"])
        given["preferred_backends"] = tuple(given["preferred_backends"])
        return OptimizationConfig(**given)
    except (KeyError, TypeError, AttributeError, ConstraintError) as error:
        raise ArtifactError(f"{where} is damaged: {error}") from error


def hash_of(path: str | None) -> str | None:
    """SHA-256 of a model's file, or of the names and hashes of a folder's files."""
    import hashlib

    if path is None or not Path(path).exists():
        return None
    where = Path(path)
    if where.is_file():
        return digest_of(where)
    whole = hashlib.sha256()
    for one in sorted(where.rglob("*")):
        if one.is_file():
            whole.update(f"{one.relative_to(where).as_posix()} {digest_of(one)}\n".encode())
    return whole.hexdigest()
