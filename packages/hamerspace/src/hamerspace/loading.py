"""Opens what was saved, in whatever runtime, as one callable."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hamerspace._rooms import Room
from hamerspace.artifact import (
    MANIFEST,
    SIDECAR,
    Manifest,
    check_files,
    cut_archive,
    is_archive,
    manifest_from_dict,
    read_json,
    read_manifest,
    unpack,
)
from hamerspace.exceptions import ArtifactError, BackendUnavailableError, ModelNotFoundError
from hamerspace.runtimes.base import Runner, RunOptions
from hamerspace.runtimes.callable import LoadedModel


def load(
    path: str | Path, *, device: str = "cpu", threads: int | None = None, allow_native: bool = False
) -> LoadedModel:
    """Open a model that hamerspace saved, in whatever runtime it runs.

    Args:
        path: an artifact's folder, or a file that `OptimizationResult.save_model` wrote.
        device: ``cpu``, or ``gpu`` (the same as ``cuda``).
        threads: of the runtime; None leaves that to the runtime.
        allow_native: open a compiled model (``.so``, AOTInductor's ``.pt2``) that was built elsewhere or by
            another user. It is native code, which does what whoever made it wanted.

    Returns:
        One callable with named `inputs` and `outputs`; see `LoadedModel`.

    Files are checked against the hashes that were saved with them. Nothing is unpickled; TorchScript,
    exported programs and graphs run in their runtimes. Compiled models open without asking where this user
    has built them, which a seal in the manifest shows.

    Raises:
        ConstraintError: there is no such device, or ``threads`` is no number of them.
        ModelNotFoundError: there is no such file or folder.
        UnsafeModelError: it is native code that was built elsewhere, and ``allow_native`` was not said.
        ArtifactError: it is damaged, was not saved by hamerspace, or by a newer version.
        ImportError: the runtime is not installed; the message says what installs it.
    """
    where = Path(path)
    options = RunOptions(
        device="cuda" if device == "gpu" else device, threads=threads, allow_native=allow_native
    )
    if not where.exists():
        raise ModelNotFoundError(f"there is no model at {where}")
    if where.is_dir():
        return open_folder(where, options)
    if is_archive(where):
        room = Room()
        unpack(where, room.path)
        return open_folder(room.path, options, owner=room)
    if (damage := cut_archive(where)) is not None:
        raise ArtifactError(damage)
    sidecar = where.with_name(where.name + SIDECAR)
    if not sidecar.is_file():
        raise ArtifactError(
            f"{where} has no {sidecar.name} beside it, which says what the model takes; give a folder or "
            "file that hamerspace saved, with all files that were written"
        )
    manifest = manifest_from_dict(read_json(sidecar), str(sidecar))
    if manifest.main != where.name:
        raise ArtifactError(f"{sidecar} is of {manifest.main!r}, not of {where.name!r}: files were renamed")
    check_files(where.parent, manifest.files, str(sidecar))
    return _as_model(_open(manifest, where.parent, options), manifest, None)


def open_folder(folder: Path, options: RunOptions, owner: Any = None) -> LoadedModel:
    """Open an artifact's folder as one callable; ``owner`` lives as long as that does."""
    manifest = read_manifest(folder)
    return _as_model(_open(manifest, folder, options), manifest, owner)


def open_runner(folder: Path, options: RunOptions) -> Runner:
    """Open an artifact's folder as a `Runner`."""
    return _open(read_manifest(folder), folder, options)


def _open(manifest: Manifest, folder: Path, options: RunOptions) -> Runner:
    from hamerspace.backends import get_backend

    try:
        backend = get_backend(manifest.backend)
    except ValueError as error:
        raise BackendUnavailableError(
            f"{folder / MANIFEST} was made by backend {manifest.backend!r}, which no installed package offers"
        ) from error
    backend.require()
    return backend.open(manifest, folder, options)


def _as_model(runner: Runner, manifest: Manifest, owner: Any) -> LoadedModel:
    return LoadedModel(runner.run, runner.inputs, runner.outputs, manifest.structure, None, (runner, owner))
