"""Saved models: a folder with the runtime's own files and ``hamerspace.json``, which says what they are.

The manifest names every file with its size and hash. A reader takes what it names only if it lies in the
folder and both agree, refuses a manifest of a newer format, and executes nothing that the manifest names.
That finds damage; against someone who writes the manifest too, it is the readers of models that are careful.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, Final, cast, get_args

from hamerspace.exceptions import ArtifactError
from hamerspace.models.info import Structure, TensorSpec, spec_from_dict

MANIFEST: Final = "hamerspace.json"
SIDECAR: Final = ".hamerspace.json"
"""What stands beside a model that was saved as single files, after the model's name."""
FORMAT: Final = 1
_TEXT_LIMIT: Final = 16 << 20


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What an artifact is, and how it is run."""

    backend: str
    """Name of the backend that made it."""
    technique: str
    runtime: str
    """Which runtime opens it, such as ``onnxruntime``."""
    main: str
    """The file that the runtime opens, relative to the folder; ``.`` for the folder itself."""
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    structure: Structure = "tensor"
    options: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """What the runtime is told, as plain data."""
    forms: Mapping[str, tuple[str, ...]] = field(default_factory=dict[str, tuple[str, ...]])
    """Endings under which the model can stand alone, and the files it is then made of, the main one first."""
    versions: Mapping[str, str] = field(default_factory=dict[str, str])
    files: Mapping[str, tuple[int, str]] = field(default_factory=dict[str, tuple[int, str]])
    """Size in bytes and SHA-256 of each file."""
    seal: str | None = None
    """Of a main file that is native code: who built it; see `hamerspace._trust`."""

    @property
    def size_bytes(self) -> int:
        """Of all files, without the manifest."""
        return sum(size for size, _ in self.files.values())

    @property
    def endings(self) -> tuple[str, ...]:
        """Under which it can be saved; a name without an ending is a folder."""
        return tuple(sorted({*self.forms, ".pt"}))

    def to_dict(self) -> dict[str, Any]:
        """Return plain data."""
        return {"format": FORMAT, **asdict(self)}


def manifest_from_dict(data: Any, where: str) -> Manifest:
    """Read a manifest.

    Raises:
        ArtifactError: it is no manifest, or one of a newer format.
    """
    if not isinstance(data, dict) or "format" not in data:
        raise ArtifactError(f"{where} is no manifest of hamerspace")
    if data["format"] != FORMAT:
        raise ArtifactError(
            f"{where} has the format {data['format']!r}, and this version reads {FORMAT}; "
            "install a newer hamerspace"
        )
    entries = cast("Any", data)
    try:
        known: dict[str, Any] = {name: value for name, value in entries.items() if name != "format"}
        for key in ("inputs", "outputs"):
            known[key] = tuple(spec_from_dict(one) for one in known[key])
        known["forms"] = {str(ending): tuple(files) for ending, files in known["forms"].items()}
        known["files"] = {
            str(name): (int(size), str(digest)) for name, (size, digest) in known["files"].items()
        }
        found = Manifest(**known)
        _check_kinds(found)
    except (AttributeError, KeyError, OverflowError, TypeError, ValueError) as error:
        raise ArtifactError(f"{where} is damaged: {error}") from error
    for name in (*found.files, *(() if found.main == "." else (found.main,))):
        inside(Path(), name, where)
    needed = {name for form in found.forms.values() for name in form} | {found.main}
    folders = {parent.as_posix() for name in found.files for parent in PurePosixPath(name).parents}
    if not needed <= set(found.files) | folders:
        raise ArtifactError(f"{where} is damaged: it does not name all files of the model")
    return found


def _check_kinds(found: Manifest) -> None:
    """Raise TypeError unless entries that are no inputs, outputs, forms or files are of their kinds."""
    texts = (found.backend, found.technique, found.runtime, found.main)
    texts += () if found.seal is None else (found.seal,)
    texts += (*found.versions.values(), *(name for form in found.forms.values() for name in form))
    if not all(isinstance(one, str) for one in texts):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError("a name in it is no text")
    if not isinstance(found.options, dict) or not all(found.forms.values()):
        raise TypeError("its options or forms are none")
    if found.structure not in get_args(Structure):
        raise TypeError(f"its structure is {found.structure!r}")


def inside(folder: Path, name: str, where: str) -> Path:
    """Return the path of a file in the folder.

    Raises:
        ArtifactError: the name leads out of the folder.
    """
    parts = PurePosixPath(name).parts
    if not parts or name.startswith("/") or ".." in parts or "\0" in name or "\\" in name:
        raise ArtifactError(f"{where} names {name!r}, which leads out of its folder")
    return folder.joinpath(*parts)


def digest_of(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def list_files(folder: Path) -> dict[str, tuple[int, str]]:
    """Size and hash of each file in a folder, but for the manifest."""
    return {
        path.relative_to(folder).as_posix(): (path.stat().st_size, digest_of(path))
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.relative_to(folder).as_posix() != MANIFEST
    }


def write_json(path: Path, data: Any) -> None:
    """Write JSON under a temporary name, sync it, and give it its name."""
    text = _as_json(data)
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def _as_json(data: Any) -> str:
    return json.dumps(data, indent=1, ensure_ascii=False) + "\n"


class replacing:
    """Write a file or folder under a temporary name beside it; on success it gets its name, else it goes."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __enter__(self) -> Path:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._room = Path(tempfile.mkdtemp(prefix=f".{self._path.name[:64]}.", dir=self._path.parent))
        return self._room / self._path.name

    def __exit__(self, kind: object, *_: object) -> None:
        made = self._room / self._path.name
        try:
            if kind is None:
                for path in made.rglob("*") if made.is_dir() else [made]:
                    if path.is_file():
                        _sync(path)
                old = self._room.with_name(self._room.name + ".old")
                if made.is_dir() and self._path.is_dir():
                    self._path.rename(old)
                try:
                    made.replace(self._path)
                except BaseException:
                    if old.is_dir():
                        old.rename(self._path)
                    raise
                shutil.rmtree(old, ignore_errors=True)
        finally:
            shutil.rmtree(self._room, ignore_errors=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_json(path: Path) -> Any:
    """Read JSON that somebody may have damaged.

    Raises:
        ArtifactError: it is none.
    """
    if path.stat().st_size > _TEXT_LIMIT:
        raise ArtifactError(f"{path} is too large for JSON of hamerspace")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"{path} is no JSON: {error}") from error


