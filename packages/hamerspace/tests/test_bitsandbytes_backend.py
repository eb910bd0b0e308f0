"""The backend of bitsandbytes: int8 and nf4, opened again in another process."""

import os
import subprocess
import sys
import zipfile
from dataclasses import replace

import numpy as np
import pytest
import torch
from hamerspace.artifact import read_manifest
from hamerspace.backends import get_backend
from hamerspace.backends.base import BuildContext, build_artifact
from hamerspace.exceptions import UnsupportedError
from hamerspace.models.pytorch import read
from hamerspace.runtimes.base import RunOptions

pytest.importorskip("bitsandbytes")

REOPEN = """
import os, sys
import numpy as np
from hamerspace.backends import get_backend
for folder in sys.argv[2:]:
    given = get_backend("bitsandbytes").load(folder).run(dict(np.load(sys.argv[1])))
    np.savez(folder + ".npz", **given)
assert "HF_HUB_OFFLINE" not in os.environ
"""

NF4 = np.array(
    # Quantiles of a normal distribution, from appendix E of the QLoRA paper.
    [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
     -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
     0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
     0.7229568362236023, 1.0]
)  # fmt: skip


class Tokens(torch.nn.Module):
    """Odd sizes among the layers, one without bias."""

    def __init__(self) -> None:
        super().__init__()
        self.table = torch.nn.Embedding(300, 64)
        self.hidden = torch.nn.Linear(64, 512)
        self.middle = torch.nn.Linear(512, 256, bias=False)
        self.last = torch.nn.Linear(256, 10)

    def forward(self, tokens):
        return self.last(torch.relu(self.middle(torch.relu(self.hidden(self.table(tokens)))))).mean(1)


def make(source, technique, folder, device="cpu"):
    backend = get_backend("bitsandbytes")
    candidate = next(one for one in backend.candidates(source.info) if one.technique == technique)
    folder.mkdir()
    return build_artifact(
        backend,
        BuildContext(source=source, candidate=candidate, folder=folder, shared=folder.parent, device=device),
    )


@pytest.fixture
def source():
    torch.manual_seed(0)
    return read(Tokens().eval(), input_shape=[None, None])


def sqnr_db(wanted, given) -> float:
    return float(10 * np.log10((wanted**2).sum() / ((wanted - given) ** 2).sum()))


def test_what_reopens_elsewhere_is_what_was_built(source, tmp_path):
    feeds = source.info.draw(3, 5)
    np.savez(tmp_path / "feeds.npz", **feeds)
    made = {name: make(source, name, tmp_path / name) for name in ("int8", "nf4")}
    environment = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}
    done = subprocess.run(
        [sys.executable, "-c", REOPEN, str(tmp_path / "feeds.npz"), *(str(tmp_path / name) for name in made)],
        capture_output=True,
        text=True,
        timeout=300,
        env=environment,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    wanted = source.original(RunOptions(threads=1)).run(feeds)["output"]
    for name, least_db, least_ratio in (("int8", 30, 2.5), ("nf4", 12, 3.0)):
        manifest, built = made[name]
        given = dict(np.load(tmp_path / f"{name}.npz"))["output"]
        np.testing.assert_allclose(given, built.run(feeds)["output"], rtol=1e-4, atol=1e-5)
        assert sqnr_db(wanted, given) > least_db, name
        assert source.info.size_bytes / manifest.size_bytes > least_ratio, name
        assert read_manifest(tmp_path / name) == manifest
        assert manifest.inputs == source.info.inputs
        with zipfile.ZipFile(tmp_path / name / "model.pt2") as archive:
            assert not [one for one in archive.namelist() if "custom_obj" in one or "opaque_obj" in one]


def test_nf4_is_that_of_the_paper(tmp_path):
    torch.manual_seed(0)
    layer = torch.nn.Linear(64, 32, bias=False)
    source = read(layer.eval(), input_shape=[None, 64])
    make(source, "nf4", tmp_path / "nf4")
    # What comes out for unit vectors is the stored weight itself.
    eye = np.eye(64, dtype="float32")
    given = get_backend("bitsandbytes").load(tmp_path / "nf4").run({source.info.inputs[0].name: eye})
    stored = next(iter(given.values())).T
    for row, wanted in zip(stored, layer.weight.detach().numpy(), strict=True):
        levels = NF4 * np.abs(row).max()
        nearest = np.abs(row[:, None] - levels).min(1)
        assert nearest.max() < 1e-5
        gaps = np.diff(NF4).max() / 2
        assert np.abs(row - wanted).max() <= (gaps + 0.02) * np.abs(wanted).max()


def test_a_row_of_zeros_stays_finite(tmp_path):
    source = read(torch.nn.Linear(64, 8).eval(), input_shape=[None, 64])
    make(source, "int8", tmp_path / "int8")
    name = source.info.inputs[0].name
    given = get_backend("bitsandbytes").load(tmp_path / "int8").run({name: np.zeros((2, 64), "float32")})
    np.testing.assert_allclose(
        next(iter(given.values())), np.broadcast_to(source.model.bias.detach().numpy(), (2, 8)), atol=1e-6
    )


def test_the_callers_model_is_left_alone(source, tmp_path):
    make(source, "int8", tmp_path / "int8")
    assert type(source.model.hidden) is torch.nn.Linear


def test_what_has_no_linear_layers_is_refused(source, tmp_path):
    backend = get_backend("bitsandbytes")
    for form in ("torchscript", "exported"):
        assert not backend.supports_model(replace(source.info, form=form))
        assert backend.candidates(replace(source.info, form=form)) == []
    convolution = read(torch.nn.Conv2d(1, 2, 3).eval(), input_shape=[1, 1, 8, 8])
    with pytest.raises(UnsupportedError, match="no linear layers"):
        make(convolution, "nf4", tmp_path / "nf4")


@pytest.mark.cuda
@pytest.mark.parametrize("technique", ["int8", "nf4"])
def test_on_cuda(source, tmp_path, technique):
    make(source, technique, tmp_path / technique, device="cuda")
    feeds = source.info.draw(3, 5)
    options = RunOptions(device="cuda")
    given = get_backend("bitsandbytes").load(tmp_path / technique, options).run(feeds)["output"]
    wanted = source.original(RunOptions(threads=1)).run(feeds)["output"]
    assert sqnr_db(wanted, given) > 12
