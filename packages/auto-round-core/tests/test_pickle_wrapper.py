"""`load` and `dump` against pickle and torch, against attack files, and in the memory that they take."""

import builtins
import collections
import io
import json
import os
import pickle
import struct
import subprocess
import sys
import textwrap
import zipfile
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch
from auto_round.exceptions import CheckpointError, ConfigurationError, UnsafeFileError, UnsafeLoadWarning
from auto_round.low_cpu_mem import _pickle_machine, dump, dumps, load, loads
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

# --- what is right ----------------------------------------------------------------------------------------

scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.complex_numbers(allow_nan=False)
    | st.text()
    | st.binary()
    | st.sampled_from([torch.float32, torch.bfloat16, torch.device("cpu"), torch.device("cuda", 1)])
)
keys = scalars | st.tuples(st.integers(), st.text())
plain = st.recursive(
    scalars | st.builds(bytearray, st.binary()) | st.builds(torch.Size, st.lists(st.integers(0, 9))),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.lists(inner, max_size=4).map(tuple)
        | st.dictionaries(keys, inner, max_size=4)
        | st.dictionaries(keys, inner, max_size=4).map(collections.OrderedDict)
        | st.sets(keys, max_size=4)
        | st.frozensets(keys, max_size=4)
        | st.dictionaries(keys, st.integers(), max_size=4).map(collections.Counter)
    ),
    max_leaves=12,
)


def same(found: Any, expected: Any) -> bool:
    if isinstance(expected, dict):
        pairs = zip(found.items(), expected.items(), strict=True)
        return type(found) is type(expected) and all(same(list(a), list(b)) for a, b in pairs)
    if isinstance(expected, list | tuple):
        return (
            type(found) is type(expected) and len(found) == len(expected) and all(map(same, found, expected))
        )
    return type(found) is type(expected) and found == expected


@settings(max_examples=150, deadline=None)
@given(value=plain)
def test_plain_containers_come_back(value: Any) -> None:
    assert same(loads(dumps(value)), value)
    assert same(pickle.loads(dumps(value)), value)  # noqa: S301


@settings(max_examples=150, deadline=None)
@given(value=plain, protocol=st.integers(0, pickle.HIGHEST_PROTOCOL))
def test_pickles_of_every_protocol(value: Any, protocol: int) -> None:
    assert same(loads(pickle.dumps(value, protocol=protocol)), value)


def test_sharing_and_cycles() -> None:
    inner: list[Any] = [1]
    value = {"a": inner, "b": inner, "cycle": inner}
    inner.append(value)
    found = loads(dumps(value))
    assert found["a"] is found["b"]
    assert found["a"][1] is found


def test_text_of_python_2(tmp_path: Path) -> None:
    data = b"\x80\x02U\x02\xc3\xa9."
    assert loads(data) == "é"
    assert loads(data, encoding="latin-1") == "Ã©"
    assert loads(data, encoding="bytes") == b"\xc3\xa9"
    with pytest.raises(CheckpointError, match="damaged"):
        loads(data, encoding="ascii")


def state_dict() -> dict[str, Any]:
    torch.manual_seed(0)
    weight = torch.randn(4, 3)
    return {
        "model.embed.weight": weight,
        "model.layers.1.weight": torch.randn(2, 2).bfloat16(),
        "model.layers.10.weight": torch.ones(1, dtype=torch.int8),
        "head.weight": weight,
    }


def test_objects_with_tensors_come_back(tmp_path: Path) -> None:
    value = {"step": 3, "nested": [torch.arange(3), {"x": torch.ones(2).half()}], "tied": state_dict()}
    for found in (loads(dumps(value)), torch.load(io.BytesIO(dumps(value)), weights_only=True)):
        assert found["step"] == 3
        assert found["nested"][0].tolist() == [0, 1, 2]
        assert found["nested"][1]["x"].dtype == torch.float16
        assert found["tied"]["head.weight"].data_ptr() == found["tied"]["model.embed.weight"].data_ptr()
    module = torch.nn.Linear(3, 2)
    assert set(loads(dumps(module.state_dict()))) == {"weight", "bias"}


