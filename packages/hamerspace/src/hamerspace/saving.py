"""Saves an artifact under a name whose ending chooses the form."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from hamerspace.artifact import (
    MANIFEST,
    SIDECAR,
    Manifest,
    archive,
    copy_files,
    list_files,
    manifest_from_dict,
    read_json,
    read_manifest,
    replacing,
    write_json,
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
        able = ", ".join(sorted({*manifest.forms, ".pt"}))
        raise UnsupportedError(
            f"{manifest.backend}/{manifest.technique} runs in {manifest.runtime} and cannot be saved as "
            f"{ending!r}; it can be {able} (.pt for hamerspace.load alone), or a folder (no ending)"
        )
    targets = [
        path.with_name(path.stem + Path(name).suffix) if place else path for place, name in enumerate(names)
    ]
    sidecar = path.with_name(path.name + SIDECAR)
    ours = manifest_from_dict(read_json(sidecar), str(sidecar)) if sidecar.is_file() else None
    for beside in targets[1:]:
        if beside.exists() and (ours is None or beside.name not in ours.files):
            raise FileExistsError(f"{beside} is there, and {path.name} needs this name; give another one")
    copy_files(folder, names, targets)
    files: Mapping[str, tuple[int, str]] = {
        target.name: manifest.files[name] for name, target in zip(names, targets, strict=True)
    }
    alone = replace(
        manifest, main=path.name, files=files, forms={ending: tuple(target.name for target in targets)}
    )
    write_json(sidecar, alone.to_dict())
    return path


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
    check_free(path)
    read_manifest(folder)
    with replacing(path) as temporary:
        temporary.mkdir()
        mode = temporary.stat().st_mode
        shutil.copytree(folder, temporary, dirs_exist_ok=True)
        temporary.chmod(mode)  # and not that of a private folder
    return path
