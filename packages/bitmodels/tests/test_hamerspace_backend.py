"""The backend for hamerspace: what is built, opened again in another process."""

import subprocess
import sys
import zipfile
from dataclasses import replace

import numpy as np
import pytest
import torch
from bitmodels.exceptions import QuantizationError
from hamerspace.artifact import read_manifest
from hamerspace.backends import BuildContext, backend_names, get_backend
from hamerspace.backends.base import build_artifact
from hamerspace.models.pytorch import read
from torch import nn

REOPEN = """
import sys
import numpy as np
from hamerspace.backends import get_backend
given = get_backend("bitmodels").load(sys.argv[1]).run(dict(np.load(sys.argv[2])))
np.savez(sys.argv[3], **given)
"""


class Net(nn.Module):
    """Three layers, of which one has no bias and one has outputs that fill no tile."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(256, 512)
        self.middle = nn.Linear(512, 256, bias=False)
        self.last = nn.Linear(256, 10)

    def forward(self, x):
        return self.last(torch.relu(self.middle(torch.relu(self.first(x)))))


@pytest.fixture
def source():
    torch.manual_seed(0)
    return read(Net().eval(), input_shape=[None, 256])


def build(source, folder):
    backend = get_backend("bitmodels")
    (candidate,) = backend.candidates(source.info)
    folder.mkdir()
    return build_artifact(
        backend, BuildContext(source=source, candidate=candidate, folder=folder, shared=folder.parent)
    )


def by_hand(model: Net, x: np.ndarray) -> np.ndarray:
    """BitNet b1.58 in float64: weights by their mean magnitude, each row of inputs by its largest."""
    for layer in (model.first, model.middle, model.last):
        weight = layer.weight.detach().numpy().astype("float64")
        scale = np.abs(weight).mean()
        ternary = np.clip(np.round(weight / scale), -1, 1)
        largest = np.abs(x).max(axis=1, keepdims=True)
        rounded = np.clip(np.round(x * (127 / largest)), -128, 127)
        x = rounded @ ternary.T * (scale * largest / 127)
        if layer.bias is not None:
            x = x + layer.bias.detach().numpy()
        if layer is not model.last:
            x = np.maximum(x, 0)
    return x


def test_it_is_found_by_its_entry_point():
    assert "bitmodels" in backend_names()
    assert get_backend("bitmodels").is_available()


def test_what_reopens_elsewhere_is_what_was_built(source, tmp_path):
    manifest, built = build(source, tmp_path / "artifact")
    assert read_manifest(tmp_path / "artifact") == manifest
    assert manifest.inputs == source.info.inputs
    assert built.notes == ("3 linear layers are ternary",)
    assert type(source.model.first) is nn.Linear

    feeds = source.info.draw(5, 3)
    np.savez(tmp_path / "feeds.npz", **feeds)
    paths = [str(tmp_path / name) for name in ("artifact", "feeds.npz", "given.npz")]
    done = subprocess.run([sys.executable, "-c", REOPEN, *paths], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    given = dict(np.load(tmp_path / "given.npz"))["output"]
    np.testing.assert_allclose(given, built.run(feeds)["output"], rtol=1e-5, atol=1e-6)
    # A value that lies on the edge of two codes may be rounded the other way in float32.
    wanted = by_hand(source.model, feeds["x"].astype("float64"))
    assert np.abs(given - wanted).max() < 0.01 * np.abs(wanted).max()


def test_a_weight_takes_about_two_bits(source, tmp_path):
    manifest, _ = build(source, tmp_path / "artifact")
    with zipfile.ZipFile(tmp_path / "artifact" / "model.pt2") as archive:
        stored = sum(
            one.file_size
            for one in archive.infolist()
            if "/data/weights/" in one.filename and not one.filename.endswith(".json")
        )
    weights = sum(one.weight.numel() for one in (source.model.first, source.model.middle, source.model.last))
    assert 2 <= 8 * stored / weights < 2.3
    # The rest is the program and the archive.
    assert manifest.size_bytes - stored < 60_000


def test_what_it_does_not_take(source, tmp_path):
    backend = get_backend("bitmodels")
    for other in (
        replace(source.info, framework="onnx", form="onnx"),
        replace(source.info, form="torchscript"),
        replace(source.info, form="exported"),
    ):
        assert not backend.supports_model(other)
        assert backend.candidates(other) == []
    convolution = read(nn.Conv2d(1, 2, 3).eval(), input_shape=[1, 1, 8, 8])
    with pytest.raises(QuantizationError):
        build(convolution, tmp_path / "artifact")
