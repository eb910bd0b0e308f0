import errno
import json
import shutil
import tempfile
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hamerspace import TensorSpec
from hamerspace.artifact import (
    MANIFEST,
    SIDECAR,
    Manifest,
    archive,
    inside,
    is_archive,
    list_files,
    manifest_from_dict,
    read_manifest,
    replacing,
    unpack,
    write_json,
)
from hamerspace.exceptions import ArtifactError, UnsupportedError
from hamerspace.saving import save_artifact
from hypothesis import given
from hypothesis import strategies as st


def made(folder: Path) -> Manifest:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model.xml").write_text("graph")
    (folder / "model.bin").write_bytes(b"weights")
    manifest = Manifest(
        backend="openvino",
        technique="int8",
        runtime="openvino",
        main="model.xml",
        inputs=(TensorSpec(name="x", dtype="float32", shape=("batch", 3)),),
        outputs=(TensorSpec(name="y", dtype="float32", shape=("batch", 1)),),
        forms={".xml": ("model.xml", "model.bin")},
        files=list_files(folder),
    )
    write_json(folder / MANIFEST, manifest.to_dict())
    return manifest


def made_entries() -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        return json.loads(json.dumps(made(Path(folder)).to_dict()))


def test_a_manifest_and_back(tmp_path: Path) -> None:
    manifest = made(tmp_path)
    assert read_manifest(tmp_path) == manifest
    assert manifest.size_bytes == len("graph") + len(b"weights")


def test_changed_and_missing_files_are_named(tmp_path: Path) -> None:
    made(tmp_path)
    (tmp_path / "model.bin").write_bytes(b"WEIGHTS")
    with pytest.raises(ArtifactError, match=r"model\.bin is damaged"):
        read_manifest(tmp_path)
    (tmp_path / "model.bin").unlink()
    with pytest.raises(ArtifactError, match=r"model\.bin is missing"):
        read_manifest(tmp_path)


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "a/../../x", "a\\..\\x", "", "a\0b"])
def test_no_name_leads_out_of_the_folder(name: str) -> None:
    with pytest.raises(ArtifactError, match="out of its folder"):
        inside(Path("/somewhere"), name, "the manifest")


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(),
        lambda x: st.lists(x) | st.dictionaries(st.text(), x),
    )
)
def test_whatever_json_says_is_refused_cleanly(data: object) -> None:
    with pytest.raises(ArtifactError):
        manifest_from_dict(data, "here")


def test_damaged_manifests(tmp_path: Path) -> None:
    manifest = made(tmp_path).to_dict()
    with pytest.raises(ArtifactError, match="newer"):
        manifest_from_dict({**manifest, "format": 2}, "here")
    with pytest.raises(ArtifactError, match="damaged"):
        manifest_from_dict({**manifest, "files": 3}, "here")
    with pytest.raises(ArtifactError, match="out of its folder"):
        manifest_from_dict({**manifest, "main": "../model.xml"}, "here")
    (tmp_path / MANIFEST).write_text("{")
    with pytest.raises(ArtifactError, match="no JSON"):
        read_manifest(tmp_path)
    (tmp_path / MANIFEST).unlink()
    with pytest.raises(ArtifactError, match=MANIFEST):
        read_manifest(tmp_path)


@pytest.mark.parametrize("key", [one for one in made_entries() if one != "format"])
@given(
    value=st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text()
    | st.lists(st.text() | st.none())
)
def test_an_entry_of_another_kind_is_damage(key: str, value: object) -> None:
    entries = {**made_entries(), key: value}
    try:
        found = manifest_from_dict(entries, "it")
    except ArtifactError:
        return
    # What is let through is of the right kind, and means something.
    assert isinstance(value, (str, list)) or (key == "seal" and value is None)
    assert manifest_from_dict(json.loads(json.dumps(found.to_dict())), "it") == found


