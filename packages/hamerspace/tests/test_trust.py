"""Native code is opened where this user has built it, and elsewhere only by leave."""

import shutil
import stat
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import hamerspace
import pytest
import torch
from hamerspace import Benchmarker, Optimizer
from hamerspace._trust import check_native, seal_of
from hamerspace.artifact import MANIFEST, SIDECAR, Manifest, list_files, read_json, read_manifest, write_json
from hamerspace.exceptions import ConstraintError, UnsafeModelError
from hamerspace.runtimes.base import RunOptions


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    return tmp_path


def native(folder: Path, seal: str | None) -> Manifest:
    folder.mkdir(exist_ok=True)
    (folder / "model.so").write_bytes(b"code")
    return Manifest(
        backend="tvm", technique="tuned", runtime="tvm", main="model.so", inputs=(), outputs=(),
        files=list_files(folder), seal=seal,
    )  # fmt: skip


def test_a_seal_holds_for_one_file_and_one_key(home: Path) -> None:
    digest = native(home / "made", None).files["model.so"][1]
    manifest = native(home / "made", seal_of(digest))
    check_native(manifest, home / "made", RunOptions())
    (home / "made" / "model.so").write_bytes(b"other code")
    with pytest.raises(UnsafeModelError, match="allow_native"):
        check_native(manifest, home / "made", RunOptions())
    check_native(manifest, home / "made", RunOptions(allow_native=True))
    (home / "made" / "model.so").write_bytes(b"code")
    (home / "state" / "hamerspace" / "key").unlink()
    with pytest.raises(UnsafeModelError, match="allow_native"):
        check_native(manifest, home / "made", RunOptions())
    for seal in (None, "", "00" * 32, "\u00e9"):
        with pytest.raises(UnsafeModelError):
            check_native(replace(manifest, seal=seal), home / "made", RunOptions())


def test_the_key_is_this_users_alone_and_one_for_all_processes(home: Path) -> None:
    program = "from hamerspace._trust import seal_of; print(seal_of('x'))"
    running = [
        subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) for _ in range(4)
    ]
    said = {process.communicate()[0].strip() for process in running}
    assert said == {seal_of("x")}
    assert len(said.pop()) == 64
    key = home / "state" / "hamerspace" / "key"
    assert stat.S_IMODE(key.stat().st_mode) == 0o600
    assert [one.name for one in key.parent.iterdir()] == ["key"]


def test_without_a_place_for_a_key_nothing_is_sealed(home: Path) -> None:
    (home / "state").write_text("a file where a folder should be")
    assert seal_of("x") is None
    (home / "state").unlink()
    seal_of("x")
    (home / "state" / "hamerspace" / "key").write_bytes(b"short")
    assert seal_of("x") is None


@pytest.mark.skipif(shutil.which("c++") is None, reason="AOTInductor needs a C++ compiler")
def test_compiled_models_from_elsewhere_are_refused_in_every_form(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = hamerspace.get_backend("pytorch")
    info = Optimizer.from_pytorch(torch.nn.Linear(4, 2), [1, 4]).model_info
    made = backend.optimize_graph(torch.nn.Linear(4, 2), info, technique="compiled")
    x = torch.ones(1, 4)
    paths = [made.save(home / name) for name in ("folder", "whole.pt", "alone.pt2")]
    wanted = made.load()(x)
    for path in paths:
        torch.testing.assert_close(hamerspace.load(path)(x), wanted)
    assert Benchmarker().benchmark_model(paths[0], num_runs=1).latency_ms > 0
    monkeypatch.setenv("XDG_STATE_HOME", str(home / "elsewhere"))
    for path in paths:
        with pytest.raises(UnsafeModelError, match="allow_native=True"):
            hamerspace.load(path)
        torch.testing.assert_close(hamerspace.load(path, allow_native=True)(x), wanted)
    with pytest.raises(UnsafeModelError, match="allow_native=True"):
        backend.load(paths[0])
    # Nor does it help to call it by another runtime or ending.
    manifest = read_manifest(paths[0])
    for runtime in ("torch_export", "torchscript", "onnxruntime", "tvm", "none"):
        write_json(paths[0] / MANIFEST, {**manifest.to_dict(), "runtime": runtime})
        with pytest.raises((ValueError, ImportError)):
            hamerspace.load(paths[0])
    renamed = home / "renamed.onnx"
    shutil.copy(paths[2], renamed)
    beside = read_json(paths[2].with_name(paths[2].name + SIDECAR))
    write_json(
        home / f"renamed.onnx{SIDECAR}",
        {**beside, "main": renamed.name, "files": {renamed.name: beside["files"]["alone.pt2"]}, "forms": {}},
    )
    with pytest.raises(UnsafeModelError, match="allow_native=True"):
        hamerspace.load(renamed)


def test_a_device_and_threads_that_are_none(home: Path) -> None:
    (home / "model").mkdir()
    for wrong in ({"device": "tpu"}, {"threads": 0}, {"threads": 1.5}, {"threads": True}):
        with pytest.raises(ConstraintError, match=next(iter(wrong))):
            hamerspace.load(home / "model", **wrong)
    with pytest.raises(ConstraintError, match="threads"):
        Benchmarker(threads=0)


def test_a_forked_child_leaves_its_parents_files() -> None:
    program = """
import os, sys
from hamerspace._rooms import Room
room = Room()
if (child := os.fork()) == 0:
    sys.exit()
os.waitpid(child, 0)
assert room.path.is_dir()
print(room.path)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip()
    assert not Path(done.stdout.strip()).exists()
