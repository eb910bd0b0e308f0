"""The backend of PyTorch: every technique is built, and opened again in another process."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hamerspace.artifact import read_manifest
from hamerspace.backends import get_backend
from hamerspace.backends._pytorch_compile import compile_package, why_no_compiler
from hamerspace.backends._pytorch_quantize import has_torch_ao
from hamerspace.backends.base import BuildContext, build_artifact
from hamerspace.exceptions import (
    ArtifactError,
    BackendError,
    BackendUnavailableError,
    ConstraintError,
    UnsupportedError,
)
from hamerspace.models.info import ModelInfo
from hamerspace.models.pytorch import read
from hamerspace.runtimes.base import RunOptions

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning"),
]

needs_ao = pytest.mark.skipif(not has_torch_ao(), reason="this torch has no torch.ao.quantization")
needs_compiler = pytest.mark.skipif(why_no_compiler() is not None, reason=str(why_no_compiler()))

REOPEN = """
import json, sys
from pathlib import Path
import numpy as np
from hamerspace.backends import get_backend
for folder, feeds in json.loads(sys.argv[1]):
    runner = get_backend("pytorch").load(folder)
    given = runner.run(dict(np.load(feeds)))
    np.savez(Path(folder).parent / (Path(folder).name + ".npz"), **given)