def test_dump_replaces_a_file_only_when_it_is_complete(tmp_path: Path) -> None:
    path = tmp_path / "new" / "x.pt"
    dump([1, 2], path)
    assert load(path) == [1, 2]
    with pytest.raises((pickle.PicklingError, AttributeError), match="lambda"):
        dump([torch.ones(3), lambda: 0], str(path))
    assert load(str(path)) == [1, 2]
    assert os.listdir(path.parent) == ["x.pt"]  # noqa: PTH208
    dump({"a": torch.ones(3)}, path)
    assert load(path, "a").tolist() == [1, 1, 1]
    stream = io.BytesIO()
    dump({"a": torch.ones(3)}, stream)
    stream.seek(0)
    assert load(stream, tensor_name="a").tolist() == [1, 1, 1]


@pytest.fixture(params=["x.safetensors", "x.bin", "legacy.bin", "folder", "index", "stream", "bytes"])
def checkpoint(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    """The same tensors in each form, as a function with the arguments of `load` after the first."""
    state = state_dict()
    if request.param == "x.safetensors":
        save_file({name: tensor.clone() for name, tensor in state.items()}, tmp_path / "x.safetensors")
    elif request.param in ("folder", "index"):
        names = list(state)
        for number, part in enumerate((names[:2], names[2:])):
            save_file({name: state[name].clone() for name in part}, tmp_path / f"{number}.safetensors")
        index = {name: f"{number // 2}.safetensors" for number, name in enumerate(names)}
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    else:
        torch.save(state, tmp_path / "x.bin", _use_new_zipfile_serialization=request.param != "legacy.bin")
    places = {"folder": tmp_path, "index": tmp_path / "model.safetensors.index.json"}
    place = places.get(request.param, tmp_path / ("x.safetensors" if "safe" in request.param else "x.bin"))
    if request.param == "stream":

        def from_stream(*arguments: Any, **named: Any) -> Any:
            with place.open("rb") as stream:
                return load(stream, *arguments, **named)

        return from_stream
    if request.param == "bytes":
        return lambda *arguments, **named: loads(place.read_bytes(), *arguments, **named)
    return lambda *arguments, **named: load(place, *arguments, **named)


def test_tensors_by_name_and_prefix(checkpoint: Any) -> None:
    state = state_dict()
    whole = checkpoint()
    assert set(whole) == set(state)
    for name, tensor in state.items():
        assert torch.equal(whole[name], tensor)
        found = checkpoint(name)
        assert torch.equal(found, tensor)
        assert found.dtype == tensor.dtype
    assert set(checkpoint(prefix="model.layers.1")) == {"model.layers.1.weight"}
    assert set(checkpoint(prefix="model.layers.")) == {"model.layers.1.weight", "model.layers.10.weight"}
    part = checkpoint(prefix="head.weight")
    assert torch.equal(part["head.weight"], state["head.weight"])
    # A base model's prefix, which a checkpoint may lack or have.
    assert torch.equal(checkpoint("model.head.weight", prefix="model"), state["head.weight"])
    assert torch.equal(checkpoint("embed.weight", prefix="model"), state["model.embed.weight"])
    assert checkpoint("head.weight", map_location="meta").device.type == "meta"
    with pytest.raises(CheckpointError, match="no tensor 'embed'"):
        checkpoint("embed")
    with pytest.raises(CheckpointError, match="no tensors below 'modell'"):
        checkpoint(prefix="modell")
    with pytest.raises(ConfigurationError, match="which is no device"):
        checkpoint("head.weight", map_location="nowhere")
    with pytest.raises(ConfigurationError, match=r"fix_imports|arguments of pickle"):
        checkpoint("head.weight", fix_imports=True)


def test_an_index_leads_to_the_right_shard_and_no_other_is_opened(tmp_path: Path) -> None:
    state = {"head.weight": torch.ones(2), "model.a.weight": torch.zeros(3), "model.b.weight": torch.ones(3)}
    files = ("one.bin", "two.bin", "three.bin")
    torch.save({"head.weight": state["head.weight"]}, tmp_path / files[0])
    torch.save({"model.a.weight": state["model.a.weight"]}, tmp_path / files[1])
    index = tmp_path / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"weight_map": dict(zip(state, files, strict=True))}))
    for path in (index, tmp_path):
        assert torch.equal(load(path, "head.weight"), state["head.weight"])
        assert torch.equal(load(path, "model.head.weight", prefix="model"), state["head.weight"])
        assert list(load(path, prefix="model.a")) == ["model.a.weight"]
        for asked in ({"tensor_name": "model.b.weight"}, {"prefix": "model"}, {"tensor_name": "none"}, {}):
            with pytest.raises(CheckpointError, match=r"three\.bin does not exist"):
                load(path, **asked)


