"""Optimum, whichever half of it is installed: built, opened in a fresh process and by its own classes."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hamerspace._imports import has
from hamerspace.backends import BuildContext, get_backend
from hamerspace.backends.base import build_artifact
from hamerspace.exceptions import UnsupportedError
from hamerspace.runtimes.base import RunOptions

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from hamerspace.models import pytorch  # noqa: E402

ONE_THREAD = RunOptions(threads=1)
intel = pytest.mark.skipif(not has("optimum.intel"), reason="optimum-intel is not in this environment")
onnx = pytest.mark.skipif(
    not has("optimum.onnxruntime"), reason="optimum-onnx is not in this environment: make optimum-onnx"
)

REOPEN = """
import sys
from pathlib import Path
import numpy as np
from hamerspace.backends import get_backend
from hamerspace.runtimes.base import RunOptions
room = Path(sys.argv[1])
feeds = dict(np.load(room / "feeds.npz"))
for folder in sys.argv[2:]:
    runner = get_backend("optimum").load(folder, RunOptions(threads=1))
    np.savez(Path(folder + ".npz"), **runner.run(feeds))
"""

# Bits a weight at most, and what the outputs keep of the original's, in dB.
TECHNIQUES = {
    "ov-fp32": (33.5, 90),
    "ov-int8-weight": (10, 25),
    "ov-int4-weight": (9, 10),
    "ov-int8-static": (10, 12),
    "ort-fp32": (34, 90),
    "ort-graph": (34, 80),
    "ort-int8-dynamic": (12, 15),
}


@pytest.fixture(scope="module")
def bert(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=2000, hidden_size=64, num_hidden_layers=2, num_attention_heads=2, intermediate_size=128
    )
    folder = tmp_path_factory.mktemp("models") / "bert"
    transformers.BertModel(config).eval().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def source(bert):
    return pytorch.read(bert, input_shape={"input_ids": [1, 32], "attention_mask": [1, 32]})


@pytest.fixture(scope="module")
def sentences() -> list[dict]:
    generator = np.random.default_rng(0)
    mask = np.ones((1, 32), "int64")
    mask[:, 28:] = 0
    return [{"input_ids": generator.integers(0, 2000, (1, 32)), "attention_mask": mask} for _ in range(16)]


def build(source, technique: str, folder: Path, **context):
    backend = get_backend("optimum")
    (candidate,) = [one for one in backend.candidates(source.info) if one.technique == technique]
    folder.mkdir(parents=True)
    shared = folder.parent / "shared"
    shared.mkdir(exist_ok=True)
    made = BuildContext(source=source, candidate=candidate, folder=folder, shared=shared, **context)
    return build_artifact(backend, made)


def sqnr_db(found: np.ndarray, wanted: np.ndarray) -> float:
    return float(10 * np.log10((wanted**2).sum() / max(((found - wanted) ** 2).sum(), 1e-30)))


def check_half(source, sentences, room: Path, prefix: str, weights: str) -> None:
    offered = get_backend("optimum").candidates(source.info)
    techniques = [one.technique for one in offered if one.technique.startswith(prefix)]
    assert len(techniques) >= 3
    wanted = source.original(ONE_THREAD).run(sentences[0])
    before = {}
    for technique in techniques:
        _, built = build(source, technique, room / technique, calibration=sentences)
        assert built.run is not None
        before[technique] = dict(built.run(sentences[0]))
    np.savez(room / "feeds.npz", **sentences[0])
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", REOPEN, str(room), *(str(room / one) for one in techniques)],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    for technique in techniques:
        found = dict(np.load(room / f"{technique}.npz"))
        bits, least_db = TECHNIQUES[technique]
        assert list(found) == ["last_hidden_state", "pooler_output"]
        for name, array in found.items():
            assert sqnr_db(array, wanted[name]) > least_db, (technique, name)
            assert sqnr_db(array, before[technique][name]) > 50, (technique, name)
        stored = (room / technique / weights).stat().st_size
        assert stored * 8 / source.info.parameters < bits, technique


@intel
def test_every_technique_of_optimum_intel(source, sentences, tmp_path) -> None:
    check_half(source, sentences, tmp_path, "ov-", "openvino_model.bin")
    reader = __import__("optimum.intel", fromlist=["OVModelForFeatureExtraction"]).OVModelForFeatureExtraction
    model = reader.from_pretrained(
        str(tmp_path / "ov-fp32"), local_files_only=True, ov_config={"INFERENCE_PRECISION_HINT": "f32"}
    )
    found = model(**{name: torch.from_numpy(array) for name, array in sentences[0].items()})
    wanted = source.original(ONE_THREAD).run(sentences[0])["last_hidden_state"]
    np.testing.assert_allclose(found.last_hidden_state.numpy(), wanted, atol=2e-5)


@onnx
def test_every_technique_of_optimum_onnx(source, sentences, tmp_path) -> None:
    check_half(source, sentences, tmp_path, "ort-", "model.onnx")
    reader = __import__("optimum.onnxruntime", fromlist=["ORTModel"]).ORTModelForFeatureExtraction
    model = reader.from_pretrained(tmp_path / "ort-fp32", local_files_only=True)
    found = model(**{name: torch.from_numpy(array) for name, array in sentences[0].items()})
    wanted = source.original(ONE_THREAD).run(sentences[0])["last_hidden_state"]
    np.testing.assert_allclose(found.last_hidden_state.numpy(), wanted, atol=2e-5)


def test_the_half_that_is_there_is_named() -> None:
    verdict = get_backend("optimum").is_available()
    if has("optimum.intel"):
        assert verdict
        assert "optimum-intel" in verdict.reason
    elif has("optimum.onnxruntime"):
        assert verdict
        assert "without optimum-intel" in verdict.reason
    else:
        assert not verdict
        assert "pip install" in verdict.reason


def test_static_quantisation_needs_data(source, tmp_path) -> None:
    backend = get_backend("optimum")
    needing = [one for one in backend.candidates(source.info) if one.needs_calibration]
    if not needing:
        pytest.skip("what is installed of Optimum offers nothing that needs data")
    with pytest.raises(UnsupportedError, match="calibration data"):
        build(source, needing[0].technique, tmp_path / "made")


def test_only_folders_of_transformers_are_taken() -> None:
    other = pytorch.read(torch.nn.Linear(4, 2).eval(), input_shape=[1, 4])
    verdict = get_backend("optimum").supports_model(other.info)
    assert not verdict
    assert "config.json" in verdict.reason


def test_what_is_for_other_devices_is_not_offered(source) -> None:
    assert get_backend("optimum").candidates(source.info, hardware="cuda") == []
