"""JSON that was written by somebody else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

from auto_round._files import shown
from auto_round.exceptions import CheckpointError

MOST_BYTES = 100_000_000
"""Longest header or index that is read; the safetensors format sets it for its headers."""


def parse_object(data: bytes, path: Path, what: str) -> dict[str, Any]:
    """Parse one JSON object in which no key comes twice.

    Raises:
        CheckpointError: It is none; `path` and `what` are named.
    """
    try:
        value: object = json.loads(data.decode("utf-8"), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: {what} is not valid JSON: {error}. The file is damaged.") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: {what} must be a JSON object, but is a {type(value).__name__}.")
    return cast("dict[str, Any]", value)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        seen: set[str] = set()
        for name, _ in pairs:
            if name in seen:
                raise ValueError(f"the name {shown(name)} comes twice")
            seen.add(name)
    return result
