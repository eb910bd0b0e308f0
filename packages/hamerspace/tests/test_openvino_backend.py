"""OpenVINO: every technique is built, opened in a fresh process, and held to the original's outputs."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hamerspace._imports import has
from hamerspace.artifact import Manifest
from hamerspace.backends import BuildContext, get_backend
from hamerspace.backends.base import build_artifact
from hamerspace.exceptions import ArtifactError, BackendError, UnsupportedError
from hamerspace.models.info import ModelInfo, TensorSpec
from hamerspace.models.source import ModelSource
from hamerspace.runtimes.base import RunOptions

torch = pytest.importorskip("torch")
openvino = pytest.importorskip("openvino")
pytest.importorskip("nncf")

from hamerspace.models import pytorch  # noqa: E402

ONE_THREAD = RunOptions(threads=1)

REOPEN = """
import sys
from pathlib import Path
import numpy as np
from hamerspace.backends import get_backend
from hamerspace.runtimes.base import RunOptions
name, room = sys.argv[1], Path(sys.argv[2])
feeds = dict(np.load(room / "feeds.npz"))
for folder in sys.argv[3:]:
    runner = get_backend(name).load(folder, RunOptions(threads=1))
    np.savez(Path(folder + ".npz"), **runner.run(feeds))
"""


def reopen(name: str, room: Path, folders: list[Path], feeds: dict) -> list[dict]:
    """Outputs of artifacts that a new process opens, which knows nothing but their folders."""
    np.savez(room / "feeds.npz", **feeds)
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", REOPEN, name, str(room), *map(str, folders)],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    return [dict(np.load(f"{folder}.npz")) for folder in folders]


def sqnr_db(found: np.ndarray, wanted: np.ndarray) -> float:
    return float(10 * np.log10((wanted**2).sum() / max(((found - wanted) ** 2).sum(), 1e-30)))


def cosine(found: np.ndarray, wanted: np.ndarray) -> float:
    return float((found * wanted).sum() / np.linalg.norm(found) / np.linalg.norm(wanted))


def build(source: ModelSource, technique: str, folder: Path, **context) -> tuple[Manifest, dict]:
    backend = get_backend("openvino")
    (candidate,) = [one for one in backend.candidates(source.info) if one.technique == technique]
    folder.mkdir(parents=True)
    shared = folder.parent / "shared"
    shared.mkdir(exist_ok=True)
    made = BuildContext(source=source, candidate=candidate, folder=folder, shared=shared, **context)
    manifest, built = build_artifact(backend, made)
    assert built.run is not None
    return manifest, dict(built.run(made.example()))


class Encoder(torch.nn.Module):
    """Two layers of a transformer over tokens, with an embedding that holds most of its weights."""

    def __init__(self) -> None:
        super().__init__()
        self.words = torch.nn.Embedding(2000, 64)
        self.places = torch.nn.Parameter(torch.randn(64, 64) * 0.1)
        self.query = torch.nn.ModuleList(torch.nn.Linear(64, 192) for _ in range(2))
        self.inner = torch.nn.ModuleList(torch.nn.Linear(64, 128) for _ in range(2))
        self.outer = torch.nn.ModuleList(torch.nn.Linear(128, 64) for _ in range(2))
        self.norms = torch.nn.ModuleList(torch.nn.LayerNorm(64) for _ in range(4))

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> dict[str, torch.Tensor]:
        x_BTC = self.words(input_ids) + self.places[: input_ids.shape[1]]
        mask_B11T = attention_mask[:, None, None, :].bool()
        for place in range(2):
            query, key, value = self.query[place](x_BTC).unflatten(-1, (3, 2, 32)).permute(2, 0, 3, 1, 4)
            mixed = torch.nn.functional.scaled_dot_product_attention(query, key, value, mask_B11T)
            x_BTC = self.norms[2 * place](x_BTC + mixed.transpose(1, 2).flatten(2))
            x_BTC = self.norms[2 * place + 1](
                x_BTC + self.outer[place](torch.nn.functional.gelu(self.inner[place](x_BTC)))
            )
        return {"hidden": x_BTC, "pooled": x_BTC.mean(1)}


def cnn() -> torch.nn.Module:
    return torch.nn.Sequential(
        torch.nn.Conv2d(1, 16, 3, padding=1),
        torch.nn.ReLU(),
        torch.nn.Conv2d(16, 32, 3, padding=1),
        torch.nn.ReLU(),
        torch.nn.Flatten(),
        torch.nn.Linear(2048, 64),
        torch.nn.ReLU(),
        torch.nn.Linear(64, 10),
    ).eval()


@pytest.fixture(scope="module")
def images() -> list[dict]:
    data = np.random.default_rng(0).normal(size=(32, 1, 8, 8)).astype("float32")
    return [{"input": data[place : place + 1]} for place in range(32)]


@pytest.fixture(scope="module")
def cnn_source() -> ModelSource:
    torch.manual_seed(0)
    return pytorch.read(cnn(), input_shape=[1, 1, 8, 8])


@pytest.fixture(scope="module")
def sentences() -> list[dict]:
    generator = np.random.default_rng(0)
    mask = np.ones((1, 32), "int64")
    mask[:, 28:] = 0
    return [{"input_ids": generator.integers(0, 2000, (1, 32)), "attention_mask": mask} for _ in range(16)]


@pytest.fixture(scope="module")
def encoder_source() -> ModelSource:
    torch.manual_seed(0)
    shapes = {"input_ids": ["batch", "length"], "attention_mask": ["batch", "length"]}
    return pytorch.read(Encoder().eval(), input_shape=shapes)


# Bits a weight that OpenVINO's files need at most, and what the outputs keep.
TECHNIQUES = {
    "fp32": (33.5, 90),
    "fp16-weights": (17, 55),
    "bf16": (17, 28),
    "int8-weight": (10, 25),
    "int8-static": (10, 15),
    "int4-weight": (8.5, 10),
}


def test_several_threads_at_once(cnn_source, images, tmp_path, check_threads):
    build(cnn_source, "fp32", tmp_path / "cnn")
    check_threads(get_backend("openvino").load(tmp_path / "cnn", ONE_THREAD), images[:4])


@pytest.mark.parametrize("kind", ["cnn", "encoder"])
def test_every_technique_is_small_and_close_in_a_fresh_process(kind, request, tmp_path) -> None:
    source = request.getfixturevalue(f"{kind}_source")
    batches = request.getfixturevalue("images" if kind == "cnn" else "sentences")
    wanted = source.original(ONE_THREAD).run(batches[0])
    made = {
        technique: build(source, technique, tmp_path / technique, calibration=batches)
        for technique in TECHNIQUES
        if technique != "bf16" or has_bfloat16()
    }
    found = reopen("openvino", tmp_path, [tmp_path / technique for technique in made], batches[0])
    for (technique, (manifest, before)), outputs in zip(made.items(), found, strict=True):
        bits, least_db = TECHNIQUES[technique]
        assert list(outputs) == list(wanted), technique
        for name, array in outputs.items():
            assert array.dtype == wanted[name].dtype, technique
            assert sqnr_db(array, wanted[name]) > least_db, (technique, name)
            assert sqnr_db(array, before[name]) > (27 if technique == "bf16" else 50), (technique, name)
        weights = (tmp_path / technique / "model.bin").stat().st_size
        assert weights * 8 / source.info.parameters < bits, technique
        assert set(manifest.files) == {"model.xml", "model.bin"}


def has_bfloat16() -> bool:
    return "BF16" in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")


def test_a_signature_is_kept_and_free_axes_stay_free(encoder_source, sentences, tmp_path) -> None:
    manifest, _ = build(encoder_source, "fp32", tmp_path / "fp32")
    assert manifest.inputs == encoder_source.info.inputs
    graph = openvino.Core().read_model(tmp_path / "fp32" / "model.xml")
    assert [port.get_any_name() for port in graph.inputs] == ["input_ids", "attention_mask"]
    assert [port.get_any_name() for port in graph.outputs] == ["hidden", "pooled"]
    runner, original = get_backend("openvino").load(tmp_path / "fp32"), encoder_source.original(ONE_THREAD)
    for batch, length in ((1, 7), (3, 40)):
        ids = np.random.default_rng(1).integers(0, 2000, (batch, length))
        feeds = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
        found, wanted = runner.run(feeds), original.run(feeds)
        np.testing.assert_allclose(found["hidden"], wanted["hidden"], atol=2e-5)
        np.testing.assert_allclose(found["pooled"], wanted["pooled"], atol=2e-5)


def test_static_int8_stores_embeddings_and_matrices_as_bytes(encoder_source, sentences, tmp_path) -> None:
    build(encoder_source, "int8-static", tmp_path / "int8", calibration=sentences)
    graph = openvino.Core().read_model(tmp_path / "int8" / "model.xml")
    large = [
        node.get_element_type().get_type_name()
        for node in graph.get_ops()
        if node.get_type_name() == "Constant" and np.prod(list(node.shape)) >= 64 * 64 * 2
    ]
    assert large
    assert set(large) <= {"i8", "u8"}


def test_accuracy_control_asks_for_the_accuracy_and_keeps_it(cnn_source, images, tmp_path) -> None:
    wanted = [int(cnn_source.original(ONE_THREAD).run(feeds)["output"].argmax()) for feeds in images]
    seen: list[float] = []

    def evaluate(runner) -> float:
        found = [int(runner.run(feeds)["output"].argmax()) for feeds in images]
        seen.append(float(np.mean([a == b for a, b in zip(found, wanted, strict=True)])))
        return seen[-1]

    given = {"calibration": images, "evaluate": evaluate, "max_accuracy_drop": 0.1}
    build(cnn_source, "int8-accuracy", tmp_path / "made", **given)
    assert seen
    runner = get_backend("openvino").load(tmp_path / "made", ONE_THREAD)
    assert evaluate(runner) >= 0.9


@pytest.mark.parametrize(
    ("technique", "context", "message"),
    [
        ("int8-static", {}, "calibration data"),
        ("int8-accuracy", {"calibration": True}, "validation_fn"),
    ],
)
def test_what_is_missing_is_named(cnn_source, images, tmp_path, technique, context, message) -> None:
    given = {"calibration": images} if context else {}
    with pytest.raises(UnsupportedError, match=message):
        build(cnn_source, technique, tmp_path / "made", **given)


def test_float32_is_float32_whatever_the_cpu_prefers(cnn_source, tmp_path) -> None:
    from hamerspace.runtimes import openvino as runtime

    build(cnn_source, "fp32", tmp_path / "fp32")
    graph = runtime.core().read_model(tmp_path / "fp32" / "model.xml")
    compiled = runtime.compile_graph(graph, RunOptions(threads=1), hint="THROUGHPUT")
    assert compiled.get_property("INFERENCE_PRECISION_HINT") == openvino.Type.f32
    assert compiled.get_property("ENABLE_CPU_PINNING") is False
    assert compiled.get_property("INFERENCE_NUM_THREADS") == 1


def test_nothing_is_printed_or_reported(cnn_source, images, tmp_path, monkeypatch, capfd) -> None:
    sender = pytest.importorskip("openvino_telemetry.main").TelemetrySender
    sent: list[object] = []
    monkeypatch.setattr(sender, "send", lambda self, *told: sent.append(told))
    for name in ("CI", "TF_BUILD", "JENKINS_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    capfd.readouterr()
    build(cnn_source, "int8-static", tmp_path / "made", calibration=images)
    printed = capfd.readouterr()
    assert (printed.out, printed.err) == ("", "")
    assert not sent
    assert not list((tmp_path / "home").iterdir())


def test_onnx_that_others_made(tmp_path, images) -> None:
    onnx = pytest.importorskip("onnx")
    from hamerspace.models import onnx as models_onnx

    generator = np.random.default_rng(0)
    weights = {
        "w1": generator.normal(size=(64, 32)).astype("float32"),
        "w2": generator.normal(size=(32, 4)).astype("float32"),
    }
    helper, kind = onnx.helper, onnx.TensorProto.FLOAT
    graph = helper.make_graph(
        [
            helper.make_node("MatMul", ["x", "w1"], ["a"]),
            helper.make_node("Relu", ["a"], ["b"]),
            helper.make_node("MatMul", ["b", "w2"], ["y"]),
        ],
        "mlp",
        [helper.make_tensor_value_info("x", kind, ["batch", 64])],
        [helper.make_tensor_value_info("y", kind, ["batch", 4])],
        [onnx.numpy_helper.from_array(array, name) for name, array in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    onnx.save(model, tmp_path / "mlp.onnx")
    source = models_onnx.read(tmp_path / "mlp.onnx")
    batches = [{"x": generator.normal(size=(1, 64)).astype("float32")} for _ in range(16)]
    build(source, "int8-static", tmp_path / "int8-static", calibration=batches)
    build(source, "fp32", tmp_path / "fp32")
    x = batches[0]["x"]
    wanted = np.maximum(x @ weights["w1"], 0) @ weights["w2"]
    whole, small = reopen("openvino", tmp_path, [tmp_path / "fp32", tmp_path / "int8-static"], batches[0])
    np.testing.assert_allclose(whole["y"], wanted, rtol=1e-4, atol=1e-3)
    assert cosine(small["y"], wanted) > 0.99


def test_keras_models(tmp_path) -> None:
    if not has("tensorflow"):  # importing it here would be before triton's library, which ends the process
        pytest.skip("tensorflow is not installed")
    keras = pytest.importorskip("keras")
    from hamerspace.models import tensorflow as models_tensorflow

    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [
            keras.Input((8, 8, 1), name="image"),
            keras.layers.Conv2D(8, 3, activation="relu"),
            keras.layers.Flatten(),
            keras.layers.Dense(10),
        ]
    )
    source = models_tensorflow.read(model)
    name = source.info.inputs[0].name
    data = np.random.default_rng(0).normal(size=(16, 8, 8, 1)).astype("float32")
    batches = [{name: data[place : place + 1]} for place in range(16)]
    build(source, "int8-static", tmp_path / "int8-static", calibration=batches)
    build(source, "fp32", tmp_path / "fp32")
    wanted = np.asarray(model(data[:1]))
    whole, small = reopen("openvino", tmp_path, [tmp_path / "fp32", tmp_path / "int8-static"], batches[0])
    np.testing.assert_allclose(next(iter(whole.values())), wanted, atol=1e-5)
    assert cosine(next(iter(small.values())), wanted) > 0.98


def damaged_manifest(**changes) -> Manifest:
    spec = TensorSpec(name="x", dtype="float32", shape=(1, 4))
    fields = {"backend": "openvino", "technique": "fp32", "runtime": "openvino", "main": "model.xml"}
    return Manifest(**{**fields, "inputs": (spec,), "outputs": (), **changes})


def test_what_is_no_model_is_refused(tmp_path) -> None:
    (tmp_path / "model.xml").write_text("<net")
    with pytest.raises(ArtifactError, match="cannot be read"):
        get_backend("openvino").open(damaged_manifest(), tmp_path, ONE_THREAD)


def test_options_and_devices_that_are_not_there_are_refused(cnn_source, tmp_path) -> None:
    build(cnn_source, "fp32", tmp_path / "fp32")
    backend = get_backend("openvino")
    with pytest.raises(BackendError, match="cuda"):
        backend.load(tmp_path / "fp32", RunOptions(device="cuda"))
    with pytest.raises(ArtifactError, match="f16"):
        backend.open(damaged_manifest(options={"precision": "f16"}), tmp_path / "fp32", ONE_THREAD)


def test_there_is_nothing_for_gpus() -> None:
    info = ModelInfo(framework="onnx", name="any", inputs=())
    backend = get_backend("openvino")
    assert backend.candidates(info, hardware="cuda") == []
    assert len({one.technique for one in backend.candidates(info, hardware="edge")}) == 7
