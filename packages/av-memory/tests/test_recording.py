import json
import os
from pathlib import Path
from typing import Any

import pytest
from av_memory.recording import (
    Process,
    Recording,
    RecordingError,
    ScopeRecord,
    Series,
    Usage,
    write_atomically,
)
from hypothesis import given
from hypothesis import strategies as st

numbers = st.floats(-1e12, 1e12)
durations = st.floats(0, 1e9)
usages = st.builds(Usage, numbers, numbers, numbers, st.booleans())
scopes = st.builds(
    ScopeRecord,
    name=st.text(),
    thread=st.text(),
    depth=st.integers(0, 50),
    start_s=numbers,
    wall_s=durations,
    cpu=usages,
    gpus=st.dictionaries(st.integers(0, 7), usages, max_size=2),
    tree=st.none() | usages,
    tree_pss_peak_mb=st.none() | numbers,
    error=st.none() | st.text(),
)


@st.composite
def curves(draw: st.DrawFn) -> Series:
    times = sorted(draw(st.lists(numbers, max_size=5)))
    return Series(draw(st.text()), times, draw(st.lists(numbers, min_size=len(times), max_size=len(times))))


recordings = st.builds(
    Recording,
    created_unix_s=numbers,
    wall_s=durations,
    series=st.lists(curves(), max_size=3),
    scopes=st.lists(scopes, max_size=3),
    dropped_scopes=st.integers(0, 10**6),
    processes=st.lists(st.builds(Process, st.integers(0, 2**22), st.text(), numbers), max_size=3),
    command=st.lists(st.text(), max_size=3),
    exit_code=st.none() | st.integers(-255, 255),
    limits=st.dictionaries(st.sampled_from(["limit_mb", "cgroup_limit_mb"]), numbers),
)


def plain() -> dict[str, Any]:
    usage = Usage(1, 2, 3)
    scope = ScopeRecord("load", "MainThread", 0, 0.0, 1.0, usage, {0: usage}, usage, 2.0)
    process = Process(7, "python", 3.0)
    return Recording(1e9, 1.0, [Series("cpu", [0, 1], [1, 2])], [scope], processes=[process]).to_dict()


@given(recordings)
def test_json_round_trip(recording: Recording) -> None:
    assert Recording.from_json(recording.to_json()) == recording


def test_file_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    recording = Recording.from_json(json.dumps(plain()))
    recording.to_json(path)
    assert Recording.load(path) == recording
    assert [item.name for item in tmp_path.iterdir()] == ["a.json"]


def test_every_truncation_is_refused_with_the_files_name(tmp_path: Path) -> None:
    text = json.dumps(plain())
    path = tmp_path / "cut.json"
    for length in range(0, len(text), 7):
        path.write_text(text[:length])
        with pytest.raises(RecordingError, match=r"cut\.json"):
            Recording.load(path)


def test_a_newer_version_is_refused_with_the_remedy() -> None:
    with pytest.raises(RecordingError, match=r"version 2.*upgrade"):
        Recording.from_json(json.dumps({**plain(), "version": 2}))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "null",
        "{}",
        b"\xff\xfe\x00",
        "[" * 200_000,
        json.dumps({**plain(), "version": "1"}),
        json.dumps({**plain(), "version": 0}),
        json.dumps({**plain(), "format": "another"}),
    ],
)
def test_what_is_not_a_recording_is_refused(text: str | bytes) -> None:
    with pytest.raises(RecordingError):
        Recording.from_json(text)


def put(path: tuple[str | int, ...], value: object) -> str:
    data: Any = json.loads(json.dumps(plain()))
    place = data
    for step in path[:-1]:
        place = place[step]
    place[path[-1]] = value
    return json.dumps(data)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("wall_s",), "1"),
        (("wall_s",), float("nan")),
        (("created_unix_s",), 1e300),
        (("series",), None),
        (("series", 0, "times_s"), [0]),
        (("series", 0, "times_s"), [1, 0]),
        (("series", 0, "values_mb"), [1, float("inf")]),
        (("series", 0, "values_mb"), [1, True]),
        (("series", 0, "name"), 3),
        (("scopes", 0, "name"), ["load"]),
        (("scopes", 0, "depth"), -1),
        (("scopes", 0, "depth"), 0.5),
        (("scopes", 0, "wall_s"), -1),
        (("scopes", 0, "cpu"), {}),
        (("scopes", 0, "cpu", "peak_exact"), "yes"),
        (("scopes", 0, "gpus"), {"first": {}}),
        (("scopes", 0, "surprise"), 1),
        (("scopes", 0, "error"), 5),
        (("processes", 0, "pid"), "7"),
        (("command",), "rm -rf"),
        (("command",), [1]),
        (("exit_code",), "0"),
        (("limits",), []),
        (("limits",), {"limit_mb": None}),
        (("surprise",), 1),
    ],
)
def test_a_wrong_field_is_refused(path: tuple[str | int, ...], value: object) -> None:
    with pytest.raises(RecordingError, match="does not hold together"):
        Recording.from_json(put(path, value))


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "page.html"
    write_atomically(path, "old")
    with pytest.raises(UnicodeEncodeError):
        write_atomically(path, "half a pair \ud800")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_device_is_not_replaced_by_a_file() -> None:
    with pytest.raises(OSError, match="not a regular file"):
        write_atomically("/dev/null", "text")
    assert Path("/dev/null").is_char_device()


@pytest.mark.skipif(os.name != "posix", reason="permissions and links as POSIX has them")
def test_a_link_is_followed_and_permissions_stay(tmp_path: Path) -> None:
    secret, link, dangling = tmp_path / "secret", tmp_path / "link", tmp_path / "dangling"
    secret.write_text("old")
    secret.chmod(0o600)
    link.symlink_to("secret")
    dangling.symlink_to("new")
    for path in (link, dangling):
        write_atomically(path, "text")
        assert path.is_symlink()
        assert path.read_text() == "text"
    assert secret.stat().st_mode & 0o777 == 0o600
    mask = os.umask(0)
    os.umask(mask)
    assert (tmp_path / "new").stat().st_mode & 0o777 == 0o666 & ~mask
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    with pytest.raises(OSError, match="loop"):
        write_atomically(loop, "text")
    longest = tmp_path / ("n" * 255)
    write_atomically(longest, "text")
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        ["secret", "link", "dangling", "new", "loop", longest.name]
    )


def test_only_a_regular_file_of_some_size_is_read(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="not a regular file"):
        Recording.load(tmp_path)
    huge = tmp_path / "huge.json"
    with huge.open("wb") as file:
        file.truncate(2**30 + 1)
    with pytest.raises(RecordingError, match="larger than 1 GiB"):
        Recording.load(huge)
