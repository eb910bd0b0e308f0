"""Every technique of the TensorFlow backend, opened in a fresh process and held to the model's outputs."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hamerspace._imports import has
from hamerspace.artifact import Manifest
from hamerspace.backends import get_backend
from hamerspace.backends._tensorflow_prune import without_smallest
from hamerspace.backends.base import BuildContext, Built, build_artifact
from hamerspace.exceptions import (
    ArtifactError,
    BackendError,
    ConstraintError,
    UnsupportedError,
)
from hamerspace.models import tensorflow as models
from hamerspace.models.info import ModelInfo, TensorSpec
from hamerspace.runtimes._tensorflow_library import keras, quiet, tensorflow
from hamerspace.runtimes.base import RunOptions
from hamerspace.runtimes.tensorflow import TFLiteRunner

if not has("tensorflow"):  # importing it here would be before triton's library, which ends the process
    pytest.skip("tensorflow is not installed", allow_module_level=True)

# Keras's own, when it turns variables into arrays.
pytestmark = pytest.mark.filterwarnings(
    "ignore:__array__ implementation doesn't accept a copy:DeprecationWarning"
)

TECHNIQUES = ("int8-static", "int8-dynamic", "fp16", "fp32", "saved-model", "magnitude-50")

REOPEN = """
import sys
from pathlib import Path
import numpy as np
from hamerspace.backends import get_backend
from hamerspace.runtimes.base import RunOptions

room = Path(sys.argv[1])
feeds = dict(np.load(room / "feeds.npz"))
for technique in sys.argv[2:]:
    runner = get_backend("tensorflow").load(room / technique, RunOptions(threads=1))
    np.savez(room / f"{technique}.npz", **runner.run(feeds))