print(sorted(name for name in sys.modules if name.startswith(("test_", "bitsandbytes"))))
"""


class Convolutions(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.Sequential(
            torch.nn.Conv2d(1, 32, 3, padding=1),
            torch.nn.BatchNorm2d(32),
            torch.nn.ReLU(),
            torch.nn.MaxPool2d(2),
            torch.nn.Conv2d(32, 64, 3, padding=1),
            torch.nn.ReLU(),
            torch.nn.Flatten(),
            torch.nn.Linear(1024, 128),
            torch.nn.ReLU(),
            torch.nn.Linear(128, 10),
        )

    def forward(self, image):
        return self.layers(image)


class Tokens(torch.nn.Module):
    """Two inputs, two outputs by name, a length that is free."""

    def __init__(self) -> None:
        super().__init__()
        self.table = torch.nn.Embedding(2000, 64, padding_idx=0)
        self.hidden = torch.nn.Linear(64, 128)
        self.last = torch.nn.Linear(128, 48)

    def forward(self, tokens, mask):
        found = self.last(torch.nn.functional.gelu(self.hidden(self.table(tokens))))
        weights = mask.unsqueeze(-1).to(found.dtype)
        return {"states": found, "pooled": (found * weights).sum(1) / weights.sum(1)}


def source_of(kind: str):
    torch.manual_seed(0)
    if kind == "convolutions":
        return read(Convolutions().eval(), input_shape=[None, 1, 8, 8])
    return read(Tokens().eval(), input_shape={"tokens": [None, None], "mask": [None, None]})


def feeds_of(info: ModelInfo, batch: int = 3, seed: int = 9):
    return info.draw(batch, seed)


def original(source, feeds):
    return source.original(RunOptions(threads=1)).run(feeds)


def cosine(one, other) -> float:
    one, other = one.ravel().astype("float64"), other.ravel().astype("float64")
    return float(one @ other / np.sqrt((one @ one) * (other @ other)))


@pytest.fixture
def build(tmp_path):
    """Builds a technique into a folder named after it."""
    (tmp_path / "shared").mkdir()

    def make(source, technique: str, **options):
        backend = get_backend("pytorch")
        candidate = next(one for one in backend.candidates(source.info) if one.technique == technique)
        candidate = replace(candidate, options={**candidate.options, **options})
        folder = tmp_path / technique
        folder.mkdir()
        calibration = (
            [source.info.draw(16, seed) for seed in range(4)] if candidate.needs_calibration else None
        )
        context = BuildContext(
            source=source,
            candidate=candidate,
            folder=folder,
            shared=tmp_path / "shared",
            calibration=calibration,
        )
        manifest, built = build_artifact(backend, context)
        return folder, manifest, built, candidate

    return make


def reopen(folders: list[Path], feeds) -> list[dict[str, np.ndarray]]:
    """Outputs of artifacts in a process that knows nothing of the models."""
    given = folders[0].parent / "feeds.npz"
    np.savez(given, **feeds)
    jobs = json.dumps([(str(folder), str(given)) for folder in folders])
    done = subprocess.run([sys.executable, "-c", REOPEN, jobs], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.strip().splitlines()[-1] == "[]"
    return [dict(np.load(folder.parent / f"{folder.name}.npz")) for folder in folders]


# Cosine with the float model, and how many times smaller the artifact is than the float weights, at least.
CONVOLUTIONS = [
    pytest.param("export", 1 - 1e-9, 0.8),
    pytest.param("torchscript", 1 - 1e-9, 0.8),
    pytest.param("int8-static", 0.998, 2.5, marks=needs_ao),
]
TOKENS = [
    pytest.param("export", 1 - 1e-9, 0.8),
    pytest.param("torchscript", 1 - 1e-9, 0.8),
    pytest.param("int8-dynamic", 0.998, 2.5, marks=needs_ao),
    pytest.param("int8-weight", 0.999, 2.0),
    pytest.param("int4-weight", 0.98, 2.5),
]
COMPILED = [pytest.param("compiled", 1 - 1e-9, 0.5)]


@pytest.mark.parametrize(
    ("kind", "techniques"),
    [
        pytest.param("convolutions", CONVOLUTIONS, id="convolutions"),
        pytest.param("tokens", TOKENS, id="tokens"),
        pytest.param("tokens", COMPILED, id="compiled", marks=[needs_compiler, pytest.mark.slow]),
    ],
)
def test_what_reopens_elsewhere_is_what_was_built(build, kind, techniques):
    source = source_of(kind)
    feeds = feeds_of(source.info)
    wanted = original(source, feeds)
    built = []
    for one in techniques:
        if any(mark.name == "skipif" and mark.args[0] for mark in one.marks):
            continue
        technique, least_cosine, least_ratio = one.values
        built.append((technique, least_cosine, least_ratio, *build(source, technique)))
    reopened = reopen([folder for _, _, _, folder, *_ in built], feeds)
    for (technique, least_cosine, least_ratio, folder, manifest, made, candidate), given in zip(
        built, reopened, strict=True
    ):
        assert list(given) == list(wanted), technique
        in_memory = made.run(feeds)
        for name, array in given.items():
            assert array.shape == wanted[name].shape, technique
            assert cosine(array, wanted[name]) >= least_cosine, technique
            scale = np.abs(in_memory[name]).max()
            assert np.abs(array - in_memory[name]).max() <= candidate.tolerance * scale, technique
        assert source.info.size_bytes / manifest.size_bytes >= least_ratio, (technique, manifest.size_bytes)
        assert read_manifest(folder) == manifest
        assert [one.shape[0] for one in manifest.inputs] == ["batch"] * len(source.info.inputs), technique


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "technique"), [("convolutions", "int8-static-compiled"), ("tokens", "int8-dynamic-compiled")]
)
def test_compiled_int8_is_for_one_shape_and_keeps_its_word(build, kind, technique):
    source = source_of(kind)
    folder, manifest, built, candidate = build(source, technique)
    assert manifest.runtime == "aot_inductor"
    assert not any(isinstance(length, str) for one in manifest.inputs for length in one.shape)
    feeds = feeds_of(replace(source.info, inputs=manifest.inputs), batch=1)
    (given,) = reopen([folder], feeds)
    in_memory = built.run(feeds)
    for name, array in original(source, feeds).items():
        assert cosine(given[name], array) > 0.998
        scale = np.abs(in_memory[name]).max()
        assert np.abs(given[name] - in_memory[name]).max() <= candidate.tolerance * scale


def test_compiled_code_that_is_another_model_is_no_result():
    from hamerspace.backends.pytorch import _check_drift

    batches = [(torch.randn(4, 8, generator=torch.Generator().manual_seed(seed)),) for seed in range(4)]
    noise = torch.Generator().manual_seed(9)

    def noisy(x, share):
        return x + share * torch.randn(x.shape, generator=noise)

    # Another quantisation of the same model, with noise of its own, goes; four times the noise does not.
    _check_drift(lambda x: x, lambda x: noisy(x, 0.1), lambda x: noisy(x, 0.1), batches)
    for wrong in (lambda x: noisy(x, 0.4), torch.zeros_like, lambda x: x.flip(1), lambda x: x * float("nan")):
        with pytest.raises(BackendError, match="compiling changed the int8 model"):
            _check_drift(lambda x: x, lambda x: noisy(x, 0.1), wrong, batches)
    with pytest.raises(BackendError, match="compiling changed"):
        _check_drift(lambda x: x, lambda x: x, lambda x: noisy(x, 0.01), batches)


def test_an_archive_tells_nothing_of_where_it_was_made(build):
    folder, *_ = build(source_of("tokens"), "int8-weight")
    stored = (folder / "model.pt2").read_bytes()
    assert Path(__file__).name.encode() not in stored
    assert b"site-packages" not in stored


def test_free_axes_stay_free(build):
    source = source_of("tokens")
    folder, manifest, _, _ = build(source, "export")
    assert manifest.inputs == source.info.inputs
    runner = get_backend("pytorch").load(folder)
    for batch, length in ((1, 64), (1, 1), (7, 5)):
        feeds = {
            "tokens": np.arange(batch * length).reshape(batch, length),
            "mask": np.ones((batch, length), manifest.inputs[1].dtype),
        }
        np.testing.assert_allclose(
            runner.run(feeds)["states"], original(source, feeds)["states"], rtol=1e-4, atol=1e-5
        )


def test_models_that_cannot_be_traced_are_exported_first(build):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=60, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64
    )
    shapes = {"input_ids": [1, 12], "attention_mask": [1, 12]}
    source = read(transformers.BertModel(config).eval(), input_shape=shapes)
    feeds = feeds_of(source.info, 1)
    wanted = original(source, feeds)
    techniques = {"torchscript": 0.99999, "int8-dynamic": 0.99, "int8-static": 0.98}
    reopened = reopen([build(source, technique)[0] for technique in techniques], feeds)
    for given, least_cosine in zip(reopened, techniques.values(), strict=True):
        assert list(given) == list(wanted)
        assert all(cosine(array, wanted[name]) >= least_cosine for name, array in given.items())


class Reshaped(torch.nn.Module):
    """Holds for a batch of one alone, once it has been traced."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(4, 4)

    def forward(self, x):
        return self.layer(x) * int(x.shape[0])


