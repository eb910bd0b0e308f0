"""Opens what was saved, in whatever runtime, as one callable."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

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
    options = RunOptions(
        device="cuda" if device == "gpu" else device, threads=threads, allow_native=allow_native
    )
    saved = find(Path(path))
    return saved.as_model(options)


@dataclass(frozen=True)
class Saved:
    """A model that hamerspace saved, found on disk, with its files checked."""

    manifest: Manifest
    folder: Path
    owner: object = None
    """What has to live as long as the files are read."""

    def open(self, options: RunOptions) -> Runner:
        """Open it as a `Runner`."""
        from hamerspace.backends import get_backend

        try:
            backend = get_backend(self.manifest.backend)
        except ValueError as error:
            raise BackendUnavailableError(
                f"{self.folder / MANIFEST} was made by backend {self.manifest.backend!r}, which no installed "
                "package offers"
            ) from error
        backend.require()
        return backend.open(self.manifest, self.folder, options)

    def as_model(self, options: RunOptions, owner: object = None) -> LoadedModel:
        """Open it as one callable; ``owner`` lives as long as that does."""
        runner = self.open(options)
        kept = (runner, self.owner, owner)
        return LoadedModel(runner.run, runner.inputs, runner.outputs, self.manifest.structure, None, kept)


def is_saved(path: Path) -> bool:
    """Whether a path is a model that hamerspace saved, whatever state its files are in."""
    if path.is_dir():
        return (path / MANIFEST).is_file()
    return path.is_file() and (is_archive(path) or _sidecar(path).is_file())


def find(path: Path) -> Saved:
    """Find what hamerspace saved: a folder, an archive of one, or a file with its manifest beside it.

    Raises:
        ModelNotFoundError: there is no such file or folder.
        ArtifactError: it is damaged, was not saved by hamerspace, or by a newer version.
    """
    if not path.exists():
        raise ModelNotFoundError(f"there is no model at {path}")
    if path.is_dir():
        return Saved(read_manifest(path), path)
    if is_archive(path):
        room = Room()
        unpack(path, room.path)
        return Saved(read_manifest(room.path), room.path, room)
    if (damage := cut_archive(path)) is not None:
        raise ArtifactError(damage)
    sidecar = _sidecar(path)
    if not sidecar.is_file():
        raise ArtifactError(
            f"{path} has no {sidecar.name} beside it, which says what the model takes; give a folder or "
            "file that hamerspace saved, with all files that were written"
        )
    manifest = manifest_from_dict(read_json(sidecar), str(sidecar))
    if manifest.main != path.name:
        raise ArtifactError(f"{sidecar} is of {manifest.main!r}, not of {path.name!r}: files were renamed")
    check_files(path.parent, manifest.files, str(sidecar))
    return Saved(manifest, path.parent)


def _sidecar(path: Path) -> Path:
    return path.with_name(path.name + SIDECAR)
