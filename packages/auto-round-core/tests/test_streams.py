"""Activations in memory and in files."""

import os
from pathlib import Path

import pytest
import torch
from auto_round.exceptions import AutoRoundError, ExportError
from auto_round.quantization._streams import Stream

BF16 = torch.bfloat16


def open_files() -> set[str]:
    return {path.name for path in Path("/proc/self/fd").iterdir()}


@pytest.mark.parametrize("on_disk", [False, True])
@pytest.mark.parametrize("dtype", [BF16, torch.float32])
def test_what_is_written_is_read(on_disk: bool, dtype: torch.dtype, tmp_path: Path) -> None:
    values = torch.randn(5, 3, 4).to(dtype)
    with Stream(5, (3, 4), dtype, tmp_path if on_disk else None) as stream:
        assert (stream.shape, stream.dtype) == ((3, 4), dtype)
        stream.write([4, 1, 0], values[[4, 1, 0]])
        stream.write([2, 3], values[[2, 3]].transpose(1, 2).contiguous().transpose(1, 2))
        assert torch.equal(stream.read([3, 0, 4, 1, 2]), values[[3, 0, 4, 1, 2]])
        assert stream.read([1], dtype=torch.float64).dtype == torch.float64
        # What comes back is the reader's own.
        stream.read([2]).fill_(7)
        assert torch.equal(stream.read([2]), values[[2]])
        # A file that nobody else can see, and that goes with the process.
        assert list(tmp_path.iterdir()) == []


def test_values_are_rounded_to_the_type_and_gradients_left_behind(tmp_path: Path) -> None:
    values = torch.randn(2, 3, requires_grad=True)
    for folder in (None, tmp_path):
        with Stream(2, (3,), BF16, folder) as stream:
            stream.write([0, 1], values * 2)
            found = stream.read([0, 1], dtype=torch.float32)
            assert torch.equal(found, (values.detach() * 2).to(BF16).float())
            assert not found.requires_grad


def test_a_file_takes_its_room_at_once_and_is_let_go(tmp_path: Path) -> None:
    before = open_files()
    stream = Stream(64, (1024,), torch.float32, tmp_path)
    assert stream._file is not None
    assert os.fstat(stream._file).st_size == 64 * 4096
    assert os.fstat(stream._file).st_blocks * 512 >= 64 * 4096
    stream.close()
    stream.close()
    assert open_files() == before
    for action in (lambda: stream.read([0]), lambda: stream.write([0], torch.zeros(1, 1024))):
        with pytest.raises(AutoRoundError, match="is closed"):
            action()


def test_a_disk_without_room_is_said_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    before = open_files()
    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(ExportError, match=r"no room for 3 MB of activations \(No space left.*workspace_"):
        Stream(3, (1 << 18,), torch.float32, tmp_path)
    assert open_files() == before
    with pytest.raises(AutoRoundError, match="No such file"):
        Stream(3, (4,), torch.float32, tmp_path / "missing")


def test_a_file_that_was_cut_is_an_error_and_no_endless_loop(tmp_path: Path) -> None:
    with Stream(4, (1024,), torch.float32, tmp_path) as stream:
        assert stream._file is not None
        os.ftruncate(stream._file, 4096)
        stream.read([0])
        with pytest.raises(AutoRoundError, match="became shorter"):
            stream.read([1])