@pytest.mark.parametrize(
    "change",
    [
        {"dtype": "bogus"}, {"dtype": "object"}, {"dtype": 3}, {"shape": [1.5]}, {"shape": [True]},
        {"shape": [None]}, {"shape": [0]}, {"shape": 3}, {"name": 3}, {"high": "5"}, {"high": 0}, {"more": 1},
    ],
)  # fmt: skip
def test_an_input_of_another_kind_is_damage(change: dict[str, object]) -> None:
    entries = made_entries()
    entries["inputs"] = [{**entries["inputs"][0], **change}]
    with pytest.raises(ArtifactError, match="damaged"):
        manifest_from_dict(entries, "it")


def test_the_ending_chooses_the_form(tmp_path: Path) -> None:
    manifest = made(tmp_path / "made")
    save_artifact(tmp_path / "made", manifest, tmp_path / "small.xml")
    assert (tmp_path / "small.bin").read_bytes() == b"weights"
    beside = json.loads((tmp_path / f"small.xml{SIDECAR}").read_text())
    assert (beside["main"], set(beside["files"])) == ("small.xml", {"small.xml", "small.bin"})
    save_artifact(tmp_path / "made", manifest, tmp_path / "folder")
    assert read_manifest(tmp_path / "folder") == manifest
    save_artifact(tmp_path / "made", manifest, tmp_path / "small.pt")
    assert is_archive(tmp_path / "small.pt")
    with pytest.raises(UnsupportedError, match=r"\.pt, \.xml"):
        save_artifact(tmp_path / "made", manifest, tmp_path / "small.onnx")
    assert not list(tmp_path.glob(".*")), "nothing temporary is left"


def test_a_folder_of_someone_elses_is_left_alone(tmp_path: Path) -> None:
    manifest = made(tmp_path / "made")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years")
    with pytest.raises(FileExistsError, match="mine"):
        save_artifact(tmp_path / "made", manifest, tmp_path / "mine")
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years"


def test_saving_again_replaces_an_artifact(tmp_path: Path) -> None:
    manifest = made(tmp_path / "made")
    for _ in range(2):
        save_artifact(tmp_path / "made", manifest, tmp_path / "folder")
    assert read_manifest(tmp_path / "folder") == manifest


def test_files_that_were_put_beside_an_artifact_are_kept(tmp_path: Path) -> None:
    folder, manifest = tmp_path / "made", made(tmp_path / "made")
    save_artifact(folder, manifest, tmp_path / "kept")
    (tmp_path / "kept" / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match=r"notes\.txt"):
        save_artifact(folder, manifest, tmp_path / "kept")
    assert (tmp_path / "kept" / "notes.txt").read_text() == "mine"
    (tmp_path / "plain").write_text("a file")
    with pytest.raises(FileExistsError, match="is a file"):
        save_artifact(folder, manifest, tmp_path / "plain")


def test_weights_of_another_model_are_not_overwritten(tmp_path: Path) -> None:
    folder, manifest = tmp_path / "made", made(tmp_path / "made")
    (tmp_path / "small.bin").write_text("weights of another")
    with pytest.raises(FileExistsError, match=r"small\.bin is there"):
        save_artifact(folder, manifest, tmp_path / "small.xml")
    assert (tmp_path / "small.bin").read_text() == "weights of another"
    assert not (tmp_path / "small.xml").exists()
    (tmp_path / "small.bin").unlink()
    for _ in range(2):
        save_artifact(folder, manifest, tmp_path / "small.xml")


