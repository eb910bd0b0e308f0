"""What every backend does alike: options, and where what it makes is put."""

import stat
from pathlib import Path

import numpy as np
import pytest
import torch
from hamerspace import Backend, Constraints, Optimizer, backend_names, get_backend
from hamerspace.artifact import MANIFEST
from hamerspace.backends.base import BuildContext, Candidate
from hamerspace.backends.pytorch import PyTorchBackend
from hamerspace.exceptions import BackendError, ConstraintError
from hamerspace.strategies import PruningStrategy, QuantizationStrategy


def linear() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.ReLU(), torch.nn.Linear(8, 4))


INFO = Optimizer.from_pytorch(linear(), [1, 8]).model_info
CANDIDATE = Candidate(
    backend="b", technique="t", goal="quantize", description="",
    options={"bits": 4, "share": 0.5, "name": "a", "fast": True},
)  # fmt: skip


def test_options_keep_their_kind() -> None:
    made = CANDIDATE.with_options({"bits": np.int64(8), "share": np.float32(0.25), "fast": False})
    assert dict(made.options) == {"bits": 8, "share": 0.25, "name": "a", "fast": False}
    assert type(made.options["bits"]) is int
    assert CANDIDATE.options["bits"] == 4
    for wrong in ({"bit": 4}, {"bits": 4.5}, {"bits": "4"}, {"share": "much"}, {"share": float("nan")},
                  {"name": 3}, {"fast": 1}, {"bits": True}, {"bits": None}):  # fmt: skip
        with pytest.raises(ConstraintError, match=f"b/t.*{next(iter(wrong))}"):
            CANDIDATE.with_options(wrong)


@pytest.mark.parametrize("name", [one for one in backend_names() if get_backend(one).is_available()])
def test_options_that_a_backend_does_not_have_are_refused(name: str) -> None:
    backend = get_backend(name)
    if not backend.supports_model(INFO):
        return
    methods = {"quantize": backend.quantize, "graph": backend.optimize_graph, "prune": backend.prune}
    for one in backend.candidates(INFO):
        given = {"technique": one.technique, "amout": 0.3}
        if one.needs_calibration:
            given["calibration_data"] = np.zeros((4, 8), np.float32)
        with pytest.raises(ConstraintError, match="amout"):
            methods[one.goal](linear(), INFO, **given)


def test_options_reach_the_backend(tmp_path: Path) -> None:
    made = PruningStrategy(amount=0.75).apply(linear(), INFO, output=tmp_path / "pruned")
    program = torch.export.load(str(tmp_path / "pruned" / made.manifest.main))
    weights = [one for one in program.state_dict.values() if one.ndim == 2]
    assert all(float((one == 0).float().mean()) == 0.75 for one in weights)
    for wrong in (1.5, 0, -1):
        with pytest.raises(ConstraintError, match="amount"):
            get_backend(Backend.PYTORCH).prune(linear(), INFO, amount=wrong)


def test_a_folder_of_someone_elses_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years")
    with pytest.raises(FileExistsError, match=r"thesis\.txt"):
        get_backend(Backend.PYTORCH).optimize_graph(
            linear(), INFO, technique="export", output=tmp_path / "mine"
        )
    assert [one.name for one in (tmp_path / "mine").iterdir()] == ["thesis.txt"]


def test_what_fails_leaves_nothing_and_what_succeeds_replaces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend, folder = get_backend(Backend.PYTORCH), tmp_path / "made"
    for technique in ("export", "torchscript"):
        made = backend.optimize_graph(linear(), INFO, technique=technique, output=folder)
        assert made.folder == folder
        assert {one.name for one in folder.iterdir()} == {MANIFEST, *made.manifest.files}
        torch.testing.assert_close(made.load()(torch.ones(1, 8)), linear()(torch.ones(1, 8)))
    (tmp_path / "usual").mkdir()
    assert stat.S_IMODE(folder.stat().st_mode) == stat.S_IMODE((tmp_path / "usual").stat().st_mode)
    before = sorted(folder.iterdir())

    def fail(_: PyTorchBackend, context: BuildContext) -> None:
        (context.folder / "half").write_text("made")
        raise BackendError("a wheel came off")

    monkeypatch.setattr(PyTorchBackend, "build", fail)
    for output in (folder, tmp_path / "new"):
        with pytest.raises(BackendError, match="wheel"):
            backend.optimize_graph(linear(), INFO, technique="export", output=output)
    assert sorted(folder.iterdir()) == before
    assert sorted(one.name for one in tmp_path.iterdir()) == ["made", "usual"]


def test_a_strategy_with_an_option_of_another_backend() -> None:
    with pytest.raises(ConstraintError, match=r"no option 'block_size'; it has none"):
        QuantizationStrategy("int8-weight", {"block_size": 32}).apply(linear(), INFO)


def test_numbers_of_numpy_are_pythons_in_constraints() -> None:
    made = Constraints(target_size_mb=np.float32(2), max_latency_ms=np.int64(3), batch_size=np.int32(4))
    assert made == Constraints(target_size_mb=2, max_latency_ms=3, batch_size=4)
    assert all(type(one) in (int, float, str) for one in made.to_dict().values() if one is not None)
    for wrong in ({"batch_size": np.float64(2)}, {"batch_size": np.True_}, {"target_size_mb": np.nan}):
        with pytest.raises(ConstraintError, match=next(iter(wrong))):
            Constraints(**wrong)


def test_steps_keep_what_the_model_gives_and_read_their_data_once() -> None:
    from hamerspace.strategies import CompositeStrategy, GraphOptimizationStrategy

    class Two(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = linear()

        def forward(self, x):
            return self.body(x), x

    info = Optimizer.from_pytorch(Two(), [1, 8]).model_info
    batches = (np.random.default_rng(seed).normal(size=(1, 8)).astype("float32") for seed in range(4))
    made = CompositeStrategy([QuantizationStrategy("int8-static"), GraphOptimizationStrategy()]).apply(
        Two(), info, backend="onnx_runtime", calibration_data=batches
    )
    given = made.load()(torch.ones(1, 8))
    assert isinstance(given, tuple)
    torch.testing.assert_close(given[1], torch.ones(1, 8), atol=0.05, rtol=0)


def test_block_sizes_that_are_none() -> None:
    for wrong in (0, -4, 8, 100):
        with pytest.raises(ConstraintError, match="block_size"):
            get_backend(Backend.ONNX_RUNTIME).quantize(
                linear(), INFO, technique="int8-weight", block_size=wrong
            )


def test_a_number_beside_a_tensor_reaches_openvino() -> None:
    class Scaled(torch.nn.Module):
        def forward(self, x, factor):
            return x * factor

    examples = (torch.ones(1, 4), torch.tensor(2.0))
    info = Optimizer.from_pytorch(Scaled(), example_inputs=examples).model_info
    for name, technique in (("openvino", "fp32"), ("onnx_runtime", "graph")):
        made = get_backend(name).optimize_graph(Scaled(), info, technique=technique)
        torch.testing.assert_close(made.load()(*examples), torch.full((1, 4), 2.0))
