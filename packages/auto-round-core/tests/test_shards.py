"""The writer of safetensors against the safetensors library, and what it leaves when it cannot write."""

import json
import os
import resource
import signal
import subprocess
import sys
from collections import namedtuple
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from auto_round.exceptions import AutoRoundError, ConfigurationError, ExportError
from auto_round.export import _shards
from auto_round.export._shards import PlannedTensor, write_file, write_shards
from auto_round.export._whole_folder import check_folder, whole_folder
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

TYPES = (
    torch.bool,
    torch.uint8,
    torch.int8,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.int16,
    torch.float16,
    torch.bfloat16,
    torch.int32,
    torch.float32,
    torch.int64,
    torch.float64,
)


def values(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    count = torch.Size(shape).numel() * dtype.itemsize
    # Bytes of all kinds, NaN among them; a bool has two.
    content = torch.randint(0, 2 if dtype == torch.bool else 256, (count,), generator=generator)
    return content.to(torch.uint8).view(dtype).view(shape)


def planned(name: str, tensor: Tensor, pieces: int = 1) -> PlannedTensor:
    def give() -> Iterator[Tensor]:
        yield from tensor.chunk(pieces) if tensor.dim() else (tensor,)

    return PlannedTensor(name=name, dtype=tensor.dtype, shape=tuple(tensor.shape), pieces=give)


def same_bits(one: Tensor, other: Tensor) -> bool:
    same = one.dtype == other.dtype and one.shape == other.shape
    return same and bytes(one.contiguous().view(-1).view(torch.uint8).numpy()) == bytes(
        other.contiguous().view(-1).view(torch.uint8).numpy()
    )


@settings(max_examples=60, deadline=None)
@given(
    kinds=st.lists(
        st.tuples(
            st.text(min_size=1, max_size=8).filter(lambda name: name != "__metadata__"),
            st.sampled_from(TYPES),
            st.lists(st.integers(0, 5), max_size=3),
            st.integers(1, 3),
        ),
        max_size=8,
        unique_by=lambda kind: kind[0],
    ),
    most=st.integers(1, 300),
)
def test_the_library_reads_what_was_written(
    kinds: list[tuple[str, torch.dtype, list[int], int]],
    most: int,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    folder = tmp_path_factory.mktemp("shards")
    tensors = {name: values(tuple(shape), dtype, seed) for seed, (name, dtype, shape, _) in enumerate(kinds)}
    plan = [planned(name, tensors[name], pieces) for name, _, _, pieces in kinds]
    names = write_shards(folder, plan, most)
    found: dict[str, Tensor] = {}
    for name in names:
        if name.endswith(".safetensors"):
            part = load_file(folder / name)
            assert len(part) <= 1 or sum(tensor.nbytes for tensor in part.values()) <= most
            found |= part
    assert found.keys() == tensors.keys()
    assert all(same_bits(found[name], tensors[name]) for name in tensors)
    assert {path.name for path in folder.iterdir()} == set(names)


def test_tensors_are_aligned_whatever_their_order(tmp_path: Path) -> None:
    plan = [
        planned("a", values((3,), torch.int8)),
        planned("b", values((2,), torch.float64)),
        planned("c", values((1,), torch.float16)),
        planned("d", values((1,), torch.int32)),
    ]
    write_file(tmp_path / "x.safetensors", plan)
    content = (tmp_path / "x.safetensors").read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    assert length % 8 == 0
    assert header.pop("__metadata__") == {"format": "pt"}
    for name, size in (("a", 1), ("b", 8), ("c", 2), ("d", 4)):
        assert (8 + length + header[name]["data_offsets"][0]) % size == 0
    with safe_open(tmp_path / "x.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_shards_follow_the_plan_and_are_named_as_transformers_names_them(tmp_path: Path) -> None:
    plan = [planned(name, values((25,), torch.float32)) for name in "cab"] + [
        planned("large", values((90,), torch.float32))
    ]
    names = write_shards(tmp_path, plan, 200)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert names[-1] == "model.safetensors.index.json"
    assert index["metadata"]["total_size"] == 3 * 100 + 360
    first, second, third = (f"model-0000{number}-of-00003.safetensors" for number in (1, 2, 3))
    assert index["weight_map"] == {"c": first, "a": first, "b": second, "large": third}


def test_a_tensor_is_asked_for_once_and_let_go_before_the_next(tmp_path: Path) -> None:
    alive = 0
    most = 0

    class Counted:
        def __init__(self) -> None:
            nonlocal alive, most
            alive += 1
            most = max(most, alive)

        def __del__(self) -> None:
            nonlocal alive
            alive -= 1

    def give() -> Iterator[Tensor]:
        for _ in range(3):
            tensor = torch.zeros(10)
            tensor.counted = Counted()  # pyright: ignore
            yield tensor
            del tensor

    plan = [
        PlannedTensor(name=name, dtype=torch.float32, shape=(30,), pieces=give) for name in ("a", "b", "c")
    ]
    write_file(tmp_path / "x.safetensors", plan)
    # The writer's variable holds a piece until the next is there.
    assert most <= 2
    assert alive == 0


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        ([planned("a", torch.zeros(1)), planned("a", torch.zeros(2))], "'a' of a tensor comes twice"),
        ([planned("__metadata__", torch.zeros(1))], "is not free"),
        (
            [PlannedTensor(name="a", dtype=torch.float32, shape=(2,), pieces=lambda: [torch.zeros(3)])],
            "8 bytes, and had 12",
        ),
        (
            [PlannedTensor(name="a", dtype=torch.float32, shape=(2,), pieces=lambda: [torch.ones(2).int()])],
            "was to be torch.float32, and its values are torch.int32",
        ),
        (
            [PlannedTensor(name="a", dtype=torch.complex128, shape=(1,), pieces=list)],
            "is torch.complex128; safetensors holds",
        ),
    ],
)
def test_an_impossible_plan_is_refused(plan: list[PlannedTensor], message: str, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=message):
        write_shards(tmp_path, plan, 100)


def test_a_header_beyond_the_formats_limit_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_shards, "MOST_BYTES", 100)
    with pytest.raises(ExportError, match="max_shard_size"):
        write_shards(tmp_path, [planned("a" * 100, torch.zeros(1))], 100)