def test_a_save_that_fails_leaves_the_model_that_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, manifest = tmp_path / "made", made(tmp_path / "made")
    save_artifact(folder, manifest, tmp_path / "small.xml")
    before = {one.name: one.read_bytes() for one in tmp_path.glob("small*")}
    assert len(before) == 3
    (folder / "model.xml").write_text("another graph")
    changed = replace(manifest, files=list_files(folder))
    write_json(folder / MANIFEST, changed.to_dict())
    real, calls = shutil.copyfile, 0

    def full(source: Path, target: Path) -> None:
        nonlocal calls
        calls += 1
        if calls > 1:
            raise OSError(errno.ENOSPC, "no space left")
        real(source, target)

    monkeypatch.setattr(shutil, "copyfile", full)
    with pytest.raises(OSError, match="no space"):
        save_artifact(folder, changed, tmp_path / "small.xml")
    assert {one.name: one.read_bytes() for one in tmp_path.glob("small*")} == before
    assert not list(tmp_path.glob(".*"))
    calls = 0
    (tmp_path / "empty").mkdir()
    with pytest.raises(OSError, match="no space"):
        save_artifact(folder, changed, tmp_path / "empty")
    assert not list((tmp_path / "empty").iterdir())


def test_folders_are_filled_where_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, manifest = tmp_path / "made", made(tmp_path / "made")
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    inode = (tmp_path / "real").stat().st_ino
    save_artifact(folder, manifest, tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real").stat().st_ino == inode, "it may be where something is mounted"
    assert read_manifest(tmp_path / "real") == manifest
    save_artifact(folder, manifest, tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    save_artifact(folder, manifest, Path())
    assert read_manifest(tmp_path / "here") == manifest
    assert sorted(one.name for one in tmp_path.iterdir()) == ["here", "link", "made", "real"]


@pytest.mark.parametrize(
    ("change", "value"), [("files", {"model.xml": [float("inf"), ""]}), ("inputs", 10**400)]
)
def test_numbers_that_are_too_large_are_damage(tmp_path: Path, change: str, value: object) -> None:
    with pytest.raises(ArtifactError, match="damaged"):
        manifest_from_dict({**made(tmp_path).to_dict(), change: value}, "it")
    (tmp_path / MANIFEST).write_text('{"format": 1' + "0" * 5000 + "}")
    with pytest.raises(ArtifactError, match="no JSON"):
        read_manifest(tmp_path)


def test_a_manifest_has_to_name_the_files_of_the_model(tmp_path: Path) -> None:
    manifest = made(tmp_path)
    for files in ({}, {"other.bin": (1, "0" * 64)}):
        with pytest.raises(ArtifactError, match="does not name all files"):
            manifest_from_dict({**manifest.to_dict(), "files": files}, "it")


def test_an_archive_and_back(tmp_path: Path) -> None:
    manifest = made(tmp_path / "made")
    archive(tmp_path / "made", tmp_path / "model.pt")
    (tmp_path / "out").mkdir()
    unpack(tmp_path / "model.pt", tmp_path / "out")
    assert read_manifest(tmp_path / "out") == manifest


def test_an_archive_writes_nothing_outside(tmp_path: Path) -> None:
    manifest = made(tmp_path / "made").to_dict()
    manifest["files"] = {"../evil": (4, "0" * 64)}
    with zipfile.ZipFile(tmp_path / "evil.pt", "w") as target:
        target.writestr(MANIFEST, json.dumps(manifest))
        target.writestr("../evil", "evil")
    (tmp_path / "out").mkdir()
    with pytest.raises(ArtifactError, match="out of its folder"):
        unpack(tmp_path / "evil.pt", tmp_path / "out")
    assert not (tmp_path / "evil").exists()


def test_a_truncated_archive_is_damaged(tmp_path: Path) -> None:
    made(tmp_path / "made")
    archive(tmp_path / "made", tmp_path / "model.pt")
    whole = (tmp_path / "model.pt").read_bytes()
    (tmp_path / "cut.pt").write_bytes(whole[: len(whole) // 2])
    assert not is_archive(tmp_path / "cut.pt")
    (tmp_path / "out").mkdir()
    with pytest.raises(ArtifactError, match="damaged"):
        unpack(tmp_path / "cut.pt", tmp_path / "out")


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path) -> None:
    target = tmp_path / "model.onnx"
    target.write_text("old")

    def fail() -> None:
        with replacing(target) as temporary:
            temporary.write_text("half")
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        fail()
    assert target.read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]