"""


class Digits:
    """A network trained on digits, every artifact of it, and what a fresh process got from each."""

    def __init__(self, room: Path) -> None:
        from sklearn.datasets import load_digits

        found = load_digits()
        self.images = (found.images / 16).astype(np.float32)[..., None]
        self.labels = found.target
        self.model = self._trained()
        self.path = room / "digits.keras"
        self.model.save(self.path)
        self.source = models.read(self.path)
        self.held_out = {"image": self.images[1500:]}
        self.expected = np.asarray(self.model(self.held_out["image"], training=False))
        self.made: dict[str, tuple[Manifest, Built]] = {}
        self.room = room
        (room / "shared").mkdir()
        calibration = [{"image": self.images[start : start + 50]} for start in range(0, 500, 50)]
        backend = get_backend("tensorflow")
        for candidate in backend.candidates(self.source.info):
            folder = room / candidate.technique
            folder.mkdir()
            context = BuildContext(
                source=self.source,
                candidate=candidate,
                folder=folder,
                shared=room / "shared",
                calibration=calibration,
            )
            self.made[candidate.technique] = build_artifact(backend, context)
        np.savez(room / "feeds.npz", **self.held_out)
        subprocess.run([sys.executable, "-c", REOPEN, str(room), *self.made], check=True, timeout=300)

    def _trained(self) -> Any:
        layers = keras().layers
        keras().utils.set_random_seed(0)
        model = keras().Sequential(
            [
                keras().Input((8, 8, 1), name="image"),
                layers.Conv2D(16, 3, padding="same"),
                layers.BatchNormalization(momentum=0.8),
                layers.ReLU(),
                layers.MaxPooling2D(),
                layers.Conv2D(32, 3, padding="same", activation="relu"),
                layers.Flatten(),
                layers.Dense(64, activation="relu"),
                layers.Dense(10, name="logits"),
            ]
        )
        loss = keras().losses.SparseCategoricalCrossentropy(from_logits=True)
        model.compile(optimizer=keras().optimizers.Adam(3e-3), loss=loss)
        model.fit(self.images[:1500], self.labels[:1500], epochs=6, batch_size=50, verbose=0)
        return model

    def reopened(self, technique: str) -> np.ndarray:
        return np.load(self.room / f"{technique}.npz")["logits"]


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Digits:
    return Digits(tmp_path_factory.mktemp("tensorflow"))


def sqnr_db(expected: np.ndarray, given: np.ndarray) -> float:
    with np.errstate(divide="ignore"):  # equal to the last bit
        return float(10 * np.log10((expected**2).sum() / ((expected - given) ** 2).sum()))


def build(source: Any, technique: str, room: Path, **given: Any) -> tuple[Manifest, Built, Any]:
    """Build into a new folder of ``room`` and open the artifact again."""
    backend = get_backend("tensorflow")
    candidate = next(one for one in backend.candidates(source.info) if one.technique == technique)
    folder, shared = room / technique, room / "shared"
    folder.mkdir()
    shared.mkdir(exist_ok=True)
    context = BuildContext(source=source, candidate=candidate, folder=folder, shared=shared, **given)
    manifest, built = build_artifact(backend, context)
    return manifest, built, backend.load(folder)


def test_each_technique_is_offered_and_built(digits: Digits) -> None:
    assert tuple(digits.made) == TECHNIQUES


@pytest.mark.parametrize(
    ("technique", "least_db", "smaller"),
    [
        ("int8-static", 20, 3.2),
        ("int8-dynamic", 28, 3.2),
        ("fp16", 60, 1.85),
        ("fp32", 90, 0.95),
        ("saved-model", 90, 0.8),
    ],
)
def test_a_fresh_process_gets_the_models_outputs(
    digits: Digits, technique: str, least_db: float, smaller: float
) -> None:
    manifest, built = digits.made[technique]
    given = digits.reopened(technique)
    assert sqnr_db(digits.expected, given) > least_db
    np.testing.assert_allclose(built.run(digits.held_out)["logits"], given, rtol=1e-4, atol=1e-4)
    assert digits.source.info.size_bytes / manifest.size_bytes > smaller
    right = float((digits.expected.argmax(1) == digits.labels[1500:]).mean())
    assert right > 0.9
    assert float((given.argmax(1) == digits.labels[1500:]).mean()) > right - 0.02
    assert [(one.name, one.dtype) for one in manifest.inputs] == [("image", "float32")]
    assert [(one.name, one.shape) for one in manifest.outputs] == [("logits", ("batch", 10))]


@pytest.mark.parametrize(
    ("technique", "stored"), [("int8-static", "int8"), ("int8-dynamic", "int8"), ("fp16", "float16")]
)
def test_weights_are_stored_in_what_the_name_says(digits: Digits, technique: str, stored: str) -> None:
    """By TensorFlow's own reader of the file."""
    with quiet(native=True):
        interpreter = tensorflow().lite.Interpreter(model_path=str(digits.room / technique / "model.tflite"))
    kernels = {3 * 3 * 16 * 32, 4 * 4 * 32 * 64}  # the others have fewer than 1,024 numbers
    held = [one for one in interpreter.get_tensor_details() if np.prod(one["shape"]) in kernels]
    assert sum(one["dtype"].__name__ == stored for one in held) == len(kernels)
    edges = [*interpreter.get_input_details(), *interpreter.get_output_details()]
    assert [one["dtype"].__name__ for one in edges] == ["float32", "float32"]


def test_a_frozen_model_has_no_variables(digits: Digits) -> None:
    loaded = tensorflow().saved_model.load(str(digits.room / "saved-model"))
    function = loaded.signatures["serving_default"]
    assert not function.variables
    given = function(image=tensorflow().constant(digits.held_out["image"]))["logits"]
    np.testing.assert_allclose(given, digits.expected, rtol=1e-4, atol=1e-4)


