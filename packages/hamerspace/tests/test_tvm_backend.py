"""TVM: everything here is tuned, with models so small that a few trials do."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hamerspace.artifact import SIDECAR, Manifest, read_manifest
from hamerspace.backends import BuildContext, Built, get_backend
from hamerspace.backends.base import build_artifact
from hamerspace.exceptions import ArtifactError, BackendError, ConstraintError
from hamerspace.loading import load
from hamerspace.models.info import ModelInfo, TensorSpec
from hamerspace.models.source import ModelSource
from hamerspace.runtimes.base import RunOptions
from hamerspace.saving import save_artifact

torch = pytest.importorskip("torch")
pytest.importorskip("tvm")

from hamerspace.backends import _tvm_lower, _tvm_process, tvm  # noqa: E402 - after the skips
from hamerspace.backends._tvm_records import Kernel, Records, root_of  # noqa: E402
from hamerspace.backends._tvm_tune import Order  # noqa: E402
from hamerspace.models.pytorch import read  # noqa: E402
from hamerspace.runtimes.tvm import lacking_features, open_runner  # noqa: E402

TRIALS = 2
ALONE = RunOptions(threads=1)
REOPEN = """
import sys
import numpy as np
from hamerspace.backends import get_backend
from hamerspace.runtimes.base import RunOptions
folder, feeds, outputs = sys.argv[1:]
runner = get_backend("tvm").load(folder, RunOptions(threads=1))
np.savez(outputs, **runner.run(dict(np.load(feeds))))
"""

TUNE = """
import sys
from pathlib import Path
from hamerspace.backends._tvm_process import tune
from hamerspace.backends._tvm_records import Records
from hamerspace.backends._tvm_tune import Order
order = Order.read(Path(sys.argv[1]))
tune(Records(Path(order.folder)), order, 300.0)
"""


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def model() -> Any:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4)).eval()


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tvm")


def context_of(source: ModelSource, place: Path, name: str, **options: Any) -> BuildContext:
    candidate = get_backend("tvm").candidates(source.info)[0]
    candidate = replace(candidate, options={"trials": TRIALS, "tuning_limit_s": 300.0, **options})
    for folder in (place / name, place / "shared"):
        folder.mkdir(exist_ok=True)
    return BuildContext(
        source=source,
        candidate=candidate,
        folder=place / name,
        shared=place / "shared",
        cache=place / "cache",
    )


def build(source: ModelSource, place: Path, name: str, **options: Any) -> tuple[Manifest, Built]:
    return build_artifact(get_backend("tvm"), context_of(source, place, name, **options))


@pytest.fixture(scope="module")
def built(model: Any, place: Path) -> tuple[Manifest, Built]:
    """The model with a free batch, which is fixed to 1."""
    return build(read(model, input_shape=[None, 8]), place, "built")


@pytest.fixture
def copied(built: tuple[Manifest, Built], place: Path, tmp_path: Path) -> Path:
    return shutil.copytree(place / "built", tmp_path / "copied")


@pytest.fixture(scope="module")
def lowered(model: Any, place: Path) -> _tvm_lower.Lowered:
    return _tvm_lower.lower(context_of(read(model, input_shape=[1, 8]), place, "lowered"))


def records_of(place: Path) -> Records:
    found = [path for path in (place / "cache" / "tvm").iterdir() if (path / "finished.json").exists()]
    return Records(found[0])


def test_a_fresh_process_gives_what_torch_gives(
    model: Any, built: tuple[Manifest, Built], place: Path, tmp_path: Path
) -> None:
    values = np.random.default_rng(1).standard_normal((1, 8)).astype(np.float32)
    np.savez(tmp_path / "feeds.npz", input=values)
    command = [
        sys.executable,
        "-c",
        REOPEN,
        place / "built",
        tmp_path / "feeds.npz",
        tmp_path / "outputs.npz",
    ]
    subprocess.run(command, check=True, timeout=300)
    given = np.load(tmp_path / "outputs.npz")["output"]
    with torch.no_grad():
        wanted = model(torch.from_numpy(values)).numpy()
    np.testing.assert_allclose(given, wanted, rtol=1e-4, atol=1e-5)
    run = built[1].run
    assert run is not None
    np.testing.assert_allclose(run({"input": values})["output"], given, rtol=1e-5, atol=1e-6)


def test_shapes_are_static_and_other_batches_go_through_in_parts(
    model: Any, built: tuple[Manifest, Built], place: Path
) -> None:
    assert [spec.shape for spec in built[1].inputs or ()] == [(1, 8)]
    assert [spec.shape for spec in read_manifest(place / "built").inputs] == [(1, 8)]
    values = torch.randn(3, 8)
    with torch.no_grad():
        wanted = model(values)
    torch.testing.assert_close(load(place / "built", threads=1)(values), wanted, rtol=1e-4, atol=1e-5)


def test_the_notes_say_how_much_was_tuned(built: tuple[Manifest, Built], place: Path) -> None:
    kernels, trials = 2, records_of(place).count()
    assert trials >= kernels
    assert f"{kernels} kernels, tuned in {trials} trials" in built[1].notes


def test_several_threads_at_once(
    built: tuple[Manifest, Built], place: Path, check_threads: Callable[..., None]
) -> None:
    (name,) = (spec.name for spec in built[0].inputs)
    generator = np.random.default_rng(0)
    feeds = [{name: generator.standard_normal((1, 8)).astype(np.float32)} for _ in range(4)]
    check_threads(get_backend("tvm").load(place / "built", ALONE), feeds)


def test_records_are_used_again_for_other_weights(
    built: tuple[Manifest, Built], place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tvm, "tune", lambda *_: pytest.fail("tuned again"))
    torch.manual_seed(1)
    other = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4)).eval()
    manifest, again = build(read(other, input_shape=[1, 8]), place, "other")
    assert "tuned before" in again.notes[0]
    values = torch.randn(1, 8)
    with torch.no_grad():
        wanted = other(values).numpy()
    given = get_backend("tvm").load(place / "other", ALONE).run({"input": values.numpy()})
    np.testing.assert_allclose(given["output"], wanted, rtol=1e-4, atol=1e-5)
    assert manifest.files["model.so"] != built[0].files["model.so"]


def test_a_model_of_onnx(place: Path, tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    onnxruntime = pytest.importorskip("onnxruntime")
    generator = np.random.default_rng(0)
    weights = {
        "w": generator.standard_normal((8, 4)).astype(np.float32),
        "b": generator.standard_normal(4).astype(np.float32),
    }
    float32 = onnx.TensorProto.FLOAT
    graph = onnx.helper.make_graph(
        [
            onnx.helper.make_node("Gemm", ["two.x", "w", "b"], ["mixed"]),
            onnx.helper.make_node("Mul", ["mixed", "one.x"], ["out.y"]),
        ],
        "graph",
        [
            onnx.helper.make_tensor_value_info("one.x", float32, ["n", 4]),
            onnx.helper.make_tensor_value_info("two.x", float32, ["n", 8]),
        ],
        [onnx.helper.make_tensor_value_info("out.y", float32, ["n", 4])],
        [onnx.numpy_helper.from_array(array, name) for name, array in weights.items()],
    )
    path = tmp_path / "model.onnx"
    onnx.save(
        onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=9), path
    )
    source = ModelSource.of(path)
    manifest = build(source, place, "onnx")[0]
    assert [spec.shape for spec in manifest.inputs] == [(1, 4), (1, 8)]
    feeds = source.info.draw(1, seed=3)
    wanted = onnxruntime.InferenceSession(path).run(["out.y"], feeds)[0]
    given = get_backend("tvm").load(place / "onnx", ALONE).run(feeds)
    np.testing.assert_allclose(given["out.y"], wanted, rtol=1e-4, atol=1e-5)


def test_a_kernel_without_a_record_fails(
    built: tuple[Manifest, Built], lowered: _tvm_lower.Lowered, place: Path, tmp_path: Path
) -> None:
    lines = (records_of(place).folder / "database_tuning_record.json").read_text().splitlines()
    whole = Records(shutil.copytree(records_of(place).folder, tmp_path / "records"))
    first = [line for line in lines if json.loads(line)[0] == 0]
    assert 0 < len(first) < len(lines)
    (whole.folder / "database_tuning_record.json").write_text("\n".join(first) + "\n")
    with pytest.raises(BackendError, match=r"1 of 2 kernels have no tuning record \(.*matmul"):
        _tvm_lower.compile_tuned(lowered, whole.open())
    (tmp_path / "none").mkdir()
    with pytest.raises(BackendError, match="2 of 2 kernels have no tuning record"):
        _tvm_lower.compile_tuned(lowered, Records(tmp_path / "none").open())


def test_a_build_that_has_no_time_fails_and_writes_nothing(model: Any, tmp_path: Path) -> None:
    with pytest.raises(BackendError, match="have no tuning record"):
        build(read(model, input_shape=[1, 8]), tmp_path, "late", tuning_limit_s=0.01)
    assert not list((tmp_path / "late").iterdir())


def test_tuning_that_was_killed_goes_on(lowered: _tvm_lower.Lowered, tmp_path: Path) -> None:
    records = Records(tmp_path / "records")
    order = Order(
        folder=str(records.folder), kernels=lowered.kernels, target=lowered.target, trials=400, seed=0
    )
    records.folder.mkdir()
    order.write(tmp_path / "order.json")
    parent = subprocess.Popen([sys.executable, "-c", TUNE, tmp_path / "order.json"])
    try:
        until = time.monotonic() + 300
        while not records.count():
            assert parent.poll() is None
            assert time.monotonic() < until
            time.sleep(0.05)
        children = _children_of(parent.pid)
        assert children
    finally:
        parent.kill()
        parent.wait()
    _wait_until_gone(children)
    before = records.count()
    assert before < 400 * len(lowered.kernels)
    with (records.folder / "database_tuning_record.json").open("a") as file:
        file.write("[0, [[[")
    assert _tvm_process.tune(records, replace(order, trials=TRIALS), 300.0)
    assert records.count() >= before
    assert records.mend() == 0
    _tvm_lower.compile_tuned(lowered, records.open())


def _children_of(pid: int) -> list[int]:
    return [int(one) for one in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def _wait_until_gone(pids: list[int]) -> None:
    until = time.monotonic() + 30
    while any(Path(f"/proc/{pid}/status").exists() and not _is_zombie(pid) for pid in pids):
        assert time.monotonic() < until, "tuning outlived the process that started it"
        time.sleep(0.05)


def _is_zombie(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def test_a_process_that_measures_nothing_is_not_started_again(tmp_path: Path) -> None:
    records = Records(tmp_path / "records")
    records.folder.mkdir()
    kernel = Kernel(name="none", weight=1, module="no module of TVM")
    order = Order(
        folder=str(records.folder),
        kernels=(kernel,),
        target={"kind": "llvm", "num-cores": 1},
        trials=1,
        seed=0,
    )
    with pytest.raises(BackendError, match="status 1, and nothing was measured; it said last"):
        _tvm_process.tune(records, order, 300.0)


@pytest.mark.parametrize(
    ("kernels", "measured", "dropped"),
    [
        (b"[1]\n[2]\n", b"[0, 1]\n[1, 2]\n", 0),
        (b"[1]\n[2]\n", b"[0, 1]\n[1, 2", 1),
        (b"[1]\n[2]", b"[0, 1]\n[1, 2]\n", 2),
        (b"[1]\n\0\0\0\n", b"[0, 1]\n\0\0", 2),
        (b"", b"", 0),
    ],
)
def test_mending(kernels: bytes, measured: bytes, dropped: int, tmp_path: Path) -> None:
    records = Records(tmp_path)
    (tmp_path / "database_workload.json").write_bytes(kernels)
    (tmp_path / "database_tuning_record.json").write_bytes(measured)
    records.finish(8)
    assert records.mend() == dropped
    assert records.finished_trials() == (0 if dropped else 8)
    assert records.mend() == 0
    lines = (tmp_path / "database_tuning_record.json").read_bytes().splitlines()
    assert all(json.loads(line)[0] < len(kernels.splitlines()) for line in lines)


def test_a_lock_that_another_process_holds(tmp_path: Path) -> None:
    records = Records(tmp_path / "records")
    with records.locked(1), pytest.raises(BackendError, match="another process"), records.locked(0.3):
        pass
    with records.locked(0.3):
        pass


def test_where_records_lie(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert root_of(tmp_path) == tmp_path / "tvm"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert root_of(None) == tmp_path / "hamerspace" / "tvm"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert root_of(None) == Path.home() / ".cache" / "hamerspace" / "tvm"


def test_a_library_that_was_changed_is_not_opened(copied: Path) -> None:
    library = copied / "model.so"
    content = bytearray(library.read_bytes())
    content[len(content) // 2] ^= 1
    library.write_bytes(content)
    with pytest.raises(ArtifactError, match="damaged or was changed"):
        get_backend("tvm").load(copied, ALONE)
    library.write_bytes(content[: len(content) // 2])
    with pytest.raises(ArtifactError, match="damaged or was changed"):
        get_backend("tvm").load(copied, ALONE)


def test_the_runner_checks_the_hash_itself(copied: Path) -> None:
    manifest = read_manifest(copied)
    with (copied / "model.so").open("ab") as file:
        file.write(b"\0")
    with pytest.raises(ArtifactError, match="damaged or was changed"):
        open_runner(manifest, copied, ALONE)


def test_a_library_alone_needs_its_sidecar(
    built: tuple[Manifest, Built], place: Path, tmp_path: Path
) -> None:
    path = tmp_path / "alone.so"
    save_artifact(place / "built", built[0], path)
    values = np.ones((1, 8), np.float32)
    wanted = get_backend("tvm").load(place / "built", ALONE).run({"input": values})["output"]
    np.testing.assert_array_equal(load(path, threads=1)(values), wanted)
    path.with_name(path.name + SIDECAR).unlink()
    with pytest.raises(ArtifactError, match=r"alone\.so\.hamerspace\.json"):
        load(path)
    with pytest.raises(ArtifactError, match="no entry in a manifest"):
        open_runner(replace(built[0], main="alone.so"), tmp_path, ALONE)


def test_a_library_for_another_device_or_cpu(built: tuple[Manifest, Built], place: Path) -> None:
    with pytest.raises(ArtifactError, match="compiled for CPUs"):
        open_runner(built[0], place / "built", RunOptions(device="cuda"))
    assert lacking_features(str(built[0].options["cpu"])) == []
    older = replace(built[0], options={**built[0].options, "cpu": "x86-64"})
    open_runner(older, place / "built", ALONE)
    newer = replace(built[0], options={**built[0].options, "cpu": "sapphirerapids"})
    if "amx" not in Path("/proc/cpuinfo").read_text():
        with pytest.raises(ArtifactError, match="amx"):
            open_runner(newer, place / "built", ALONE)


def test_what_is_offered(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = get_backend("tvm")
    info = ModelInfo(
        framework="onnx", name="m", inputs=(TensorSpec(name="x", dtype="float32", shape=("batch", 8)),)
    )
    assert [one.name for one in backend.candidates(info)] == ["tvm/tuned"]
    assert backend.candidates(info, hardware="cuda") == []
    assert backend.is_available()
    for name in ("CXX", "CC"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", "")
    verdict = backend.is_available()
    assert not verdict
    assert "g++" in verdict.reason


@pytest.mark.parametrize("options", [{"trials": 0}, {"trials": 1.5}, {"tuning_limit_s": 0}])
def test_wrong_options(options: dict[str, Any], model: Any, tmp_path: Path) -> None:
    with pytest.raises(ConstraintError, match=next(iter(options))):
        build(read(model, input_shape=[1, 8]), tmp_path, "wrong", **options)


def test_operators_that_tvm_does_not_know(tmp_path: Path) -> None:
    class Odd(torch.nn.Module):
        def forward(self, x: Any) -> Any:
            return torch.linalg.svd(x)[1]

    with pytest.raises(BackendError, match="TVM cannot import this model"):
        build(read(Odd(), input_shape=[4, 4]), tmp_path, "odd")


@pytest.mark.slow
def test_a_network_of_convolutions_is_faster_than_eager(tmp_path: Path) -> None:
    torch.manual_seed(0)
    nn = torch.nn
    network = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(512, 10),
    ).eval()
    source = read(network, input_shape=[1, 1, 8, 8])
    build(source, tmp_path, "network", trials=16)
    tuned, eager = get_backend("tvm").load(tmp_path / "network", ALONE), source.original(ALONE)
    feeds = source.info.draw(1)
    np.testing.assert_allclose(tuned.run(feeds)["output"], eager.run(feeds)["output"], rtol=1e-3, atol=1e-4)
    times = [(_cpu_time(tuned, feeds), _cpu_time(eager, feeds)) for _ in range(5)]
    ours, theirs = (min(one) for one in zip(*times, strict=True))
    assert ours < theirs


def _cpu_time(runner: Any, feeds: dict[str, Any]) -> float:
    prepared = runner.prepare(feeds)
    for _ in range(20):
        runner.run_prepared(prepared)
    start = time.process_time()
    for _ in range(200):
        runner.run_prepared(prepared)
    return time.process_time() - start
