"""The reader against safetensors, torch and transformers, and against damaged files."""

import gc
import io
import json
import os
import struct
import tarfile
import threading
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from auto_round.exceptions import CheckpointError
from auto_round.low_cpu_mem import _stored
from auto_round.low_cpu_mem._checkpoint import CheckpointReader
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save, save_file
from torch import Tensor

SAFE_TYPES = [
    *(torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64),
    *(torch.uint16, torch.uint32, torch.uint64),
    *(torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64),
    *(torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz),
    torch.float8_e8m0fnu,
]


def random_tensor(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    if dtype == torch.bool:
        return torch.randint(0, 2, shape, generator=generator).bool()
    count = torch.Size(shape).numel() * dtype.itemsize
    # Any bits, NaNs included.
    raw = torch.randint(0, 256, (count,), dtype=torch.uint8, generator=generator)
    return raw.view(dtype).reshape(shape)


def bits(tensor: Tensor) -> tuple[torch.dtype, tuple[int, ...], bytes]:
    flat = torch.empty(tensor.numel(), dtype=tensor.dtype)
    flat.view(tensor.shape).copy_(tensor)
    return tensor.dtype, tuple(tensor.shape), flat.view(torch.uint8).numpy().tobytes()


def same_values(found: Tensor, expected: Tensor) -> bool:
    # Which NaN a conversion gives depends on how many values are converted at once.
    return found.dtype == expected.dtype and torch.allclose(found, expected, 0, 0, equal_nan=True)


def zip_of(records: dict[str, bytes], path: Path, *, compression: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in records.items():
            archive.writestr(f"archive/{name}", content)
    return path


def records_of(path: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(path) as archive:
        return {name.partition("/")[2]: archive.read(name) for name in archive.namelist()}


def safetensors_bytes(header: Any, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def entry(dtype: str = "F32", shape: Any = (1,), offsets: Any = (0, 4)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


# --- what is right ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", SAFE_TYPES, ids=str)
@pytest.mark.parametrize("ending", ["safetensors", "bin"])
def test_every_type_comes_back_bit_for_bit(tmp_path: Path, dtype: torch.dtype, ending: str) -> None:
    state = {
        "matrix": random_tensor((5, 7), dtype),
        "scalar": random_tensor((), dtype),
        "empty": random_tensor((0, 3), dtype),
    }
    path = tmp_path / f"x.{ending}"
    save_file(state, path) if ending == "safetensors" else torch.save(state, path)
    with CheckpointReader(path) as reader:
        assert set(reader.names) == set(state)
        for name, tensor in state.items():
            assert bits(reader.read(name)) == bits(tensor)
            info = reader.info(name)
            assert (info.shape, info.dtype, info.file) == (tuple(tensor.shape), dtype, path)
            assert info.bytes == tensor.numel() * tensor.element_size()


def test_four_bit_floats_have_two_values_a_byte(tmp_path: Path) -> None:
    raw = torch.arange(12, dtype=torch.uint8)
    save_file({"a": raw.reshape(3, 4).view(torch.float4_e2m1fn_x2)}, tmp_path / "x.safetensors")
    with CheckpointReader(tmp_path / "x.safetensors") as reader:
        tensor = reader.read("a")
        assert (tensor.dtype, tensor.shape) == (torch.float4_e2m1fn_x2, (3, 4))
        assert tensor.view(torch.uint8).flatten().tolist() == list(range(12))
        with pytest.raises(CheckpointError, match="cannot be converted"):
            reader.read("a", dtype=torch.float32)


def test_hand_made_file(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    header = {"b": entry("I32", (2, 2), (4, 20)), "__metadata__": {"format": "pt"}, "a": entry()}
    # The format allows spaces after the header's JSON.
    text = json.dumps(header).encode() + b"   "
    path.write_bytes(safetensors_bytes(text, struct.pack("<f4i", 1.5, 1, -2, 3, 4)))
    with CheckpointReader(path) as reader:
        assert reader.names == ("b", "a")
        assert reader.read("a").tolist() == [1.5]
        assert reader.read("b").tolist() == [[1, -2], [3, 4]]
        assert reader.read_rows("b", slice(1, 2)).tolist() == [[3, 4]]
        assert reader.shares("a") is None
        assert "a" in reader
        assert "c" not in reader


@st.composite
def views(draw: st.DrawFn) -> Tensor:
    """A view of a small storage: sliced, transposed, expanded, with an offset."""
    dtype = draw(st.sampled_from([torch.uint8, torch.bfloat16, torch.float32, torch.float64]))
    shape = draw(st.lists(st.integers(0, 6), min_size=0, max_size=4))
    tensor = random_tensor(tuple(shape), dtype, draw(st.integers(0, 99)))
    for dimension in range(tensor.dim()):
        start = draw(st.integers(0, tensor.shape[dimension]))
        tensor = tensor.narrow(dimension, start, tensor.shape[dimension] - start)
        step = draw(st.integers(1, 3))
        tensor = tensor[(slice(None),) * dimension + (slice(None, None, step),)]
    tensor = tensor.permute(draw(st.permutations(range(tensor.dim()))))
    if draw(st.booleans()):
        tensor = tensor.unsqueeze(0).expand(draw(st.integers(1, 3)), *tensor.shape)
    return tensor


@settings(max_examples=120, deadline=None)
@given(tensor=views(), piece=st.sampled_from([8, 24, 1 << 20]), data=st.data())
def test_views_of_a_storage(tensor: Tensor, piece: int, data: st.DataObject, tmp_path_factory: Any) -> None:
    path = tmp_path_factory.mktemp("views") / "x.bin"
    torch.save({"a": tensor}, path)
    with pytest.MonkeyPatch.context() as patch, CheckpointReader(path) as reader:
        patch.setattr(_stored, "PIECE_BYTES", piece)
        found = reader.read("a")
        assert found.is_contiguous()
        assert bits(found) == bits(tensor)
        converted = reader.read("a", dtype=torch.float16)
        assert same_values(converted, tensor.to(torch.float16))
        if tensor.dim() and tensor.shape[0]:
            count = tensor.shape[0]
            rows = torch.tensor(
                data.draw(st.lists(st.integers(0, count - 1), max_size=12)), dtype=torch.int64
            )
            assert bits(reader.read_rows("a", rows)) == bits(tensor[rows])
            bounds = st.none() | st.integers(-count, count)
            step = data.draw(st.none() | st.sampled_from([1, 2, -1, -2]))
            part = slice(data.draw(bounds), data.draw(bounds), step)
            expected = tensor[torch.arange(count)[list(range(count))[part]]]
            assert same_values(reader.read_rows("a", part, dtype=torch.float32), expected.float())


def test_rows_are_read_in_runs_and_no_others_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_file({"a": random_tensor((100, 8), torch.float32)}, tmp_path / "model.safetensors")
    expected = load_file(tmp_path / "model.safetensors")["a"]
    with CheckpointReader(tmp_path) as reader:
        reads: list[int] = []
        real = os.preadv
        monkeypatch.setattr(os, "preadv", lambda fd, to, at: reads.append(len(to[0])) or real(fd, to, at))
        rows = torch.tensor([7, 8, 9, 3, 50, 51, 9], dtype=torch.int32)
        found = reader.read_rows("a", rows)
        assert bits(found) == bits(expected[rows.long()])
        # 3 alone, 7 to 9 at once although 9 comes twice, and 50 with 51.
        assert sorted(reads) == [32, 64, 96]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (torch.tensor([0, 4]), "no row 4; its rows are 0 to 3"),
        (torch.tensor([-1]), "no row -1"),
        (slice(0, 5), "outside its 4 rows"),
        (torch.tensor([[0]]), "one dimension"),
        (torch.tensor([True, False, True, True]), "bool"),
        (torch.tensor([1.0]), "float32"),
    ],
)
def test_rows_that_are_not_there(tmp_path: Path, rows: Any, message: str) -> None:
    save_file({"a.weight": torch.zeros(4, 2), "s": torch.tensor(1.0)}, tmp_path / "x.safetensors")
    with CheckpointReader(tmp_path / "x.safetensors") as reader:
        with pytest.raises(CheckpointError, match=message) as caught:
            reader.read_rows("a.weight", rows)
        assert "x.safetensors" in str(caught.value)
        assert "'a.weight'" in str(caught.value)
        with pytest.raises(CheckpointError, match="scalar"):
            reader.read_rows("s", slice(0, 1))


@pytest.mark.parametrize("zipped", [True, False])
def test_another_default_device_changes_nothing(tmp_path: Path, zipped: bool) -> None:
    weight = torch.arange(12.0).reshape(4, 3)
    torch.save({"a": weight.t()}, tmp_path / "x.bin", _use_new_zipfile_serialization=zipped)
    rows = torch.tensor([2, 0, 2])
    with torch.device("meta"), CheckpointReader(tmp_path / "x.bin") as reader:
        whole = reader.read("a", dtype=torch.float64)
        part = reader.read_rows("a", rows)
        turned = reader.read_rows("a", slice(None, None, -1))
    assert whole.tolist() == weight.t().tolist()
    assert part.tolist() == weight.t()[rows].tolist()
    assert turned.tolist() == weight.t().flip(0).tolist()


def test_what_is_read_belongs_to_the_caller(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.ones(3)}, path)
    before = path.read_bytes()
    with CheckpointReader(path) as reader, torch.device("meta"):
        first = reader.read("a")
        first.zero_()
        assert reader.read("a").tolist() == [1, 1, 1]
        assert torch.nn.Parameter(reader.read("a")).device.type == "cpu"
    assert path.read_bytes() == before


def test_conversion_holds_the_result_and_a_small_piece(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    value = torch.randn(3000, 1000).bfloat16()
    torch.save({"straight": value, "turned": value.clone().t()}, tmp_path / "x.bin")
    with CheckpointReader(tmp_path / "x.bin") as reader:
        made: list[int] = []
        real = torch.empty
        monkeypatch.setattr(torch, "empty", lambda *a, **k: made.append((t := real(*a, **k)).nbytes) or t)
        straight = reader.read("straight", dtype=torch.float32)
        turned = reader.read("turned", dtype=torch.float32)
    assert max(size for size in made if size != 12_000_000) <= 1 << 20
    assert bits(straight) == bits(value.float())
    assert bits(turned) == bits(value.t().float())


def test_tied_names_are_seen(tmp_path: Path) -> None:
    weight = torch.randn(6, 4)
    state = {
        "embed": weight,
        "head": weight,
        "rows": weight[:3],
        "turned": weight.t(),
        "parameter": torch.nn.Parameter(weight),
        "copy": weight.clone(),
    }
    torch.save(state, tmp_path / "pytorch_model.bin")
    with CheckpointReader(tmp_path) as reader:
        assert [reader.shares(name) for name in state] == [None, "embed", None, None, "embed", None]


def test_older_formats_of_torch(tmp_path: Path) -> None:
    weight = torch.randn(6, 4)
    state = {"a": weight, "tied": weight, "turned": weight.t()[1:], "step": 3, "half": weight.half()}
    torch.save(state, tmp_path / "x.bin", _use_new_zipfile_serialization=False)
    with CheckpointReader(tmp_path / "x.bin") as reader:
        assert reader.names == ("a", "tied", "turned", "half")
        assert reader.shares("tied") == "a"
        for name in reader.names:
            assert bits(reader.read(name)) == bits(state[name])
        assert bits(reader.read_rows("turned", torch.tensor([2, 0]))) == bits(state["turned"][[2, 0]])


def test_tensors_that_need_the_whole_file_are_named(tmp_path: Path) -> None:
    state = {"sparse": torch.eye(2).to_sparse(), "conjugate": torch.ones(2, dtype=torch.complex64).conj()}
    torch.save({**state, "plain": torch.ones(2), "epoch": 3}, tmp_path / "x.pt")
    with CheckpointReader(tmp_path / "x.pt") as reader:
        assert reader.read("plain").tolist() == [1, 1]
        for name in state:
            with pytest.raises(CheckpointError, match=f"x.pt.*'{name}'.*whole"):
                reader.read(name)
        with pytest.raises(CheckpointError, match="no tensor 'epoch'"):
            reader.info("epoch")


@pytest.mark.parametrize("safe", [True, False])
@pytest.mark.parametrize("indexed", [True, False])
def test_shards_that_transformers_wrote(tmp_path: Path, safe: bool, indexed: bool) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=128,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    model = transformers.LlamaForCausalLM(config)
    model.save_pretrained(tmp_path, max_shard_size="30KB")
    index = tmp_path / "model.safetensors.index.json"
    if not safe:
        # transformers 5 writes safetensors alone, so its shards are written again as it wrote them before.
        content = json.loads(index.read_text())
        for shard in sorted(set(content["weight_map"].values())):
            renamed = f"pytorch_{shard.removesuffix('.safetensors')}.bin"
            torch.save(load_file(tmp_path / shard), tmp_path / renamed)
            (tmp_path / shard).unlink()
        content["weight_map"] = {
            name: f"pytorch_{shard.removesuffix('.safetensors')}.bin"
            for name, shard in content["weight_map"].items()
        }
        index.unlink()
        index = tmp_path / "pytorch_model.bin.index.json"
        index.write_text(json.dumps(content))
    if not indexed:
        index.unlink()
    state = model.state_dict()
    with CheckpointReader(tmp_path) as reader:
        assert set(reader.names) == set(state)
        assert len({reader.info(name).file for name in reader.names}) > 2
        for name, tensor in state.items():
            assert bits(reader.read(name)) == bits(tensor)
    if indexed:
        with CheckpointReader(index) as reader:
            assert set(reader.names) == set(state)
    else:
        next(iter(tmp_path.glob("*model-00002-*"))).unlink()
        with pytest.raises(CheckpointError, match="missing is number 2"):
            CheckpointReader(tmp_path)


def test_order_of_preference_and_links(tmp_path: Path) -> None:
    # As in a cache of the Hub: snapshots hold links into a folder of blobs.
    folder, blobs = tmp_path / "snapshots" / "abc", tmp_path / "blobs"
    folder.mkdir(parents=True)
    blobs.mkdir()
    save_file({"a": torch.ones(1)}, blobs / "0123")
    torch.save({"a": torch.zeros(1)}, folder / "pytorch_model.bin")
    (folder / "model.safetensors").symlink_to("../../blobs/0123")
    with CheckpointReader(folder) as reader:
        assert reader.read("a").tolist() == [1]
    (blobs / "0123").unlink()
    with pytest.raises(CheckpointError, match=r"model.safetensors does not exist"):
        CheckpointReader(folder)


def test_threads_read_at_once_and_closing_waits(tmp_path: Path) -> None:
    state = {str(number): random_tensor((64, 64), torch.int32, number) for number in range(8)}
    save_file(state, tmp_path / "x.safetensors")
    reader = CheckpointReader(tmp_path / "x.safetensors")
    wrong: list[str] = []
    closed = threading.Event()

    def work(name: str) -> None:
        while True:
            try:
                if not torch.equal(reader.read(name), state[name]):
                    wrong.append(name)
            except CheckpointError as error:
                if "closed" not in str(error) or not closed.is_set():
                    wrong.append(str(error))
                return

    threads = [threading.Thread(target=work, args=(name,)) for name in state]
    for thread in threads:
        thread.start()
    for _ in range(200):
        assert torch.equal(reader.read("3"), state["3"])
    closed.set()
    reader.close()
    for thread in threads:
        thread.join()
    assert not wrong


def open_files() -> set[str]:
    return {str(path.readlink()) for path in Path("/proc/self/fd").iterdir() if path.is_symlink()}


def test_a_file_stays_open_while_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.ones(3)}, path)
    reader = CheckpointReader(path)
    real = os.preadv
    seen: list[bool] = []

    def closing(fd: int, buffers: Any, offset: int) -> int:
        # As another thread would. The number of a closed file may be that of any other by now.
        reader.close()
        seen.append(str(path) in open_files())
        return real(fd, buffers, offset)

    monkeypatch.setattr(os, "preadv", closing)
    assert reader.read("a").tolist() == [1, 1, 1]
    assert seen == [True]
    assert str(path) not in open_files()


def test_files_are_closed_by_the_block_the_finaliser_and_after_an_error(tmp_path: Path) -> None:
    good, bad = tmp_path / "good.safetensors", tmp_path / "bad.safetensors"
    save_file({"a": torch.ones(1)}, good)
    bad.write_bytes(safetensors_bytes({"a": entry()}))
    with CheckpointReader(good) as reader:
        assert str(good) in open_files()
    assert str(good) not in open_files()
    with pytest.raises(CheckpointError, match="closed"):
        reader.read("a")
    reader = CheckpointReader(good)
    del reader
    gc.collect()
    with pytest.raises(CheckpointError) as caught:
        CheckpointReader(bad)
    assert caught.value.__traceback__ is not None
    assert not {str(good), str(bad)} & open_files()


# --- what is wrong ----------------------------------------------------------------------------------------

HEADERS: dict[str, tuple[bytes, str]] = {
    "too short": (b"\x01\x02", "truncated"),
    "longer than the format allows": (struct.pack("<Q", 100_000_001) + b"{}", "allows 100000000"),
    "longer than the file": (struct.pack("<Q", 1000) + b"{}", "truncated"),
    "no JSON": (safetensors_bytes(b"{" + b"x" * 20), "JSON"),
    "no UTF-8": (safetensors_bytes(b'{"\xff": 1}'), "JSON"),
    "deep": (safetensors_bytes(b'{"a":' * 200_000), "JSON"),
    "a list": (safetensors_bytes(b"[]"), "must hold a JSON object"),
    "a name twice": (
        safetensors_bytes(b'{"a":%b,"a":%b}' % ((json.dumps(entry()).encode(),) * 2), bytes(4)),
        "'a' comes twice",
    ),
    "metadata": (safetensors_bytes({"__metadata__": {"a": 1}}), "__metadata__"),
    "no entry": (safetensors_bytes({"a": 3}), "'a'.*must have"),
    "a field more": (safetensors_bytes({"a": {**entry(), "x": 1}}, bytes(4)), "'a'.*must have"),
    "type": (safetensors_bytes({"a": entry("F33")}, bytes(4)), "'a'.*F33.*known are.*BF16"),
    "type without bytes": (safetensors_bytes({"a": entry("F6_E2M3")}, bytes(4)), "'a'.*F6"),
    "shape of text": (safetensors_bytes({"a": entry(shape="1")}, bytes(4)), "'a'.*shape"),
    "negative": (safetensors_bytes({"a": entry(shape=(-1, -1))}, bytes(4)), "'a'.*shape"),
    "truth as size": (safetensors_bytes({"a": entry(shape=(True,))}, bytes(4)), "'a'.*shape"),
    "overflow": (safetensors_bytes({"a": entry(shape=(2**62, 2**62, 0), offsets=(0, 0))}), "'a'.*larger"),
    "many dimensions": (safetensors_bytes({"a": entry(shape=(1,) * 65)}, bytes(4)), "'a'.*larger"),
    "huge number": (safetensors_bytes(b'{"a":' + b"9" * 5000 + b"}"), "JSON"),
    "shape and bytes": (safetensors_bytes({"a": entry(shape=(2,))}, bytes(4)), "'a'.*needs 8 bytes.*has 4"),
    "end before start": (safetensors_bytes({"a": entry(offsets=(4, 0))}, bytes(4)), "'a'.*data_offsets"),
    "outside": (safetensors_bytes({"a": entry()}, bytes(3)), "truncated"),
    "left over": (safetensors_bytes({"a": entry()}, bytes(5)), "1 bytes after its last tensor"),
    "gap": (safetensors_bytes({"a": entry(), "b": entry(offsets=(8, 12))}, bytes(12)), "'b'.*gaps"),
    "overlap": (safetensors_bytes({"a": entry(), "b": entry(offsets=(0, 4))}, bytes(4)), "'b'.*overlaps"),
    "half a byte": (safetensors_bytes({"a": entry("F4", (1,), (0, 0))}), "'a'.*whole bytes"),
}


@pytest.mark.parametrize("case", HEADERS)
def test_damaged_headers(tmp_path: Path, case: str) -> None:
    content, message = HEADERS[case]
    (tmp_path / "x.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match=message) as caught:
        CheckpointReader(tmp_path / "x.safetensors")
    assert "x.safetensors" in str(caught.value)


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_any_damage_is_an_error_of_ours_or_harmless(data: st.DataObject, tmp_path_factory: Any) -> None:
    state = {"a": torch.arange(4.0), "b": torch.arange(6).reshape(2, 3).t()}
    if data.draw(st.booleans()):
        content = bytearray(save({name: tensor.contiguous() for name, tensor in state.items()}))
    else:
        torch.save(state, stream := io.BytesIO())
        content = bytearray(stream.getvalue())
    if data.draw(st.booleans()):
        del content[data.draw(st.integers(0, len(content) - 1)) :]
    for _ in range(data.draw(st.integers(0, 4))):
        if content:
            content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.mktemp("damage") / "x"
    path.write_bytes(content)
    try:
        with CheckpointReader(path) as reader:
            for name in reader.names:
                assert reader.read(name).nbytes <= 1 << 26
    except CheckpointError as error:
        message = str(error)
    else:
        return
    assert str(path) in message


@pytest.mark.parametrize(
    "shard", ["../x.safetensors", "/etc/passwd", "a/b", "..", ".", "", "a\\b", "c:x", 3, None]
)
def test_shards_outside_the_folder(tmp_path: Path, shard: Any) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    save_file({"a": torch.ones(1)}, tmp_path / "x.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": shard}}))
    with pytest.raises(CheckpointError, match=r"index\.json.*'a'.*not the name of a file"):
        CheckpointReader(folder)


