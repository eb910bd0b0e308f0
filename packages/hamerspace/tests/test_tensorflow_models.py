"""Models of TensorFlow: what is found out about them, and what is refused. Keras itself is the measure."""

import json
import pickle
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hamerspace._imports import has
from hamerspace.exceptions import ConstraintError, ModelError, ModelInputError, UnsafeModelError
from hamerspace.models import tensorflow as models
from hamerspace.models._tensorflow_graph import first_line, unique
from hamerspace.models.source import ModelSource
from hamerspace.runtimes._tensorflow_library import keras, quiet, tensorflow
from hamerspace.runtimes.base import RunOptions

if not has("tensorflow"):  # importing it here would be before triton's library, which ends the process
    pytest.skip("tensorflow is not installed", allow_module_level=True)

# Keras's own, when it turns variables into arrays.
pytestmark = pytest.mark.filterwarnings(
    "ignore:__array__ implementation doesn't accept a copy:DeprecationWarning"
)

ELSEWHERE = """
import sys
import numpy as np
from hamerspace import Optimizer
from hamerspace.exceptions import ModelInputError, UnsafeModelError

sound, unsafe = sys.argv[1:]
made = Optimizer.from_tensorflow(sound, [4, 8, 8, 1])
assert str(made.model) == sound
print(made.model_info.to_dict())
try:
    Optimizer.from_tensorflow(unsafe)
except UnsafeModelError as error:
    print(error)
try:
    Optimizer.from_tensorflow(sound, example_inputs=np.ones((2, 3), np.float32))
except ModelInputError as error:
    print(error)
assert "tensorflow" not in sys.modules
assert "keras" not in sys.modules
"""


def image_model() -> Any:
    layers = keras().layers
    image = keras().Input((8, 8, 1), name="image")
    first = layers.Conv2D(4, 3, padding="same", activation="relu")(image)
    second = layers.Conv2D(4, 3, padding="same")(first)
    flat = layers.Flatten()(layers.Add()([first, second]))
    return keras().Model(image, layers.Dense(10, name="logits")(flat), name="images")


def text_model() -> Any:
    """Two inputs whose order is not that of the alphabet; ids may have any length."""
    layers = keras().layers
    numbers = keras().Input((3,), name="numbers")
    ids = keras().Input((None,), dtype="int32", name="ids")
    words = layers.GlobalAveragePooling1D()(layers.Embedding(50, 8)(ids))
    both = layers.Concatenate()([words, numbers])
    outputs = [layers.Dense(2, name="kind")(both), layers.Dense(1, name="score")(both)]
    return keras().Model([numbers, ids], outputs)