def test_tied_tensors_stay_tied(tmp_path: Path) -> None:
    torch.save(state_dict(), tmp_path / "pytorch_model.bin")
    for found in (load(tmp_path), load(tmp_path / "pytorch_model.bin")):
        assert found["head.weight"].data_ptr() == found["model.embed.weight"].data_ptr()


def test_a_stream_is_read_from_its_position_and_stays_open(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"before" + dumps({"a": torch.ones(1)}))
    with (tmp_path / "x").open("rb") as stream:
        stream.seek(6)
        assert load(stream, "a").tolist() == [1]
        assert not stream.closed
    (tmp_path / "y").write_bytes(dumps({"a": torch.ones(1)}))
    with (tmp_path / "y").open("rb") as stream:
        assert load(stream, "a").tolist() == [1]
        assert not stream.closed
        stream.seek(0)
        assert stream.read(2) == b"PK"


@pytest.mark.filterwarnings("ignore:Validating sparse tensor invariants:UserWarning")
def test_kinds_that_only_torch_knows_are_loaded_whole(tmp_path: Path) -> None:
    state = {"sparse": torch.eye(3).to_sparse(), "conjugate": torch.full((2,), 1 + 2j).conj()}
    torch.save(state, tmp_path / "x.pt")
    found = load(tmp_path / "x.pt")
    assert torch.equal(found["sparse"].to_dense(), torch.eye(3))
    assert found["conjugate"].resolve_conj().tolist() == [1 - 2j] * 2


# --- attacks ----------------------------------------------------------------------------------------------


