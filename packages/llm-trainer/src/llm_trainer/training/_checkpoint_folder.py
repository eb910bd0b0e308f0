"""Folders of files that are whole or not there: written aside, verified, renamed, and found again.

A checkpoint is a folder `checkpoint-<step>` with a `manifest.json`, which is written last and holds the size
and SHA-256 of every other file, and its own.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from llm_trainer._files import check_version, shown, sync_folder
from llm_trainer.exceptions import CheckpointError, FormatError

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
_NAME = re.compile(r"checkpoint-\d+(?:-[0-9a-f]{8})?")
_UNFINISHED = re.compile(r"\.checkpoint-\d+\.[0-9a-f]+\.(?:tmp|old)")


@dataclass(frozen=True)
class CheckpointInfo:
    """What the manifest of a verified checkpoint says."""

    path: Path
    """Its folder."""
    step: int
    """Steps taken when it was written."""
    run_id: str
    """The run that wrote it; resuming keeps it."""
    serial: int
    """Larger than that of any checkpoint that was in the folder when it was written."""


def write_checkpoint(
    parent: Path, step: int, run_id: str, write: Callable[[Path], None], keep: int | None
) -> CheckpointInfo:
    """Write a checkpoint, and only when it is on disk and verified, remove those beyond `keep`.

    Args:
        parent: Folder of the checkpoints, made if it is missing.
        step: Steps taken.
        run_id: Checkpoints of other runs are never removed.
        write: Called with an empty folder to write files into.
        keep: How many of this run's newest are kept, this one included; None keeps all.

    Raises:
        OSError: It cannot be written; what was there before is still there.
        CheckpointError: What was read back is not what was written.
    """
    parent.mkdir(parents=True, exist_ok=True)
    target = parent / f"checkpoint-{step}"
    temporary = parent / f".checkpoint-{step}.{secrets.token_hex(4)}.tmp"
    # The manifests are believed here without their files' hashes: it is about an order, not about content.
    serial = 1 + max((info.serial for info in _manifests(parent)), default=0)
    temporary.mkdir()
    try:
        write(temporary)
        content: dict[str, Any] = {
            "format": "llm-trainer-checkpoint",
            "version": FORMAT_VERSION,
            "step": step,
            "run_id": run_id,
            "serial": serial,
            "files": {path.name: _describe(path) for path in sorted(temporary.iterdir())},
        }
        (temporary / MANIFEST).write_bytes(_manifest_bytes(content))
        _sync(temporary)
        verify_checkpoint(temporary)
        _put(temporary, target, parent, run_id)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    if keep is not None:
        own = [info for info in _manifests(parent) if info.run_id == run_id]
        for info in sorted(own, key=lambda info: info.serial)[:-keep]:
            _remove(info.path)
    return CheckpointInfo(target, step, run_id, serial)


def verify_checkpoint(path: Path) -> CheckpointInfo:
    """Compare every file of a checkpoint with its manifest.

    Raises:
        CheckpointError: A file is missing, truncated or altered; the first one is named.
    """
    info, files = _read_manifest(path)
    for name, expected in files.items():
        file = path / name
        try:
            size = file.stat().st_size
            if size != expected["bytes"]:
                raise CheckpointError(f"{file} has {size} bytes; it was written with {expected['bytes']}.")
            if sha256_of(file) != expected["sha256"]:
                raise CheckpointError(f"{file} was altered: its SHA-256 is another one than when written.")
        except FileNotFoundError:
            raise CheckpointError(f"{file} is missing.") from None
        except OSError as error:
            raise CheckpointError(f"{file} cannot be read: {error.strerror}.") from error
    return info


def newest_checkpoint(parent: Path) -> tuple[CheckpointInfo | None, list[str]]:
    """Return the newest checkpoint that verifies, and why newer ones were passed over.

    What a killed process left half written is not a checkpoint and is not spoken of.
    """
    passed: list[str] = []
    believed: list[tuple[int, Path]] = []
    for path in _checkpoint_folders(parent):
        try:
            believed.append((_read_manifest(path)[0].serial, path))
        except CheckpointError as error:
            passed.append(str(error))
    for _, path in sorted(believed, reverse=True):
        try:
            return verify_checkpoint(path), passed
        except CheckpointError as error:
            passed.append(str(error))
    return None, passed


def remove_unfinished(parent: Path) -> None:
    """Remove what a killed process left half written or half removed; nobody else may be writing."""
    if parent.is_dir():
        for path in parent.iterdir():
            if _UNFINISHED.fullmatch(path.name) and path.is_dir():
                shutil.rmtree(path, ignore_errors=True)


def _put(temporary: Path, target: Path, parent: Path, run_id: str) -> None:
    """Give a verified folder its name. One that has it already makes room by a longer name, which it keeps
    unless it is of the same run.
    """
    before = parent / f"{target.name}-{secrets.token_hex(4)}"
    if target.exists():
        target.rename(before)
    temporary.rename(target)
    sync_folder(parent)
    if any(info.path == before and info.run_id == run_id for info in _manifests(parent)):
        _remove(before)


def _remove(path: Path) -> None:
    """Remove a checkpoint so that a process killed in the middle leaves none that looks like one."""
    aside = path.parent / f".checkpoint-0.{secrets.token_hex(4)}.old"
    path.rename(aside)
    shutil.rmtree(aside, ignore_errors=True)


def _checkpoint_folders(parent: Path) -> Iterator[Path]:
    if parent.is_dir():
        for path in sorted(parent.iterdir()):
            if _NAME.fullmatch(path.name) and path.is_dir():
                yield path


def _manifests(parent: Path) -> Iterator[CheckpointInfo]:
    for path in _checkpoint_folders(parent):
        try:
            yield _read_manifest(path)[0]
        except CheckpointError:
            continue


def _manifest_bytes(content: dict[str, Any]) -> bytes:
    body = json.dumps(content, indent=1, sort_keys=True)
    return json.dumps(
        {**content, "sha256": hashlib.sha256(body.encode()).hexdigest()}, indent=1, sort_keys=True
    ).encode()


def _read_manifest(path: Path) -> tuple[CheckpointInfo, dict[str, dict[str, Any]]]:
    file = path / MANIFEST
    try:
        data = file.read_bytes()
        content: object = json.loads(data)
    except FileNotFoundError:
        raise CheckpointError(
            f"{file} is missing: {path} is not a checkpoint, or was not finished."
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{file} is damaged: {error}.") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{file} is damaged: it holds a {type(content).__name__}.")
    found = cast("dict[str, Any]", content)
    found.pop("sha256", None)
    # Byte for byte, so that no flipped bit passes.
    if data != _manifest_bytes(found):
        raise CheckpointError(f"{file} was altered: its SHA-256 is another one than when written.")
    if found.get("format") != "llm-trainer-checkpoint":
        raise CheckpointError(f"{file} is not the manifest of a checkpoint.")
    try:
        check_version(file, found.get("version"), FORMAT_VERSION)
    except FormatError as error:
        raise CheckpointError(str(error)) from None
    try:
        files = {
            str(name): {"bytes": int(entry["bytes"]), "sha256": str(entry["sha256"])}
            for name, entry in found["files"].items()
        }
        info = CheckpointInfo(path, int(found["step"]), str(found["run_id"]), int(found["serial"]))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{file} is not the manifest of a checkpoint: {shown(error)}.") from error
    for name in files:
        if Path(name).name != name or name in {"", ".", ".."}:
            raise CheckpointError(f"{file} names a file outside of its folder: {shown(name)}.")
    return info, files


def _describe(path: Path) -> dict[str, Any]:
    return {"bytes": path.stat().st_size, "sha256": sha256_of(path)}


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(folder: Path) -> None:
    """Have a folder and its files on disk."""
    for path in folder.iterdir():
        with path.open("rb+") as file:
            os.fsync(file.fileno())
    sync_folder(folder)