def test_indexes_that_do_not_fit(tmp_path: Path) -> None:
    index = tmp_path / "model.safetensors.index.json"
    save_file({"a": torch.ones(1)}, tmp_path / "one.safetensors")
    save_file({"a": torch.zeros(1), "b": torch.ones(1)}, tmp_path / "two.safetensors")
    cases = {
        json.dumps({"weight_map": {"a": "one.safetensors", "b": "three.safetensors"}}): "three.*'b'",
        json.dumps({"weight_map": {"b": "one.safetensors"}}): "one.safetensors lacks tensor 'b'",
        json.dumps({"weight_map": {}}): "no weight_map",
        json.dumps([]): "JSON object",
        '{"weight_map": {"a": "one.safetensors", "a": "two.safetensors"}}': "'a' comes twice",
        "{": "JSON",
    }
    for text, message in cases.items():
        index.write_text(text)
        with pytest.raises(CheckpointError, match=message):
            CheckpointReader(tmp_path)
    # What the index does not place is not there.
    index.write_text(json.dumps({"weight_map": {"b": "two.safetensors", "a": "one.safetensors"}}))
    with CheckpointReader(tmp_path) as reader:
        assert reader.names == ("b", "a")
        assert reader.read("a").tolist() == [1]


def test_a_name_in_two_shards_without_index(tmp_path: Path) -> None:
    for number in (1, 2):
        save_file({"a": torch.ones(1)}, tmp_path / f"model-{number:05d}-of-00002.safetensors")
    with pytest.raises(CheckpointError, match="both have a tensor 'a'"):
        CheckpointReader(tmp_path)