def test_axes_are_fixed_where_a_conversion_would_be_wrong(build):
    source = read(Reshaped().eval(), input_shape=[None, 4])
    folder, manifest, built, _ = build(source, "torchscript")
    assert manifest.inputs[0].shape == (1, 4)
    assert any("fixed" in note for note in built.notes)
    feeds = source.info.draw(1)
    np.testing.assert_allclose(
        get_backend("pytorch").load(folder).run(feeds)["output"], original(source, feeds)["output"], rtol=1e-5
    )


def test_pruning_zeroes_the_smallest_half_and_says_that_it_saves_nothing(build):
    source = source_of("convolutions")
    before = {name: one.clone() for name, one in source.model.state_dict().items()}
    folder, manifest, built, _ = build(source, "l1-50")
    assert all(torch.equal(one, before[name]) for name, one in source.model.state_dict().items())
    stored = torch.export.load(str(folder / "model.pt2")).state_dict
    for name, weight in before.items():
        if weight.ndim < 2:
            continue
        kept = next(one for key, one in stored.items() if key.endswith(name))
        cut = weight.abs().flatten().sort().values[weight.numel() // 2]
        expected = torch.where(weight.abs() < cut, 0, weight)
        assert torch.equal(kept, expected)
    assert manifest.size_bytes > 0.95 * source.info.size_bytes
    assert "no smaller" in built.notes[0]
    for amount in (0, 1, -0.1):
        (folder.parent / f"amount{amount}").mkdir()
        with pytest.raises(ConstraintError, match="between 0 and 1"):
            build_again(source, folder.parent, amount)


def build_again(source, room: Path, amount: float):
    backend = get_backend("pytorch")
    candidate = next(one for one in backend.candidates(source.info) if one.technique == "l1-50")
    context = BuildContext(
        source=source,
        candidate=replace(candidate, options={"amount": amount}),
        folder=room / f"amount{amount}",
        shared=room / "shared",
    )
    return backend.build(context)


def test_candidates_by_form_and_device():
    backend = get_backend("pytorch")
    info = source_of("tokens").info
    everything = {one.technique for one in backend.candidates(info)}
    assert {"int8-static", "int8-dynamic", "int8-weight", "int4-weight", "compiled", "l1-50"} <= everything
    script = backend.candidates(replace(info, form="torchscript"))
    assert [one.technique for one in script] == ["torchscript"]
    exported = {one.technique for one in backend.candidates(replace(info, form="exported"))}
    assert "int8-static-compiled" in exported
    assert "int8-dynamic" not in exported
    assert "int8-dynamic" not in {one.technique for one in backend.candidates(info, hardware="cuda")}
    keras = replace(info, framework="tensorflow")
    assert not backend.supports_model(keras)
    assert backend.candidates(keras) == []


def test_torchscript_and_archives_as_sources(build, tmp_path):
    torch.manual_seed(0)
    net = Convolutions().eval()
    torch.jit.save(torch.jit.script(net), tmp_path / "net.pt")
    free = ({0: torch.export.Dim("batch")},)
    torch.export.save(
        torch.export.export(net, (torch.randn(2, 1, 8, 8),), dynamic_shapes=free), tmp_path / "net.pt2"
    )
    for path, technique, shape in (
        ("net.pt", "torchscript", [None, 1, 8, 8]),
        ("net.pt2", "export", None),
    ):
        source = read(tmp_path / path, input_shape=shape)
        folder, manifest, _, _ = build(source, technique)
        feeds = feeds_of(source.info)
        given = get_backend("pytorch").load(folder).run(feeds)["output"]
        with torch.no_grad():
            wanted = net(torch.from_numpy(next(iter(feeds.values())))).numpy()
        np.testing.assert_allclose(given, wanted, rtol=1e-4, atol=1e-5)
        assert manifest.inputs[0].shape == ("batch", 1, 8, 8)


def test_models_without_layers_are_refused(build):
    class Sum(torch.nn.Module):
        def forward(self, x):
            return x.sum(1)

    source = read(Sum(), input_shape=[2, 4])
    for technique in ("int8-weight", "int4-weight", "l1-50"):
        with pytest.raises(UnsupportedError, match="no linear"):
            build(source, technique)


def test_without_torch_ao_the_compiled_form_is_named(build, monkeypatch):
    monkeypatch.setattr("hamerspace.backends.pytorch.has_torch_ao", lambda: False)
    with pytest.raises(BackendUnavailableError, match="int8-dynamic-compiled"):
        build(source_of("tokens"), "int8-dynamic")


def test_without_a_compiler_the_remedy_is_named(monkeypatch, tmp_path):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(BackendError, match=r"no-such-compiler.*install g\+\+"):
        compile_package(None, tmp_path / "model.pt2", threads=1, work=tmp_path)


def test_damaged_and_hostile_artifacts_are_refused(build):
    folder, manifest, _, _ = build(source_of("convolutions"), "export")
    backend = get_backend("pytorch")
    with pytest.raises(ArtifactError, match="only bitsandbytes, torchao"):
        backend.open(replace(manifest, options={"operators": ["antigravity"]}), folder, RunOptions())
    with pytest.raises(BackendError, match="made for cuda"):
        backend.open(replace(manifest, options={"device": "cuda"}), folder, RunOptions())
    path = folder / "model.pt2"
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(ArtifactError, match="damaged"):
        backend.load(folder)
    for runtime in ("torch_export", "torchscript", "aot_inductor"):
        with pytest.raises(ArtifactError, match=r"model\.pt2"):
            backend.open(replace(manifest, runtime=runtime), folder, RunOptions(allow_native=True))
