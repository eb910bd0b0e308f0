"""Reading models of PyTorch: every form, and every file that is not to be trusted."""

import io
import json
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hamerspace.exceptions import ConstraintError, ModelError, ModelNotFoundError, UnsafeModelError
from hamerspace.models.exported import load_exported
from hamerspace.models.pytorch import read
from hamerspace.runtimes.base import RunOptions

# What torch.jit says of itself.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning"),
]


class Net(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = torch.nn.Linear(6, 8)
        self.last = torch.nn.Linear(8, 3)

    def forward(self, x):
        return self.last(torch.relu(self.first(x)))


class Pair(torch.nn.Module):
    """Two inputs, one of them integers below 50."""

    def __init__(self) -> None:
        super().__init__()
        self.table = torch.nn.Embedding(50, 6)
        self.net = Net()

    def forward(self, tokens, scale):
        found = self.net(self.table(tokens)).mean(1)
        return {"logits": found * scale, "pooled": found}


class Hostile:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def batch(*shape: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(0).standard_normal(shape).astype("float32"))


def outputs(source, feeds):
    return source.original(RunOptions(threads=1)).run({name: one.numpy() for name, one in feeds.items()})


@pytest.fixture
def net() -> torch.nn.Module:
    torch.manual_seed(0)
    return Net()


@pytest.fixture
def exported(net, tmp_path) -> Path:
    path = tmp_path / "net.pt2"
    free = torch.export.Dim("batch")
    torch.export.save(torch.export.export(net, (batch(4, 6),), dynamic_shapes=({0: free},)), path)
    return path


def test_a_module_keeps_its_mode_and_is_described(net):
    net.train()
    source = read(net, input_shape=[None, 6])
    assert net.training
    (spec,) = source.info.inputs
    assert (spec.name, spec.dtype, spec.shape) == ("x", "float32", ("batch", 6))
    assert [(one.name, one.shape) for one in source.info.outputs] == [("output", ("batch", 3))]
    assert source.info.parameters == 6 * 8 + 8 + 8 * 3 + 3
    assert source.info.size_bytes == 4 * source.info.parameters
    assert source.info.dynamic_axes == {"x": {0: "batch"}}


def test_a_module_that_begins_with_a_linear_layer_needs_no_shape(net):
    assert read(net).info.inputs[0].shape == (1, 6)


@pytest.mark.parametrize("form", ["torchscript", "exported", "state dict"])
def test_a_file_gives_what_the_module_gives(net, exported, tmp_path, form):
    x = batch(4, 6)
    path, options = tmp_path / "net.pt", {}
    if form == "exported":
        path = exported
    elif form == "torchscript":
        torch.jit.save(torch.jit.script(net), path)
        options = {"input_shape": [None, 6]}
    else:
        torch.save({"state_dict": net.state_dict(), "epoch": 3}, path)
        options = {"input_shape": [None, 6], "into": Net()}
    source = read(path, **options)
    assert source.info.form == {"state dict": "module"}.get(form, form)
    assert source.info.inputs[0].shape[0] == "batch"
    (given,) = outputs(source, {source.info.inputs[0].name: x}).values()
    np.testing.assert_allclose(given, net(x).detach().numpy(), rtol=1e-5, atol=1e-6)


def test_a_state_dict_needs_its_module_and_leaves_it_alone(net, tmp_path):
    torch.save(net.state_dict(), tmp_path / "net.pth")
    with pytest.raises(ModelError, match="model="):
        read(tmp_path / "net.pth")
    with pytest.raises(ModelError, match="does not fit"):
        read(tmp_path / "net.pth", into=torch.nn.Linear(2, 2), input_shape=[1, 2])
    other = Net()
    before = other.first.weight.clone()
    read(tmp_path / "net.pth", into=other, input_shape=[1, 6])
    assert torch.equal(other.first.weight, before)


def test_a_folder_of_transformers(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        vocab_size=40,
        max_position_embeddings=70,
    )
    model = transformers.BertModel(config).eval()
    model.save_pretrained(tmp_path)
    source = read(tmp_path)
    assert source.info.form == "transformers"
    assert [one.name for one in source.info.inputs] == ["input_ids", "attention_mask"]
    assert source.info.inputs[0].high == 40
    feeds = {
        "input_ids": torch.arange(16).reshape(2, 8),
        "attention_mask": torch.ones(2, 8, dtype=torch.int64),
    }
    with torch.no_grad():
        wanted = model(**feeds).last_hidden_state.numpy()
    np.testing.assert_allclose(outputs(source, feeds)["last_hidden_state"], wanted, atol=1e-5)


def test_several_inputs_with_integers_below_the_vocabulary():
    source = read(Pair(), input_shape={"tokens": [None, None], "scale": [None, 3]})
    tokens, scale = source.info.inputs
    assert (tokens.dtype, tokens.high, tokens.shape) == ("int64", 50, ("batch", "axis_1"))
    assert (scale.dtype, scale.high) == ("float32", None)
    assert source.info.structure == "dict"
    drawn = source.info.draw(64)["tokens"]
    assert drawn.shape == (64, 64)
    assert 40 < drawn.max() < 50
    assert {one.name for one in source.info.outputs} == {"logits", "pooled"}


def test_example_inputs_fix_dtypes():
    source = read(Pair(), example_inputs=(torch.ones(2, 5, dtype=torch.int32), torch.ones(2, 3)))
    assert [(one.dtype, one.shape) for one in source.info.inputs] == [("int32", (2, 5)), ("float32", (2, 3))]


@pytest.mark.parametrize("protocol", [2, 4])
def test_a_hostile_pickle_is_never_executed(tmp_path, protocol):
    mark = tmp_path / "executed"
    torch.save({"model": Hostile(mark)}, tmp_path / "bad.pt", pickle_protocol=protocol)
    with pytest.raises(ModelError):
        read(tmp_path / "bad.pt")
    assert not mark.exists()


def test_a_pickled_module_is_read_only_when_that_is_allowed(net, tmp_path):
    linear = torch.nn.Sequential(torch.nn.Linear(4, 2))
    torch.save(linear, tmp_path / "module.pt")
    with pytest.raises(UnsafeModelError, match="allow_pickle"):
        read(tmp_path / "module.pt")
    source = read(tmp_path / "module.pt", allow_pickle=True)
    x = batch(2, 4)
    np.testing.assert_allclose(outputs(source, {"input": x})["output"], linear(x).detach().numpy(), rtol=1e-6)


def rewrite(source: Path, target: Path, ending: str, change) -> None:
    """Copy a zip archive, stored as torch stores it, with one member changed."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        hit = [name for name in old.namelist() if name.endswith(ending)]
        assert len(hit) == 1, old.namelist()
        for name in old.namelist():
            data = old.read(name)
            new.writestr(name, change(data) if name == hit[0] else data)


def test_an_archive_cannot_have_tensors_unpickled(exported, tmp_path):
    mark = tmp_path / "executed"
    hostile = io.BytesIO()
    torch.save(Hostile(mark), hostile)

    def as_pickle(data: bytes) -> bytes:
        config = json.loads(data)
        next(iter(config["config"].values()))["use_pickle"] = True
        return json.dumps(config).encode()

    rewrite(exported, tmp_path / "one.pt2", "model_weights_config.json", as_pickle)
    rewrite(tmp_path / "one.pt2", tmp_path / "two.pt2", "weights/weight_0", lambda _: hostile.getvalue())
    with pytest.raises(ModelError):
        read(tmp_path / "two.pt2")
    rewrite(exported, tmp_path / "three.pt2", "sample_inputs/model.pt", lambda _: hostile.getvalue())
    with pytest.raises(ModelError):
        read(tmp_path / "three.pt2")
    assert not mark.exists()


def test_an_archive_cannot_name_functions_or_hold_code(exported, tmp_path):
    mark = tmp_path / "executed"

    def call_system(data: bytes) -> bytes:
        return data.replace(b'"torch.ops.aten.linear.default"', b'"torch.os.system"', 1)

    rewrite(exported, tmp_path / "call.pt2", "models/model.json", call_system)
    with pytest.raises(UnsafeModelError, match=r"torch\.os\.system"):
        read(tmp_path / "call.pt2")

    def open_file(data: bytes) -> bytes:
        return data.replace(b"torch.ops.aten.linear.default", b"torch.ops.aten.from_file.default", 1)

    rewrite(exported, tmp_path / "file.pt2", "models/model.json", open_file)
    with pytest.raises(UnsafeModelError, match="from_file"):
        read(tmp_path / "file.pt2")

    def evaluate(data: bytes) -> bytes:
        program = json.loads(data)
        text = json.dumps(program)
        assert '"expr_str"' in text
        start = text.index('"expr_str": "') + len('"expr_str": "')
        end = text.index('"', start)
        return (text[:start] + f"open('{mark}','w')" + text[end:]).encode()

    rewrite(exported, tmp_path / "expression.pt2", "models/model.json", evaluate)
    with pytest.raises(UnsafeModelError, match="expr_str"):
        read(tmp_path / "expression.pt2")

    def guard(data: bytes) -> bytes:
        program = json.loads(data)
        program["guards_code"] = [f"open('{mark}','w')"]
        return json.dumps(program).encode()

    rewrite(exported, tmp_path / "guard.pt2", "models/model.json", guard)
    load_exported(tmp_path / "guard.pt2").module()(batch(2, 6))
    assert not mark.exists()


@pytest.mark.parametrize("kind", ["exported", "torchscript", "state dict"])
def test_a_truncated_file_is_an_error_that_names_it(net, exported, tmp_path, kind):
    whole = tmp_path / ("net.pt2" if kind == "exported" else "net.pt")
    if kind == "torchscript":
        torch.jit.save(torch.jit.script(net), whole)
    elif kind == "state dict":
        torch.save(net.state_dict(), whole)
    data = whole.read_bytes()
    for share in (0.3, 0.9):
        whole.write_bytes(data[: int(len(data) * share)])
        with pytest.raises(ModelError, match=whole.name):
            read(whole, into=net, input_shape=[1, 6])


def test_what_is_no_model_is_refused(tmp_path):
    with pytest.raises(ModelNotFoundError):
        read(tmp_path / "missing.pt")
    (tmp_path / "empty.pt").touch()
    with pytest.raises(ModelError, match="empty"):
        read(tmp_path / "empty.pt")
    (tmp_path / "text.pt").write_text("no model")
    with pytest.raises(ModelError, match=r"text\.pt"):
        read(tmp_path / "text.pt")
    torch.save(torch.ones(3), tmp_path / "tensor.pt")
    with pytest.raises(ModelError, match="Tensor"):
        read(tmp_path / "tensor.pt")
    with pytest.raises(ModelError, match="int"):
        read(3)


def test_models_that_open_files_are_refused_before_they_do(tmp_path):
    class Saves(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            torch.save(x, "written")
            return x

    class Maps(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + torch.from_file("written", True, 4)

    for model in (Saves(), Maps()):
        torch.jit.script(model).save(str(tmp_path / "script.pt"))
        with pytest.raises(UnsafeModelError, match="opens files"):
            read(tmp_path / "script.pt", input_shape=[4])


class Sets(torch.nn.Module):
    """Writes a file as soon as it is loaded."""

    def __init__(self) -> None:
        super().__init__()
        self.w = torch.ones(2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.w

    @torch.jit.export
    def __getstate__(self) -> tuple[torch.Tensor, bool]:
        return self.w, self.training

    @torch.jit.export
    def __setstate__(self, state: tuple[torch.Tensor, bool]) -> None:
        self.w = state[0]
        self.training = state[1]
        torch.save(state[0], "written by loading")


@pytest.mark.parametrize("how", ["spaces", "decoy", "legacy"])
def test_torchscript_that_hides_what_it_does_is_refused(tmp_path, monkeypatch, how):
    monkeypatch.chdir(tmp_path)
    torch.jit.script(Sets()).save("plain.pt")
    with zipfile.ZipFile("plain.pt") as source, zipfile.ZipFile("model.pt", "w") as target:
        if how == "decoy":
            target.writestr("plain/code/a.py", b"x")
        if how == "legacy":
            target.writestr("plain/model.json", b"{}")
        for name in source.namelist():
            content = source.read(name)
            if name.endswith(".py"):
                content = content.replace(
                    b"torch.save", b"torch. \\\n save" if how == "spaces" else b"torch.save"
                )
                assert how != "spaces" or b"torch. " in content
            target.writestr(name, content)
    content = Path("model.pt").read_bytes()
    if how == "decoy":
        # Its local header is broken, so that Python's reader stops there, and torch's does not look.
        Path("model.pt").write_bytes(b"XX" + content[2:])
    with pytest.raises(ModelError):
        read("model.pt", input_shape=[2])
    assert not Path("written by loading").exists()


def test_archives_are_read_in_threads(exported):
    import os
    from concurrent.futures import ThreadPoolExecutor

    before = os.environ.get("TORCH_FORCE_WEIGHTS_ONLY_LOAD")
    with ThreadPoolExecutor(4) as pool:
        programs = list(pool.map(load_exported, [exported] * 16))
    assert all(len(list(one.graph.nodes)) == len(list(programs[0].graph.nodes)) for one in programs)
    assert os.environ.get("TORCH_FORCE_WEIGHTS_ONLY_LOAD") == before


def test_states_of_a_recurrent_layer_are_outputs():
    class Long(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm = torch.nn.LSTM(4, 5, batch_first=True)

        def forward(self, x):
            return self.lstm(x)

    source = read(Long(), input_shape=[2, 3, 4])
    assert [(one.name, one.shape, one.batch_axis) for one in source.info.outputs] == [
        ("output_0", (2, 3, 5), 0),
        ("output_1", (1, 2, 5), 1),
        ("output_2", (1, 2, 5), 1),
    ]
    assert source.info.structure == "tuple"


def test_words_in_names_tell_integers_and_floats_are_tried_too():
    class Masked(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = torch.nn.Conv2d(3, 4, 3)

        def forward(self, masked_image):
            return self.conv(masked_image)

    class Soft(torch.nn.Module):
        def forward(self, x, mask):
            return x @ mask

    assert read(Masked(), input_shape=[1, 3, 8, 8]).info.inputs[0].dtype == "float32"
    assert [one.dtype for one in read(Soft(), input_shape=[[2, 3], [3, 3]]).info.inputs] == ["float32"] * 2


def test_bfloat16_inputs_are_told(net):
    with pytest.raises(ModelError, match="bfloat16"):
        read(torch.nn.Linear(4, 2).bfloat16(), example_inputs=torch.ones(1, 4, dtype=torch.bfloat16))


def test_a_linked_file_keeps_its_own_name(net, tmp_path):
    (tmp_path / "blobs").mkdir()
    torch.jit.save(torch.jit.trace(net, batch(1, 6)), str(tmp_path / "blobs" / "f00d"))
    (tmp_path / "net.pt").symlink_to(tmp_path / "blobs" / "f00d")
    info = read(tmp_path / "net.pt", input_shape=[1, 6]).info
    assert (info.name, info.path) == ("net", str(tmp_path / "net.pt"))


def test_errors_without_words(net, tmp_path):
    class Bare(torch.nn.Module):
        def forward(self, x):
            raise AssertionError

    with pytest.raises(ModelError, match="AssertionError"):
        read(Bare(), input_shape=[1, 4])
    for content in (b"\x80\x02.", b"\x80\x02Nb."):
        (tmp_path / "bad.pt").write_bytes(content)
        with pytest.raises(ModelError):
            read(tmp_path / "bad.pt", input_shape=[1, 6], into=net)


def test_shapes_that_do_not_fit(net):
    with pytest.raises(ModelError, match="does not take"):
        read(net, input_shape=[1, 7])
    with pytest.raises(ConstraintError):
        read(net, input_shape=[1, 0])
    with pytest.raises(ConstraintError, match="takes"):
        read(Pair(), input_shape=[1, 5])
    with pytest.raises(ModelError, match="input_shape"):
        read(torch.nn.Conv2d(3, 4, 3))


def test_nan_outputs_are_refused(net):
    with torch.no_grad():
        net.last.bias[0] = float("nan")
    with pytest.raises(ModelError, match="NaN"):
        read(net, input_shape=[1, 6])


def test_a_live_module_reaches_another_process_as_it_is(net, tmp_path):
    source = read(net.eval(), input_shape=[None, 6])
    staged = source.stage(tmp_path)
    x = batch(3, 6)
    assert staged.model is None
    np.testing.assert_array_equal(outputs(staged, {"x": x})["output"], outputs(source, {"x": x})["output"])


class Recurrent(torch.nn.Module):
    """Gives [samples, steps, 5], and the last state of its layers, [layers, samples, 5]."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.gru = torch.nn.GRU(4, 5, num_layers=layers, batch_first=True)

    def forward(self, x):
        return self.gru(x)


@pytest.mark.parametrize("layers", [1, 2, 3])
@pytest.mark.parametrize("samples", [1, 2, None])
def test_which_axis_of_an_output_is_of_samples(layers, samples):
    info = read(Recurrent(layers), input_shape=[samples, 3, 4]).info
    assert [one.batch_axis for one in info.outputs] == [0, 1]
    assert info.outputs[1].shape == (layers, "batch" if samples is None else samples, 5)


@pytest.mark.parametrize("form", ["exported", "torchscript", "module"])
def test_shapes_that_contradict_the_model_or_its_examples(net, exported, form):
    if form == "exported":
        with pytest.raises(ConstraintError, match=r"the model takes x: float32\["):
            read(exported, input_shape=[1, 7])
    else:
        model = torch.jit.trace(net, batch(1, 6)) if form == "torchscript" else net
        for shape in ([4, 6], [None, 5], [1, 1, 6], [[1, 6], [1, 6]]):
            with pytest.raises(ConstraintError, match="agree"):
                read(model, input_shape=shape, example_inputs=batch(2, 6))
        assert read(model, input_shape=[None, 6], example_inputs=batch(2, 6)).info.inputs[0].shape == (
            "batch",
            6,
        )


def test_a_path_is_read_for_what_is_known_of_it(net, tmp_path, monkeypatch):
    from hamerspace import Benchmarker, Optimizer
    from hamerspace.models.source import ModelSource

    class Scaled(torch.nn.Module):
        def forward(self, x, factor):
            return x * factor

    torch.jit.save(torch.jit.script(Scaled()), str(tmp_path / "scaled.pt"))
    known = read(Scaled(), example_inputs={"x": batch(1, 5), "factor": torch.tensor([2])}).info
    assert ModelSource.of(tmp_path / "scaled.pt", known).info.inputs == known.inputs
    monkeypatch.chdir(tmp_path)
    optimizer = Optimizer("scaled.pt", known, [[3, 5], [1]])
    assert [one.shape for one in optimizer.model_info.inputs] == [(3, 5), (1,)]
    torch.jit.save(torch.jit.trace(net, batch(1, 6)), "net.pt")
    assert Benchmarker().benchmark_model("net.pt", None, "cpu", [4, 6], 4, 1).batch_size == 4
    Path("net.onnx").write_bytes(b"x")
    with pytest.raises(ModelError, match="is of onnx"):
        ModelSource.of("net.onnx", known)


def test_a_folder_of_transformers_without_all_weights(tmp_path):
    transformers = pytest.importorskip("transformers")
    from safetensors.torch import load_file, save_file

    config = transformers.BertConfig(
        vocab_size=30, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8
    )
    transformers.BertModel(config).save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    lost = "encoder.layer.0.output.dense.weight"
    save_file({name: one for name, one in weights.items() if name != lost}, tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match=f"lacks weights of BertModel.*{lost}"):
        read(tmp_path)
    save_file({**weights, lost: torch.zeros(3, 3)}, tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match="cannot be read by transformers"):
        read(tmp_path)


def test_garbage_is_not_taken_for_a_pickle(tmp_path):
    path = tmp_path / "garbage.pt"
    random = np.random.default_rng(0)
    for content in (b"\x80\x02" + random.bytes(100), b"\x80\x05\x95", b"\x80\x04K\x01" * 50, b"\x80"):
        path.write_bytes(content)
        with pytest.raises(ModelError) as caught:
            read(path, input_shape=[1, 6])
        assert not isinstance(caught.value, UnsafeModelError), content
        assert "damaged" in str(caught.value)


@pytest.mark.parametrize(
    "expression",
    ["9**9**9", "s0 << 9999999", "Pow(Integer(9), Pow(Integer(9), Integer(9)))", "(((9**60)**60)**60)**60",
     "PowByNatural(Integer(3), Integer(10000000))", "9**(9*9)"],
)  # fmt: skip
def test_an_expression_that_takes_for_ever_is_refused(expression):
    from hamerspace.models.exported import _check_program

    with pytest.raises(UnsafeModelError, match="expr_str"):
        _check_program({"expr_str": expression}, "it")
    for usual in (
        "s0**2*1024",
        "Mul(Integer(4096), Pow(Symbol('s0', integer=True), Integer(2)))",
        "Mod(s0, 9)",
    ):
        _check_program({"expr_str": usual}, "it")
