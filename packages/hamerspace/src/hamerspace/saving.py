"""Saves an artifact under a name whose ending chooses the form."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from hamerspace.artifact import (
    MANIFEST,
    SIDECAR,
    Manifest,
    archive,
    list_files,
    manifest_from_dict,
    place_files,
    read_json,
    read_manifest,
    replacing,
)
from hamerspace.exceptions import UnsupportedError


def save_artifact(folder: Path, manifest: Manifest, path: Path) -> Path:
    """Copy an artifact to ``path``.

    A name without an ending is a folder, which every artifact can be. ``.pt`` is one file for every artifact:
    TorchScript where it is that, else a zip of the folder, which only `hamerspace.load` opens. Other endings
    (``.pt2``, ``.onnx``, ``.xml``, ``.tflite``, ``.so``, ...) are the runtime's own files, with a small
    ``<name>.hamerspace.json`` beside them that says what the model takes.

    Raises:
        UnsupportedError: the artifact cannot have this form; the message lists those that it can have.
        FileExistsError: ``path`` is a folder that hamerspace did not write, or a file that has to lie beside
            it, such as the weights of ``.xml``, would overwrite another.
    """
    ending = path.suffix.lower()
    if not ending or path.is_dir():
        return save_folder(folder, path)
    names = manifest.forms.get(ending)
    if names is None and ending == ".pt":
        archive(folder, path)
        return path
    if names is None:
        able = ", ".join(manifest.endings)
        raise UnsupportedError(
            f"{manifest.backend}/{manifest.technique} runs in {manifest.runtime} and cannot be saved as "
            f"{ending!r}; it can be {able} (.pt for hamerspace.load alone), or a folder (no ending)"
        )
    targets = [
        path.with_name(path.stem + Path(name).suffix) if place else path for place, name in enumerate(names)
    ]
    sidecar = path.with_name(path.name + SIDECAR)
    _check_beside(path, targets[1:])
    files: Mapping[str, tuple[int, str]] = {
        target.name: manifest.files[name] for name, target in zip(names, targets, strict=True)
    }
    alone = replace(
        manifest, main=path.name, files=files, forms={ending: tuple(target.name for target in targets)}
    )
    sources = {target: folder / name for name, target in zip(names, targets, strict=True)}
    place_files(sources, {sidecar: alone.to_dict()})
    return path


def check_target(path: Path) -> None:
    """Raise where it can be known before the work that a model cannot be saved here.

    Raises:
        FileExistsError: there are other things that would be lost.
        NotADirectoryError: it is to lie in what is no folder.
        PermissionError: the folder cannot be written to.
    """
    ending = path.suffix.lower()
    if path.is_dir() or not ending:
        check_free(path)
    if ending == ".xml":
        _check_beside(path, [path.with_suffix(".bin")])
    above = next(one for one in path.absolute().parents if one.exists())
    if not above.is_dir():
        raise NotADirectoryError(f"{above} is no folder, and {path} is to lie in it")
    try:
        # What rights say is not all: nothing can be written into some folders whoever asks.
        tempfile.TemporaryDirectory(prefix=".hamerspace-", dir=path if path.is_dir() else above).cleanup()
    except OSError as error:
        raise PermissionError(f"{above} cannot be written to, and {path} is to lie in it: {error}") from error


def _check_beside(path: Path, others: Sequence[Path]) -> None:
    sidecar = path.with_name(path.name + SIDECAR)
    ours = manifest_from_dict(read_json(sidecar), str(sidecar)) if sidecar.is_file() else None
    for other in others:
        if other.exists() and (ours is None or other.name not in ours.files):
            raise FileExistsError(f"{other} is there, and {path.name} needs this name; give another one")


def check_free(path: Path) -> None:
    """Raise unless a folder can be written here: there is nothing, or an artifact of hamerspace alone.

    Raises:
        FileExistsError: there are other things.
    """
    if path.exists() and not path.is_dir():
        raise FileExistsError(
            f"{path} is a file, and a model without an ending is a folder; give another name"
        )
    if path.is_dir() and any(path.iterdir()):
        known = set(read_manifest(path, verify=False).files) if (path / MANIFEST).is_file() else set[str]()
        if foreign := sorted(set(list_files(path)) - known):
            raise FileExistsError(
                f"{path} is a folder with other files in it ({', '.join(foreign[:3])}); give another name"
            )


def save_folder(folder: Path, path: Path) -> Path:
    """Copy an artifact's folder.

    Raises:
        FileExistsError: ``path`` is a file, or a folder with other things in it.
    """
    path = path.resolve()
    check_free(path)
    read_manifest(folder)
    if path.is_dir() and not any(path.iterdir()):
        # It may be where something is mounted, which nothing can be put in the place of.
        _fill(folder, path)
        return path
    with replacing(path) as temporary:
        temporary.mkdir()
        mode = temporary.stat().st_mode
        shutil.copytree(folder, temporary, dirs_exist_ok=True)
        temporary.chmod(mode)  # and not that of a private folder
    return path


def _fill(folder: Path, empty: Path) -> None:
    """Copy an artifact into an empty folder, the manifest last; what fails leaves it empty."""
    try:
        for one in sorted(folder.iterdir(), key=lambda one: one.name == MANIFEST):
            if one.is_dir():
                shutil.copytree(one, empty / one.name)
            else:
                shutil.copyfile(one, empty / one.name)
    except BaseException:
        for one in empty.iterdir():
            shutil.rmtree(one) if one.is_dir() else one.unlink()
        raise