def test_shards_of_two_checkpoints_without_index(tmp_path: Path) -> None:
    for name in ("model-00001-of-00002.safetensors", "model-00001-of-00003.safetensors"):
        save_file({"a": torch.ones(1)}, tmp_path / name)
    with pytest.raises(CheckpointError, match="several checkpoints: of 00002 and of 00003"):
        CheckpointReader(tmp_path)


def test_what_is_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no weights: none of model.safetensors"):
        CheckpointReader(tmp_path)
    with pytest.raises(CheckpointError, match="does not exist"):
        CheckpointReader(tmp_path / "none.bin")
    (tmp_path / "model.bin").write_text("version https://git-lfs.github.com/spec/v1")
    with pytest.raises(CheckpointError, match="Git LFS"):
        CheckpointReader(tmp_path / "model.bin")
    for name in ("pipe.safetensors", "pipe.safetensors.index.json"):
        os.mkfifo(tmp_path / name)
        with pytest.raises(CheckpointError, match="not a regular file"):
            CheckpointReader(tmp_path / name)
    torch.save([torch.ones(1)], tmp_path / "list.pt")
    with pytest.raises(CheckpointError, match=r"list\.pt is no state dict.*a list"):
        CheckpointReader(tmp_path / "list.pt")
    torch.save({"model": {"a": torch.ones(1)}}, tmp_path / "nested.pt")
    with pytest.raises(CheckpointError, match=r"keys.*'model'"):
        CheckpointReader(tmp_path / "nested.pt")