def test_a_disk_that_is_too_small_is_refused_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "free")(3_000_000)
    monkeypatch.setattr(_shards.shutil, "disk_usage", lambda _: usage)
    asked: list[str] = []
    plan = PlannedTensor(
        name="a",
        dtype=torch.float32,
        shape=(10**6,),
        pieces=lambda: asked.append("a") or [torch.zeros(10**6)],
    )
    with pytest.raises(ExportError, match=r"take 4 MB, and the disk of .* has 3 MB left"):
        write_shards(tmp_path, [plan], 10**9)
    assert not asked


def test_a_disk_that_becomes_full_leaves_nothing(tmp_path: Path) -> None:
    target = tmp_path / "export"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    # The kernel refuses to let a file grow beyond this, as it does on a full disk.
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
    try:
        with (
            pytest.raises(ExportError, match="cannot be written: File too large") as caught,
            whole_folder(target) as folder,
        ):
            write_shards(folder, [planned("a", torch.zeros(5000), 5)], 10**6)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert isinstance(caught.value, AutoRoundError)
    assert isinstance(caught.value, OSError)
    assert list(tmp_path.iterdir()) == []


KILLED = """
import os, signal, sys
from pathlib import Path
import torch
from auto_round.export._shards import PlannedTensor, write_shards
from auto_round.export._whole_folder import whole_folder

def give():
    yield torch.zeros(1000)
    os.kill(os.getpid(), signal.SIGKILL)

with whole_folder(Path(sys.argv[1])) as folder:
    plan = PlannedTensor(name="a", dtype=torch.float32, shape=(2000,), pieces=give)
    write_shards(folder, [plan], 10**6)
"""


def test_a_process_that_is_killed_leaves_nothing_under_the_name(tmp_path: Path) -> None:
    target = tmp_path / "export"
    done = subprocess.run([sys.executable, "-c", KILLED, target], check=False)
    assert done.returncode == -signal.SIGKILL
    assert not target.exists()
    assert [path.name.startswith(".export.") for path in tmp_path.iterdir()] == [True]


def test_a_folder_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "export"
    with whole_folder(target) as folder:
        (folder / "a").write_text("a")
        assert not target.exists()
        assert folder.parent == target.parent
        assert folder.name.startswith(".")
    assert [path.name for path in target.iterdir()] == ["a"]
    assert [path.name for path in target.parent.iterdir()] == ["export"]
    umask = os.umask(0)
    os.umask(umask)
    assert target.stat().st_mode & 0o777 == 0o777 & ~umask
    with pytest.raises(KeyboardInterrupt), whole_folder(tmp_path / "other"):
        raise KeyboardInterrupt
    assert [path.name for path in tmp_path.iterdir()] == ["deep"]


def test_what_is_there_is_not_touched(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with whole_folder(tmp_path / "empty") as folder:
        (folder / "a").write_text("a")
    for name in ("full", "file", "link"):
        target = tmp_path / name
        if name == "full":
            target.mkdir()
            (target / "precious").write_text("x")
        elif name == "file":
            target.write_text("x")
        else:
            target.symlink_to(tmp_path / "nowhere")
        with pytest.raises(ConfigurationError, match=r"export\.export_path"):
            check_folder(target)
        with pytest.raises(ConfigurationError, match=r"export\.export_path"), whole_folder(target):
            pytest.fail("was entered")
    assert (tmp_path / "full" / "precious").read_text() == "x"


def test_a_folder_that_is_filled_meanwhile_stays_as_it_is(tmp_path: Path) -> None:
    target = tmp_path / "export"

    def fill(folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        (folder / "precious").write_text("x")

    with pytest.raises(ExportError, match="not empty"), whole_folder(target):
        fill(target)
    assert [path.name for path in tmp_path.iterdir()] == ["export"]
    assert [path.name for path in target.iterdir()] == ["precious"]


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(ExportError, match=r"export\.export_path"), whole_folder(tmp_path / "file" / "export"):
        pytest.fail("was entered")