class Attack:
    """Pickles as a call of any function."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self._call = (function, arguments)

    def __reduce__(self) -> Any:
        return self._call


def attacks(marker: Path) -> dict[str, tuple[Any, str]]:
    touch = f"touch {marker}"
    opening = f"open({str(marker)!r}, 'w')"
    tensor = torch.ones(2)
    hooked = Attack(
        torch._utils._rebuild_tensor_v2,
        torch.UntypedStorage(8),
        0,
        (2,),
        (1,),
        False,
        Attack(os.system, touch),
    )
    return {
        "os.system": (Attack(os.system, touch), r"posix\.system"),
        "eval": (Attack(eval, opening), r"builtins\.eval"),
        "exec": (Attack(exec, opening), r"builtins\.exec"),
        "getattr": (Attack(getattr, Attack(__import__, "os"), "system"), r"builtins\.getattr"),
        "subprocess": (Attack(subprocess.Popen, ["touch", str(marker)]), r"(subprocess|commands)\.Popen"),
        "torch's own": (Attack(torch.load, str(marker)), r"torch\.serialization\.load"),
        "beside a tensor": ({"a": tensor, "b": [{"c": (Attack(os.system, touch),)}]}, r"posix\.system"),
        "as a key": ({Attack(os.system, touch): tensor}, r"posix\.system"),
        "in a tensor's hooks": ({"a": hooked}, r"posix\.system"),
        "a class of the user": (Attack(Attack, os.system, touch), "Attack"),
        "a name alone": ([builtins.eval, tensor], r"builtins\.eval"),
        "partial": (Attack(__import__("functools").partial, os.system, touch), r"functools\.partial"),
    }


WITH_TENSORS = {"beside a tensor", "as a key", "in a tensor's hooks", "a name alone"}


def written(value: Any, form: str, path: Path) -> None:
    if form == "pickle":
        path.write_bytes(pickle.dumps(value, protocol=4))
    elif form == "old pickle":
        path.write_bytes(pickle.dumps(value, protocol=0))
    else:
        torch.save(value, path, _use_new_zipfile_serialization=form == "zip")


@pytest.mark.parametrize("form", ["pickle", "old pickle", "zip", "legacy"])
@pytest.mark.parametrize("case", list(attacks(Path("x"))))
def test_attacks_are_refused_and_named(tmp_path: Path, case: str, form: str) -> None:
    marker, path = tmp_path / "marker", tmp_path / "evil.bin"
    value, named = attacks(marker)[case]
    if "pickle" in form and ("tensor" in case or "key" in case or "name" in case):
        value = (
            [value, Attack(os.system, f"touch {marker}")] if "tensor" not in case else [Attack(os.system, "")]
        )
        named = "posix.system|builtins.eval"
    written(value, form, path)
    tries: list[Any] = [
        lambda: load(path),
        lambda: loads(path.read_bytes()),
        lambda: load(io.BytesIO(path.read_bytes())),
    ]
    if "pickle" not in form:
        tries += [lambda: load(path, tensor_name="a"), lambda: load(path, prefix="a")]
    for attempt in tries:
        with pytest.raises(UnsafeFileError, match=named) as caught:
            attempt()
        assert "nothing of it was run" in str(caught.value)
    with pytest.raises(UnsafeFileError, match=r"evil\.bin"):
        load(path)
    assert not marker.exists()


HAND_MADE = {
    "instance": b"(S'touch x'\nios\nsystem\n.",
    "object": b"(cos\nsystem\nS'touch x'\no.",
    "stack global": b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x01x\x85R.",
    "dotted": b"\x80\x04\x8c\x05torch\x8c\x0dload.__call__\x93)R.",
    "dotted method": b"\x80\x04\x8c\x0bcollections\x8c\x14OrderedDict.__init__\x93)R.",
    "extension": b"\x80\x02\x82\x01.",
    "call of text": b"\x80\x02X\x01\x00\x00\x00a)R.",
    "call of a result": b"\x80\x02ccollections\nOrderedDict\n)R)R.",
    "new object": b"\x80\x02cos\nsystem\n)\x81.",
    "new object with keywords": b"\x80\x04cos\nsystem\n)}\x92.",
    "persistent text": b"\x80\x02Pfile:///etc/passwd\n.",
    "persistent": b"\x80\x02X\x01\x00\x00\x00aQ.",
    "out of band": b"\x80\x05\x97.",
    "key that is a list": b"\x80\x02}]Ns.",
}


@pytest.mark.parametrize("case", HAND_MADE)
def test_hand_made_attacks(case: str) -> None:
    with pytest.raises(UnsafeFileError):
        loads(HAND_MADE[case])


DAMAGED = {
    "empty": b"",
    "text": b"hello, world",
    "no end": b"\x80\x04]",
    "two": pickle.dumps(1) * 2,
    "no mark": b"\x80\x04]e.",
    "nothing on the stack": b"\x80\x04.",
    "a mark as value": b"\x80\x04(.",
    "append to text": b"\x80\x04X\x01\x00\x00\x00aNa.",
    "items on a list": b"\x80\x04]NNs.",
    "odd items": b"\x80\x04}(Nu.",
    "memo": b"\x80\x04h\x07.",
    "cut text": b"\x80\x04X\xff\xff\xff\xffa.",
    "long text": b"\x80\x04\x8d\xff\xff\xff\xff\xff\xff\xff\x0fa.",
    "a size of text": b"\x80\x02ctorch\nSize\nX\x01\x00\x00\x00a\x85R.",
    "bytearray of a number": b"\x80\x02cbuiltins\nbytearray\nJ\xff\xff\xff\x7f\x85R.",
    "unknown instruction": b"\x80\x04\xff.",
    "encoding": b"\x80\x02c_codecs\nencode\nX\x01\x00\x00\x00aX\x05\x00\x00\x00rot13\x86R.",
}


@pytest.mark.parametrize("case", DAMAGED)
def test_damaged_pickles(tmp_path: Path, case: str) -> None:
    (tmp_path / "x.pkl").write_bytes(DAMAGED[case])
    with pytest.raises(CheckpointError, match=r"x\.pkl"):
        load(tmp_path / "x.pkl")


@settings(max_examples=200, deadline=None)
@given(value=plain, changes=st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), max_size=4))
def test_any_damage_is_an_error_of_ours_or_harmless(value: Any, changes: list[tuple[int, int]]) -> None:
    data = bytearray(dumps(value))
    for position, byte in changes:
        data[position % len(data)] = byte
    try:
        loads(bytes(data))
    except CheckpointError as error:
        message = str(error)
    else:
        return
    assert "<bytes>" in message


def test_shared_tuples_as_a_key_take_no_time() -> None:
    # 60 tuples of twice the one before: hashing the last would take 2**60 steps.
    with pytest.raises(UnsafeFileError, match="parts"):
        loads(b"\x80\x04}N" + b"\x85\x94" + b"".join(b"h%c\x86\x94" % n for n in range(60)) + b"Ns.")
    # As a value they are but 60 tuples.
    found = loads(b"\x80\x04)\x94" + b"".join(b"h%c\x86\x94" % n for n in range(60)) + b".")
    assert len(found) == 2


def test_the_number_of_containers_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_pickle_machine, "MOST_CONTAINERS", 1000)
    assert len(loads(b"\x80\x04](" + b"\x8f" * 999 + b"e.")) == 999
    with pytest.raises(UnsafeFileError, match="more than 1000 containers"):
        loads(b"\x80\x04](" + b"\x8f" * 1000 + b"e.")


COPIES = {
    "sets of a list": b"cbuiltins\nset\n\x94](" + b"K\x01" * 1000 + b"e\x85\x94",
    "bytearrays": b"cbuiltins\nbytearray\n\x94B" + struct.pack("<L", 1000) + bytes(1000) + b"\x85\x94",
    "bytes of text": b"c_codecs\nencode\n\x94X" + struct.pack("<L", 1000) + b"a" * 1000 + b"\x85\x94",
    "sizes": b"ctorch\nSize\n\x94(" + b"K\x01" * 1000 + b"t\x85\x94",
    "ordered dictionaries": (
        b"ccollections\nOrderedDict\n\x94}(" + b"".join(b"M%bN" % struct.pack("<H", n) for n in range(1000))
    )
    + b"u\x85\x94",
}


@pytest.mark.parametrize("case", COPIES)
def test_copies_upon_copies_are_bounded(case: str) -> None:
    # Six bytes for a thousand more, again and again.
    start = b"\x80\x04(" + COPIES[case]
    assert len(loads(start + b"h\x00h\x01R" * 10 + b"t.")) == 12
    with pytest.raises(UnsafeFileError, match="copies upon copies"):
        loads(start + b"h\x00h\x01R" * 6000 + b"t.")


def test_deep_nesting_is_no_crash() -> None:
    found = loads(b"\x80\x04" + b"]" * 200_000 + b"a" * 199_999 + b".")
    assert isinstance(found[0], list)
    # Freed here rather than at the end: each list frees the one in it.
    while found:
        found = found.pop()


def described(description: bytes, path: Path, **records: bytes) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", description)
        for name, content in records.items():
            archive.writestr(f"archive/data/{name}", content)
    return path


class Storage:
    """Pickles as a persistent id."""

    def __init__(self, *identifier: Any) -> None:
        self.identifier = identifier


class TorchPickler(pickle.Pickler):
    def persistent_id(self, obj: Any) -> Any:
        return obj.identifier if isinstance(obj, Storage) else None


def description(storage: Storage, size: Any, stride: Any, offset: Any = 0) -> bytes:
    call = Attack(torch._utils._rebuild_tensor_v2, storage, offset, size, stride, False, {})
    stream = io.BytesIO()
    TorchPickler(stream, protocol=2).dump({"a": call})
    return stream.getvalue()


def floats(key: Any = "0", count: Any = 4) -> Storage:
    return Storage("storage", torch.FloatStorage, key, "cpu", count)


def test_a_description_made_by_hand(tmp_path: Path) -> None:
    data = struct.pack("<4f", 1, 2, 3, 4)
    path = described(description(floats(), (2,), (2,), 1), tmp_path / "x.bin", **{"0": data})
    assert load(path, "a").tolist() == [2, 4]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (description(floats("../../etc/passwd"), (1,), (1,)), "'../../etc/passwd'"),
        (description(floats("/etc/passwd"), (1,), (1,)), "'/etc/passwd'"),
        (description(floats("1"), (1,), (1,)), "storage '1'"),
        (description(Storage("module", torch.FloatStorage, "0", "cpu", 4), (1,), (1,)), "'module'"),
        (description(Storage("storage", "FloatStorage", "0", "cpu", 4), (1,), (1,)), "'FloatStorage'"),
        (description(floats(count=2**60), (2**60,), (1,)), "16 bytes"),
        (description(floats(count=-4), (1,), (1,)), "persistent object"),
        (description(floats(), (2**40,), (1,)), "reach outside"),
        (description(floats(), (2**40,), (0,)), "repeats 16 bytes"),
        (description(floats(), (2**62, 2**62), (0, 0)), "larger than any tensor"),
        (description(floats(), (2,), (4,)), "reach outside"),
        (description(floats(), (2,), (1,), 3), "reach outside"),
        (description(floats(), (2,), (-1,), 3), "out of range"),
        (description(floats(), (-2,), (1,)), "out of range"),
        (description(floats(), (2, 1), (1,)), "differ in length"),
        (description(floats(), [2], [1]), "no tuple"),
        (description(floats(), (True,), (1,)), "out of range"),
    ],
)
def test_descriptions_that_lie(tmp_path: Path, content: bytes, message: str) -> None:
    path = described(content, tmp_path / "evil.bin", **{"0": bytes(16)})
    for named in ({}, {"tensor_name": "a"}):
        with pytest.raises(CheckpointError, match=message) as caught:
            load(path, **named)
        assert "evil.bin" in str(caught.value)


def test_a_description_that_is_too_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from auto_round.low_cpu_mem import _torch_file

    monkeypatch.setattr(_torch_file, "MOST_PICKLE_BYTES", 100)
    torch.save({"a": torch.ones(1), "text": "x" * 100}, tmp_path / "x.bin")
    with pytest.raises(CheckpointError, match=r"data\.pkl has \d+ bytes"):
        load(tmp_path / "x.bin", "a")


# --- what the caller trusts -------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["pickle", "zip", "legacy"])
def test_allow_unsafe_runs_the_file_and_says_so(tmp_path: Path, form: str) -> None:
    marker, path = tmp_path / "marker", tmp_path / "mine.bin"
    written({"a": [1, Attack(os.system, f"touch {marker}")]}, form, path)
    with pytest.warns(UnsafeLoadWarning, match=r"mine\.bin.*code it names is run") as caught:
        assert load(path, "a", allow_unsafe=True) == [1, 0]
    assert caught[0].filename == __file__
    assert marker.exists()
    with pytest.warns(UnsafeLoadWarning) as caught:
        assert loads(path.read_bytes(), allow_unsafe=True, encoding="utf-8") == {"a": [1, 0]}
    assert caught[0].filename == __file__
    with pytest.warns(UnsafeLoadWarning), pytest.raises(CheckpointError, match="no entry 'b'"):
        load(path, "b", allow_unsafe=True)


def test_arguments_that_do_not_go_together(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="one file"):
        load(tmp_path, allow_unsafe=True)
    with pytest.raises(ConfigurationError, match="path or a file object"):
        load(3)  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match="encoding"):
        loads(dumps(1), weights_only=False)
    with pytest.raises(CheckpointError, match="does not exist"):
        load(tmp_path / "none.pt")


# --- memory -----------------------------------------------------------------------------------------------

MIB = 1 << 20
TENSORS = 512


def sparse_safetensors(path: Path) -> None:
    """2 GB in 512 tensors of 4 MiB, of which only one is not a hole in the file."""
    header = json.dumps(
        {
            f"layers.{n}.weight": {
                "dtype": "F32",
                "shape": [1024, 1024],
                "data_offsets": [4 * MIB * n, 4 * MIB * (n + 1)],
            }
            for n in range(TENSORS)
        }
    ).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        file.seek(4 * MIB * 300, os.SEEK_CUR)
        file.write(struct.pack("<f", 1.5) * MIB)
        file.truncate(8 + len(header) + 4 * MIB * TENSORS)


def sparse_torch(path: Path) -> None:
    """The same as `torch.save` lays it out: stored records whose data are holes."""
    stream = io.BytesIO()
    TorchPickler(stream, protocol=2).dump(
        {
            f"layers.{n}.weight": Attack(
                torch._utils._rebuild_tensor_v2, floats(str(n), MIB), 0, (1024, 1024), (1024, 1), False, {}
            )
            for n in range(TENSORS)
        }
    )
    records = [(b"archive/data.pkl", stream.getvalue(), len(stream.getvalue()))]
    records += [(b"archive/byteorder", b"little", 6), (b"archive/version", b"3\n", 2)]
    records += [
        (b"archive/data/%d" % n, struct.pack("<f", 1.5) * MIB if n == 300 else b"", 4 * MIB)
        for n in range(TENSORS)
    ]
    directory = b""
    with path.open("wb") as file:
        for name, content, size in records:
            fields = struct.pack("<5H3L2H", 0, 0, 0, 0, 0, zlib.crc32(content), size, size, len(name), 0)
            directory += b"PK\x01\x02\x00\x00" + fields + struct.pack("<3H2L", 0, 0, 0, 0, file.tell()) + name
            file.write(b"PK\x03\x04" + fields + name + content)
            file.seek(size - len(content), os.SEEK_CUR)
        start = file.tell()
        count = len(records)
        file.write(
            directory + b"PK\x05\x06" + struct.pack("<4H2LH", 0, 0, count, count, len(directory), start, 0)
        )


MEASURE = """
    import sys
    from auto_round.low_cpu_mem import load, loads

    def peak_kb():
        with open("/proc/self/status") as file:
            return next(int(line.split()[1]) for line in file if line.startswith("VmHWM"))

    # What the first conversion or file of a process brings in is not the file's doing.
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")
    before = peak_kb()
    tensor = load(sys.argv[1], tensor_name="layers.300.weight")
    after = peak_kb()
    assert tensor.shape == (1024, 1024) and tensor.min() == tensor.max() == 1.5
    print(after - before)