def test_a_near_name_is_offered(tmp_path: Path) -> None:
    save_file({"model.layers.0.weight": torch.ones(1)}, tmp_path / "x.safetensors")
    with (
        CheckpointReader(tmp_path / "x.safetensors") as reader,
        pytest.raises(CheckpointError, match=r"did you mean 'model\.layers\.0\.weight'"),
    ):
        reader.read("layers.0.weight")


def test_a_file_that_shrinks_after_it_was_opened(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.ones(1000)}, path)
    with CheckpointReader(path) as reader:
        os.truncate(path, 2000)
        with pytest.raises(CheckpointError, match=r"tensor 'a'.*truncated"):
            reader.read("a")


def test_archives_that_torch_did_not_write(tmp_path: Path) -> None:
    path = tmp_path / "x.bin"
    torch.save({"a": torch.arange(4.0)}, path)
    records = records_of(path)
    squeezed = zip_of(records, tmp_path / "squeezed.bin", compression=zipfile.ZIP_DEFLATED)
    with pytest.raises(CheckpointError, match=r"squeezed.*compressed"):
        CheckpointReader(squeezed)
    with pytest.raises(CheckpointError, match=r"big.bin.*little-endian"):
        CheckpointReader(zip_of({**records, "byteorder": b"big"}, tmp_path / "big.bin"))
    with pytest.raises(CheckpointError, match=r"without data\.pkl"):
        CheckpointReader(zip_of({"x": b""}, tmp_path / "none.bin"))
    with pytest.raises(CheckpointError, match=r"storage '0'.*8 bytes"):
        CheckpointReader(zip_of({**records, "data/0": bytes(8)}, tmp_path / "short.bin"))
    with pytest.raises(CheckpointError, match=r"storage '0'.*not among the records"):
        CheckpointReader(zip_of({"data.pkl": records["data.pkl"]}, tmp_path / "gone.bin"))
    with zipfile.ZipFile(tmp_path / "twice.bin", "w") as archive:
        # zipfile itself warns of equal names, and the folder's does not count.
        for folder in ("one", "two"):
            archive.writestr(f"{folder}/data.pkl", records["data.pkl"])
    with pytest.raises(CheckpointError, match="two records"):
        CheckpointReader(tmp_path / "twice.bin")
    content = path.read_bytes()
    for cut in (len(content) // 3, len(content) - 10):
        (tmp_path / "cut.bin").write_bytes(content[:cut])
        with pytest.raises(CheckpointError, match=r"cut\.bin.*truncated"):
            CheckpointReader(tmp_path / "cut.bin")


def test_records_that_point_elsewhere(tmp_path: Path) -> None:
    path = tmp_path / "x.bin"
    torch.save({"a": torch.arange(4.0), "b": torch.arange(4.0)}, path)
    content = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        first, second = (archive.getinfo(f"x/data/{key}").header_offset for key in (0, 1))
    # The directory's entry of the second record (its offset is the last of 46 bytes) now names the first.
    where = content.rindex(struct.pack("<L", second))
    content[where : where + 4] = struct.pack("<L", first)
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"data/1.*does not agree"):
        CheckpointReader(path)