def run(source: Any, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return models.original(source, RunOptions()).run(feeds)


def assert_runs_like(source: Any, model: Any) -> None:
    feeds = source.info.draw(3, seed=5)
    given = [feeds[spec.name] for spec in source.info.inputs]
    expected = model(given if len(given) > 1 else given[0], training=False)
    expected = expected if isinstance(expected, (list, tuple)) else [expected]
    for found, wanted in zip(run(source, feeds).values(), expected, strict=True):
        np.testing.assert_allclose(found, np.asarray(wanted), rtol=1e-5, atol=1e-5)


def test_a_functional_model_is_described_by_its_layers() -> None:
    model = text_model()
    info = models.read(model).info
    assert [(one.name, one.dtype, one.shape, one.high) for one in info.inputs] == [
        ("numbers", "float32", ("batch", 3), None),
        ("ids", "int32", ("batch", "axis_1"), 50),
    ]
    assert [(one.name, one.shape) for one in info.outputs] == [
        ("kind", ("batch", 2)),
        ("score", ("batch", 1)),
    ]
    assert info.structure == "tuple"
    assert info.form == "keras"
    assert info.parameters == model.count_params() == 50 * 8 + 11 * 2 + 2 + 11 + 1
    assert info.size_bytes == 4 * info.parameters
    assert pickle.loads(pickle.dumps(info)) == info  # noqa: S301


def test_ids_that_come_as_floats_are_drawn_below_the_vocabulary() -> None:
    layers = keras().layers
    model = keras().Sequential([keras().Input((6,), name="ids"), layers.Embedding(20, 4), layers.Flatten()])
    info = models.read(model).info
    drawn = info.draw(50)["ids"]
    assert (info.inputs[0].dtype, info.inputs[0].high) == ("float32", 20)
    assert drawn.min() == 0
    assert drawn.max() == 19
    assert (drawn == drawn.round()).all()


def test_positions_do_not_bound_ids() -> None:
    """A table that is looked up by place in the sequence is longer or shorter than the vocabulary."""
    layers = keras().layers
    ids = keras().Input((8,), dtype="int32", name="ids")
    places = keras().ops.cumsum(keras().ops.ones_like(ids), axis=1) - 1
    both = layers.Embedding(50, 4)(ids) + layers.Embedding(8, 4)(places)
    info = models.read(keras().Model(ids, layers.Flatten()(both))).info
    assert info.inputs[0].high == 50


@pytest.mark.parametrize("form", ["live", "keras", "h5", "exported"])
def test_every_form_runs_like_keras(form: str, tmp_path: Path) -> None:
    model, path = image_model(), tmp_path / f"model.{form}"
    if form == "exported":
        model.export(str(path), verbose=False)
    elif form == "h5":
        with quiet():
            keras().saving.save_model(model, path)
    elif form == "keras":
        model.save(path)
    source = models.read(model if form == "live" else path)
    assert source.info.name == ("images" if form == "live" else "model")
    assert source.info.form == ("saved_model" if form == "exported" else "keras")
    assert source.info.parameters == model.count_params()
    assert [(one.name, one.shape) for one in source.info.inputs] == [("image", ("batch", 8, 8, 1))]
    assert_runs_like(source, model)
    assert_runs_like(source.stage(tmp_path), model)


def test_a_saved_model_has_its_inputs_by_name(tmp_path: Path) -> None:
    model = text_model()
    models.export_saved_model(models.read(model), tmp_path / "saved")
    source = models.read(tmp_path / "saved")
    assert [one.name for one in source.info.inputs] == ["ids", "numbers"]
    assert source.info.inputs[0].high == 50
    assert source.info.parameters == model.count_params()
    feeds = source.info.draw(2)
    expected = model([feeds["numbers"], feeds["ids"]])
    given = run(source, feeds)
    np.testing.assert_allclose(given["kind"], expected[0], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(given["score"], expected[1], rtol=1e-5, atol=1e-6)


def test_an_exported_model_has_the_names_and_shapes_of_its_info(tmp_path: Path) -> None:
    from dataclasses import replace

    source = models.read(text_model())
    models.export_saved_model(replace(source, info=source.info.with_batch(2)), tmp_path / "saved")
    function = tensorflow().saved_model.load(str(tmp_path / "saved")).signatures["serving_default"]
    taken = function.structured_input_signature[1]
    assert taken["numbers"].shape.as_list() == [2, 3]
    assert taken["ids"].shape.as_list() == [2, None]
    assert set(function.structured_outputs) == {"kind", "score"}


def test_a_model_with_classes_of_its_own_is_kept_as_a_graph(tmp_path: Path) -> None:
    class Doubled(keras().layers.Layer):
        def call(self, inputs: Any) -> Any:
            return 2 * inputs

    layers = keras().layers
    image = keras().Input((4,), name="image")
    model = keras().Model(image, layers.Dense(3)(Doubled()(image)))
    source = models.read(model)
    assert source.info.form == "saved_model"
    staged = source.stage(tmp_path)
    assert staged.model is None
    assert (staged.path / "saved_model.pb").is_file()
    assert_runs_like(staged, model)


def test_a_live_model_with_a_function_of_its_own_is_kept_as_a_graph(tmp_path: Path) -> None:
    model = keras().Sequential([keras().Input((4,)), keras().layers.Dense(3, activation=lambda x: x * 3)])
    source = models.read(model)
    assert source.info.form == "saved_model"
    assert_runs_like(source.stage(tmp_path), model)


def test_a_subclassed_model_takes_what_examples_say() -> None:
    class Two(keras().Model):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.dense = keras().layers.Embedding(30, 4), keras().layers.Dense(2)

        def call(self, inputs: Any) -> Any:
            pooled = keras().ops.mean(self.table(inputs["ids"]), axis=1)
            return {"answer": self.dense(keras().ops.concatenate([pooled, inputs["extra"]], axis=1))}

    examples = {"ids": np.ones((2, 5), np.int64), "extra": np.ones((2, 3), np.float32)}
    model = Two()
    with pytest.raises(ModelError, match="call it once"):
        models.read(model, example_inputs=examples)
    expected = model(examples)["answer"]
    with pytest.raises(ModelError, match="give input_shape"):
        models.read(model)
    source = models.read(model, example_inputs=examples)
    assert source.info.structure == "dict"
    assert [(one.name, one.dtype, one.shape, one.high) for one in source.info.inputs] == [
        ("ids", "int64", ("batch", 5), 30),
        ("extra", "float32", ("batch", 3), None),
    ]
    np.testing.assert_allclose(run(source, examples)["answer"], expected, rtol=1e-5, atol=1e-6)
    given = run(ModelSource(info=source.info, model=model), examples)["answer"]
    np.testing.assert_allclose(given, expected, rtol=1e-5, atol=1e-6)


def test_shapes_that_are_open_can_be_given() -> None:
    model = text_model()
    fixed = models.read(model, input_shape={"numbers": [None, 3], "ids": [4, 7]}).info
    assert [one.shape for one in fixed.inputs] == [("batch", 3), (4, 7)]
    examples = (np.ones((2, 3), np.float32), np.ones((2, 9), np.int32))
    by_example = models.read(model, example_inputs=examples).info
    assert [one.shape for one in by_example.inputs] == [("batch", 3), ("batch", 9)]
    with pytest.raises(ConstraintError, match=r"numbers: float32"):
        models.read(model, input_shape=[[None, 4], [None, 7]])
    with pytest.raises(ModelInputError, match="float32"):
        models.read(model, example_inputs=(examples[0], np.ones((2, 9), np.float32)))


def test_code_in_a_file_is_not_executed(tmp_path: Path) -> None:
    trace = str(tmp_path / "executed")
    layers = keras().layers
    vector = keras().Input((4,))
    model = keras().Model(vector, layers.Lambda(lambda x: (Path(trace).write_text("yes"), x)[1])(vector))
    model.save(tmp_path / "model.keras")
    with quiet():
        model.save(tmp_path / "model.h5")
    Path(trace).unlink()
    for name in ("model.keras", "model.h5"):
        with pytest.raises(UnsafeModelError, match="Lambda"):
            models.read(tmp_path / name)
    assert not Path(trace).exists()


def test_a_process_that_reads_a_path_stays_without_tensorflow(tmp_path: Path) -> None:
    sound, unsafe = tmp_path / "sound.keras", tmp_path / "unsafe.keras"
    model, vector = image_model(), keras().Input((4,))
    model.save(sound)
    keras().Model(vector, keras().layers.Lambda(lambda x: x)(vector)).save(unsafe)
    command = [sys.executable, "-c", ELSEWHERE, str(sound), str(unsafe)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
    described, refused, unfit = done.stdout.splitlines()
    assert described == str(models.read(sound, input_shape=[4, 8, 8, 1]).info.to_dict())
    assert refused.startswith(f"{unsafe} has a Lambda layer")
    assert unfit.startswith("example_inputs are {'input': 'float32[2, 3]'}, and the model takes image")
    assert done.stderr == ""


def test_a_file_cannot_have_a_module_imported(tmp_path: Path) -> None:
    image_model().save(tmp_path / "model.keras")
    with zipfile.ZipFile(tmp_path / "model.keras") as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    config = json.loads(members["config.json"])
    config["config"]["layers"][1].update(module="antigravity", class_name="Layer", registered_name="Layer")
    with zipfile.ZipFile(tmp_path / "changed.keras", "w") as archive:
        for name, data in members.items():
            archive.writestr(name, json.dumps(config) if name == "config.json" else data)
    with pytest.raises(ModelError, match="register_keras_serializable"):
        models.read(tmp_path / "changed.keras")


def test_a_graph_that_calls_python_or_files_is_refused(tmp_path: Path) -> None:
    tf = tensorflow()
    for name, body in {
        "python": lambda x: tf.numpy_function(np.sin, [x], tf.float32),
        "files": lambda x: x + tf.strings.to_number(tf.io.read_file("/etc/hostname")),
    }.items():
        module = tf.Module()
        signature = [tf.TensorSpec((None, 2), tf.float32)]
        function = tf.function(body, input_signature=signature, autograph=False)
        tf.saved_model.save(module, str(tmp_path / name), signatures=function.get_concrete_function())
        with pytest.raises(UnsafeModelError, match="run Python or open files"):
            models.read(tmp_path / name)


def test_a_graph_that_writes_checkpoints_is_refused(tmp_path: Path) -> None:
    tf = tensorflow()
    victim = tmp_path / "victim"
    for name, make in {
        "save": lambda x: tf.raw_ops.SaveV2(
            prefix=str(victim), tensor_names=["a"], shape_and_slices=[""], tensors=[x]
        ),
        "old save": lambda x: tf.raw_ops.Save(filename=str(victim), tensor_names=["a"], data=[x]),
        "merge": lambda x: tf.raw_ops.MergeV2Checkpoints(
            checkpoint_prefixes=[str(victim)], destination_prefix=str(victim), delete_old_dirs=True
        ),
        "restore": lambda x: (
            tf.raw_ops.RestoreV2(
                prefix=str(victim), tensor_names=["a"], shape_and_slices=[""], dtypes=[tf.float32]
            )[0].op
        ),
        "nested": lambda x: (
            tf.cond(
                tf.reduce_sum(x) > 0,
                lambda: (
                    tf.raw_ops.Save(filename=str(victim), tensor_names=["a"], data=[x]) and tf.constant(1.0)
                ),
                lambda: tf.constant(0.0),
            ).op
        ),
        "cache": lambda x: (
            tf.data.Dataset.range(2).cache(str(victim)).reduce(np.int64(0), lambda a, b: a + b).op
        ),
    }.items():

        def body(x: Any, make: Any = make) -> Any:
            with tf.control_dependencies([make(x)]):
                return tf.identity(x)

        module = tf.Module()
        module.weight = tf.Variable(1.0)
        function = tf.function(body, input_signature=[tf.TensorSpec((None, 2), tf.float32)], autograph=False)
        tf.saved_model.save(module, str(tmp_path / name), signatures=function.get_concrete_function())
        with pytest.raises(UnsafeModelError, match="run Python or open files"):
            models.read(tmp_path / name)
    assert not list(tmp_path.glob("victim*"))


def test_hdf5_that_cannot_hold_operators_names_the_remedy(tmp_path: Path) -> None:
    layers = keras().layers
    vector = keras().Input((4,))
    hidden = layers.Dense(4)(vector)
    with quiet():
        keras().Model(vector, hidden + vector).save(tmp_path / "model.h5")
    with pytest.raises(ModelError, match=r"save the model as \.keras"):
        models.read(tmp_path / "model.h5")


def test_what_is_no_model_is_named(tmp_path: Path) -> None:
    model = image_model()
    model.save(tmp_path / "model.keras")
    whole = (tmp_path / "model.keras").read_bytes()
    model.save_weights(tmp_path / "some.weights.h5")
    (tmp_path / "cut.keras").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.h5").write_text("no model")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "saved_model.pb").write_bytes(b"\xff" * 40)
    tensorflow().saved_model.save(tensorflow().Module(), str(tmp_path / "bare"))
    for name, message in {
        "cut.keras": "cut short|damaged",
        "text.h5": "neither",
        "some.weights.h5": "weights without a model",
        "folder": "no SavedModel",
        "bare": "signatures",
    }.items():
        with pytest.raises(ModelError, match=message):
            models.read(tmp_path / name)
    with pytest.raises(ModelError, match="Keras 3 model"):
        models.read(object())


def test_nan_weights_are_found() -> None:
    model = image_model()
    model.layers[-1].bias.assign(np.full(10, np.nan, np.float32))
    with pytest.raises(ModelError, match="NaN in 'logits'"):
        models.read(model)


def test_text_is_no_input() -> None:
    with pytest.raises(ModelError, match="only numbers"):
        models._spec("words", "string", (None,))


def test_what_a_graph_says_is_told_without_its_trace() -> None:
    said = (
        "Graph execution error:\n\nDetected at node f/concat defined at (most recent call last):\n"
        '  File "<frozen runpy>", line 198, in _run_module_as_main\n\n'
        "ConcatOp : Dimension 0 in both shapes must be equal: shape[0] = [4,8] vs. shape[1] = [1,3]\n"
        "\t [[{{node f/concat}}]] [Op:__inference_body_3892]"
    )
    reason = "ConcatOp : Dimension 0 in both shapes must be equal: shape[0] = [4,8] vs. shape[1] = [1,3]"
    assert first_line(RuntimeError(said)) == f"RuntimeError: {reason}"
    assert first_line(ValueError("one\ntwo")) == "ValueError: one"


def test_names_fit_every_format() -> None:
    assert unique(["a/b:0", "a_b_0", "1st", ""]) == ["a_b_0", "a_b_0_2", "_1st", "_"]