def test_half_of_each_kernel_is_zero(digits: Digits) -> None:
    """By Keras's own loader; the half is told by sorting."""
    manifest, built = digits.made["magnitude-50"]
    pruned = keras().models.load_model(digits.room / "magnitude-50" / "model.keras", compile=False)
    before = keras().models.load_model(digits.path, compile=False)
    kernels = 0
    for old, new in zip(before.weights, pruned.weights, strict=True):
        was, now = np.asarray(old), np.asarray(new)
        if was.ndim < 2:
            np.testing.assert_array_equal(was, now)
            continue
        kernels += 1
        kept = np.abs(was) >= np.sort(np.abs(was), axis=None)[was.size // 2]
        np.testing.assert_array_equal(now, np.where(kept, was, 0))
    assert kernels == 4
    given = digits.reopened("magnitude-50")
    np.testing.assert_allclose(given, pruned(digits.held_out["image"]), rtol=1e-4, atol=1e-4)
    assert manifest.size_bytes < 0.75 * digits.path.stat().st_size
    assert "takes as much memory and as long" in built.notes[0]


def test_the_callers_model_is_not_pruned(digits: Digits, tmp_path: Path) -> None:
    before = [np.array(one) for one in digits.model.get_weights()]
    build(models.read(digits.model), "magnitude-50", tmp_path)
    for old, new in zip(before, digits.model.get_weights(), strict=True):
        np.testing.assert_array_equal(old, new)


def test_a_fixed_batch_is_fixed(digits: Digits, tmp_path: Path) -> None:
    source = replace(digits.source, info=digits.source.info.with_batch(2))
    calibration = [{"image": digits.images[start : start + 2]} for start in range(0, 40, 2)]
    manifest, _, runner = build(source, "int8-static", tmp_path, calibration=calibration)
    assert manifest.inputs[0].shape == (2, 8, 8, 1)
    given = runner.run({"image": digits.images[1500:1502]})["logits"]
    assert given.shape == (2, 10)
    assert sqnr_db(digits.expected[:2], given) > 15


@pytest.mark.parametrize("technique", ["int8-static", "saved-model"])
def test_several_threads_at_once(digits: Digits, technique: str, check_threads: Any) -> None:
    runner = get_backend("tensorflow").load(digits.room / technique)
    check_threads(runner, [{"image": digits.images[place : place + 2]} for place in range(4)])


@pytest.fixture(scope="module")
def text() -> Any:
    """Two inputs, one of them ids of any length, and two outputs."""
    layers = keras().layers
    keras().utils.set_random_seed(1)
    numbers = keras().Input((3,), name="numbers")
    ids = keras().Input((None,), dtype="int32", name="ids")
    words = layers.GlobalAveragePooling1D()(layers.Embedding(200, 32)(ids))
    hidden = layers.Dense(64, activation="relu")(layers.Concatenate()([words, numbers]))
    return keras().Model(
        [numbers, ids], [layers.Dense(4, name="kind")(hidden), layers.Dense(1, name="score")(hidden)]
    )


@pytest.mark.parametrize(
    ("technique", "least_db"), [("int8-static", 20), ("int8-dynamic", 30), ("saved-model", 90)]
)
def test_ids_of_any_length_and_several_outputs(
    text: Any, technique: str, least_db: float, tmp_path: Path
) -> None:
    source = models.read(text)
    calibration = [source.info.draw(4, seed) for seed in range(8)]
    manifest, _, runner = build(source, technique, tmp_path, calibration=calibration)
    assert [one.name for one in manifest.inputs] == ["numbers", "ids"]
    for batch, length in ((1, 5), (3, 17), (2, 5)):
        feeds = source.info.draw(batch, seed=9)
        feeds["ids"] = np.resize(feeds["ids"], (batch, length))
        given = runner.run(feeds)
        expected = text([feeds["numbers"], feeds["ids"]])
        assert list(given) == ["kind", "score"]
        for name, wanted in zip(given, expected, strict=True):
            assert sqnr_db(np.asarray(wanted), given[name]) > least_db


def test_a_saved_model_is_quantised_too_and_not_pruned(text: Any, tmp_path: Path) -> None:
    models.export_saved_model(models.read(text), tmp_path / "source")
    source = models.read(tmp_path / "source")
    manifest, _, runner = build(source, "int8-dynamic", tmp_path)
    feeds = source.info.draw(2)
    expected = np.asarray(text([feeds["numbers"], feeds["ids"]])[0])
    assert sqnr_db(expected, runner.run(feeds)["kind"]) > 30
    assert source.info.size_bytes / manifest.size_bytes > 2
    techniques = [one.technique for one in get_backend("tensorflow").candidates(source.info)]
    assert techniques == list(TECHNIQUES[:-1])


def test_what_is_too_small_to_quantise_is_a_failure(tmp_path: Path) -> None:
    model = keras().Sequential([keras().Input((4,)), keras().layers.Dense(2)])
    with pytest.raises(BackendError, match="quantised nothing"):
        build(models.read(model), "int8-dynamic", tmp_path)


def test_an_operation_that_tflite_lacks_is_named(tmp_path: Path) -> None:
    tf = tensorflow()
    signature = [tf.TensorSpec((2, 2), tf.float32, name="x")]
    function = tf.function(lambda x: {"y": tf.linalg.inv(x)}, input_signature=signature, autograph=False)
    tf.saved_model.save(tf.Module(), str(tmp_path / "source"), signatures=function.get_concrete_function())
    source = models.read(tmp_path / "source")
    with pytest.raises(BackendError, match="TFLite cannot convert the model: it has no MatrixInverse"):
        build(source, "fp32", tmp_path)
    _, _, runner = build(source, "saved-model", tmp_path)
    x = np.array([[1, 2], [3, 4]], np.float32)
    np.testing.assert_allclose(runner.run({"x": x})["y"], [[-2, 1], [1.5, -0.5]], atol=1e-5)


def test_static_int8_wants_data(digits: Digits, tmp_path: Path) -> None:
    with pytest.raises(BackendError, match="calibration"):
        build(digits.source, "int8-static", tmp_path)


def test_what_it_takes_and_where() -> None:
    backend = get_backend("tensorflow")
    assert backend.is_available()
    spec = TensorSpec(name="x", dtype="float32", shape=("batch", 3))
    mine = ModelInfo(framework="tensorflow", name="m", inputs=(spec,), form="keras")
    other = replace(mine, framework="pytorch", form="module")
    assert backend.supports_model(mine)
    assert not backend.supports_model(other)
    assert "pytorch" in backend.supports_model(other).reason
    assert backend.candidates(other) == []
    on_gpu = [one.technique for one in backend.candidates(mine, hardware="cuda")]
    assert on_gpu == ["saved-model", "magnitude-50"]


def test_a_damaged_artifact_is_refused(digits: Digits, tmp_path: Path) -> None:
    spec = digits.source.info.inputs
    content = (digits.room / "fp32" / "model.tflite").read_bytes()
    for length in (0, 200, len(content) // 2, len(content) - 4000):
        (tmp_path / "cut.tflite").write_bytes(content[:length])
        with pytest.raises(ArtifactError, match=r"cut\.tflite"):
            TFLiteRunner(tmp_path / "cut.tflite", spec, digits.source.info.outputs, RunOptions())
    whole = digits.room / "fp32" / "model.tflite"
    with pytest.raises(ArtifactError, match="its manifest names"):
        TFLiteRunner(whole, (replace(spec[0], name="other"),), digits.source.info.outputs, RunOptions())
    with pytest.raises(UnsupportedError, match="CPU"):
        TFLiteRunner(whole, spec, digits.source.info.outputs, RunOptions(device="cuda"))


def test_pruning_by_hand() -> None:
    weights = np.array([[3.0, -0.5, 2.0], [0.25, -4.0, 1.0]])
    expected = np.array([[3.0, 0, 2.0], [0, -4.0, 0]])
    np.testing.assert_array_equal(without_smallest(weights, 0.5), expected)
    np.testing.assert_array_equal(weights[0], [3.0, -0.5, 2.0])
    np.testing.assert_array_equal(without_smallest(weights, 0.1), weights)


def test_a_share_out_of_range_is_refused(digits: Digits) -> None:
    from hamerspace.backends._tensorflow_prune import pruned_copy

    with pytest.raises(ConstraintError, match="between 0 and 1"):
        pruned_copy(digits.model, 1.0)


def test_a_fresh_process_stays_quiet(digits: Digits) -> None:
    """Nothing of TensorFlow's log comes to the screen, and the user's own loggers are as they were."""
    script = (
        "import logging, sys; from pathlib import Path\n"
        "from hamerspace.backends import get_backend\n"
        "get_backend('tensorflow').load(Path(sys.argv[1]))\n"
        "assert logging.getLogger().handlers == []\n"
        "assert logging.getLogger('tensorflow').level != logging.ERROR\n"
        "import os; os.write(2, b'mine')"
    )
    command = [sys.executable, "-c", script, str(digits.room / "int8-dynamic")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
    assert (done.stdout, done.stderr) == ("", "mine")