def test_large_archives_with_64_bit_fields(tmp_path: Path) -> None:
    torch.save({"a": torch.arange(4.0)}, tmp_path / "x.bin")
    with zipfile.ZipFile(tmp_path / "wide.bin", "w") as archive:
        for name, content in records_of(tmp_path / "x.bin").items():
            with archive.open(f"archive/{name}", "w", force_zip64=True) as file:
                file.write(content)
    with CheckpointReader(tmp_path / "wide.bin") as reader:
        assert reader.read("a").tolist() == [0, 1, 2, 3]


def test_records_that_reach_outside(tmp_path: Path) -> None:
    torch.save({"a": torch.arange(4.0)}, tmp_path / "x.bin")
    content = bytearray((tmp_path / "x.bin").read_bytes())
    entry_start = content.rindex(b"PK\x01\x02", 0, content.rindex(b"x/data/0"))
    # Both of the directory's sizes of a record of 16 bytes.
    content[entry_start + 20 : entry_start + 28] = struct.pack("<2L", 1 << 30, 1 << 30)
    (tmp_path / "long.bin").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"long\.bin.*data/0.*1073741824 bytes reach outside"):
        CheckpointReader(tmp_path / "long.bin")
    content[entry_start + 20 : entry_start + 28] = struct.pack("<2L", 200, 200)
    (tmp_path / "over.bin").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"over\.bin.*'data/0' and 'version' overlap"):
        CheckpointReader(tmp_path / "over.bin")


def test_a_tensor_that_repeats_a_few_bytes_without_end(tmp_path: Path) -> None:
    endless = torch.ones(1).expand(1 << 40)
    for zipped in (True, False):
        torch.save({"a": endless}, tmp_path / "x.bin", _use_new_zipfile_serialization=zipped)
        with pytest.raises(CheckpointError, match=r"x\.bin.*repeats 4 bytes"):
            CheckpointReader(tmp_path / "x.bin")
    torch.save({"a": torch.ones(1).expand(1000)}, tmp_path / "y.bin")
    with CheckpointReader(tmp_path / "y.bin") as reader:
        assert reader.read("a").sum() == 1000


def test_the_tar_format_of_torch_0_1(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "x.bin", "w", format=tarfile.USTAR_FORMAT) as archive:
        archive.addfile(tarfile.TarInfo("sys_info"))
    with pytest.raises(CheckpointError, match=r"x\.bin cannot be loaded"):
        CheckpointReader(tmp_path / "x.bin")