"""


@pytest.mark.parametrize("form", ["safetensors", "bin", "index"])
def test_one_tensor_of_4_mb_out_of_2_gb_takes_less_than_20_mb(tmp_path: Path, form: str) -> None:
    path = tmp_path / f"model-00001-of-00002.{'bin' if form == 'bin' else 'safetensors'}"
    (sparse_torch if form == "bin" else sparse_safetensors)(path)
    assert path.stat().st_size > 2 << 30
    assert path.stat().st_blocks * 512 < 16 * MIB
    if form == "index":
        save_file({"other": torch.ones(1)}, tmp_path / "model-00002-of-00002.safetensors")
        index = {f"layers.{n}.weight": path.name for n in range(TENSORS)}
        index["other"] = "model-00002-of-00002.safetensors"
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
        path = tmp_path
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(MEASURE), str(path)],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    # At least the tensor itself, or else nothing was measured.
    assert 4096 <= int(done.stdout) < 20_000


def test_the_2_gb_file_is_one_that_torch_reads_too(tmp_path: Path) -> None:
    sparse_torch(tmp_path / "x.bin")
    state = torch.load(tmp_path / "x.bin", weights_only=True, mmap=True)
    assert len(state) == TENSORS
    assert state["layers.300.weight"][1023, 1023] == 1.5