def read_manifest(folder: Path, *, verify: bool = True) -> Manifest:
    """Read the manifest of an artifact's folder, and check each file against it.

    Raises:
        ArtifactError: the manifest or a file is missing or damaged.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise ArtifactError(f"{folder} has no {MANIFEST}; give a folder or file that hamerspace saved")
    found = manifest_from_dict(read_json(path), str(path))
    if verify:
        check_files(folder, found.files, str(path))
    return found


def check_files(folder: Path, files: Mapping[str, tuple[int, str]], where: str) -> None:
    """Check sizes and hashes of files.

    Raises:
        ArtifactError: a file is missing, or is not the one that was saved.
    """
    for name, (size, digest) in files.items():
        path = inside(folder, name, where)
        if not path.is_file():
            raise ArtifactError(f"{path} is missing; {where} names it")
        if path.stat().st_size != size or digest_of(path) != digest:
            raise ArtifactError(f"{path} is damaged or was changed: {where} has another size or hash of it")


def archive(folder: Path, path: Path) -> None:
    """Write an artifact's folder as one zip file, uncompressed."""
    with replacing(path) as temporary, zipfile.ZipFile(temporary, "w", allowZip64=True) as target:
        for file in sorted(folder.rglob("*")):
            if file.is_file():
                target.write(file, file.relative_to(folder).as_posix())


def is_archive(path: Path) -> bool:
    """Whether a file is what `archive` writes."""
    try:
        with zipfile.ZipFile(path) as source:
            return MANIFEST in source.namelist()
    except (OSError, zipfile.BadZipFile):
        return False


def cut_archive(path: Path) -> str | None:
    """Say so where a file begins as a zip archive and is none, as one that was not copied to its end."""
    with path.open("rb") as file:
        begins = file.read(4) == b"PK\x03\x04"
    if begins and not zipfile.is_zipfile(path):
        return f"{path} is damaged: it begins as an archive and has no end"
    return None


def unpack(path: Path, folder: Path) -> None:
    """Unpack what `archive` wrote into an empty folder: the files that the manifest names, and no others.

    Raises:
        ArtifactError: the file is damaged.
    """
    try:
        with zipfile.ZipFile(path) as source:
            if source.getinfo(MANIFEST).file_size > _TEXT_LIMIT:
                raise ArtifactError(f"{path} is damaged: its manifest is too large")
            manifest = manifest_from_dict(json.loads(source.read(MANIFEST)), f"{path}:{MANIFEST}")
            for name, (size, _) in manifest.files.items():
                if source.getinfo(name).file_size != size:
                    raise ArtifactError(f"{path} is damaged: {name} has another size than it should")
                target = inside(folder, name, str(path))
                target.parent.mkdir(parents=True, exist_ok=True)
                with source.open(name) as packed, target.open("wb") as file:
                    shutil.copyfileobj(packed, file)
            write_json(folder / MANIFEST, manifest.to_dict())
    except (OSError, KeyError, ValueError, RuntimeError, zlib.error, zipfile.BadZipFile) as error:
        if isinstance(error, ArtifactError):
            raise
        raise ArtifactError(f"{path} is damaged: {error}") from error


def place_files(sources: Mapping[Path, Path], texts: Mapping[Path, Any]) -> None:
    """Copy files and write JSON, all into one folder: all of them get their names once all are written.

    Args:
        sources: what is copied, by the name that it gets.
        texts: what is written as JSON, by the name that it gets.
    """
    (folder,) = {target.parent for target in (*sources, *texts)}
    folder.mkdir(parents=True, exist_ok=True)
    room = Path(tempfile.mkdtemp(prefix=".saving-", dir=folder))
    try:
        for target, source in sources.items():
            shutil.copyfile(source, room / target.name)
        for target, data in texts.items():
            (room / target.name).write_text(_as_json(data), encoding="utf-8")
        for target in (*sources, *texts):
            _sync(room / target.name)
        for target in (*sources, *texts):
            (room / target.name).replace(target)
    finally:
        shutil.rmtree(room, ignore_errors=True)
