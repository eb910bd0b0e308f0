import sys
import zipfile
from pathlib import Path

import pytest
from wheel_smoke import foreign_files, heavy_imports, import_seconds, main, read_wheel, slowest_imports


def build(dist: Path, name: str, files: dict[str, str], entry_points: str = "") -> Path:
    """A wheel made by hand, so that neither a build backend nor an index is needed."""
    dist.mkdir(exist_ok=True)
    info = f"{name}-1.0.dist-info"
    contents = files | {
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: hand\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    if entry_points:
        contents[f"{info}/entry_points.txt"] = entry_points
    record = "".join(f"{file},,\n" for file in [*contents, f"{info}/RECORD"])
    path = dist / f"{name}-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for file, text in (contents | {f"{info}/RECORD": record}).items():
            archive.writestr(file, text)
    (dist / "constraints.txt").write_text(
        "".join(f"{w.name.split('-')[0]}==1.0\n" for w in dist.glob("*.whl"))
    )
    return path


HELLO = {
    "hello_there/__init__.py": "",
    "hello_there/deep/__init__.py": "",
    "hello_there/deep/down.py": "x = 1\n",
    "hello_there/_private.py": "raise RuntimeError('nobody imports this')\n",
    "hello_there/hamerspace_backend.py": "import hamerspace\n",
    "hello_there/cli.py": "import sys\n\ndef main():\n    print('usage: hello')\n",
}
COMMAND = "[console_scripts]\nHello = hello_there.cli:main\n"


@pytest.fixture
def smoke(tmp_path, uv, monkeypatch, capsys):
    """Runs the tool on the wheels of `dist`, with no index to fall back on."""
    monkeypatch.setenv("UV_NO_INDEX", "1")

    def run(*arguments):
        places = ["--dist", tmp_path / "dist", "--work", tmp_path / "work", "--uv", uv]
        status = main([str(part) for part in [*places, *arguments]])
        return status, capsys.readouterr()

    return run


def test_read_wheel(tmp_path):
    wheel = read_wheel(build(tmp_path / "dist", "hello_there", HELLO, COMMAND))
    assert (wheel.name, wheel.version) == ("hello-there", "1.0")
    public = ["hello_there", "hello_there.cli", "hello_there.deep", "hello_there.deep.down"]
    assert wheel.modules == (*public, "hello_there.hamerspace_backend")
    assert wheel.commands == ("Hello",)


def test_a_good_wheel_passes(smoke, tmp_path):
    build(tmp_path / "dist", "hello_there", HELLO, COMMAND)
    status, output = smoke()
    assert status == 0, output
    assert "hello-there 1.0: 4 modules, 1 commands" in output.out
    assert "1 wheels tried, 0 failed" in output.out
    assert not list((tmp_path / "work").iterdir())


@pytest.mark.parametrize(
    ("files", "complaint"),
    [
        ({"hello_there/deep/down.py": "import absent_library\n"}, "No module named 'absent_library'"),
        ({"hello_there/cli.py": "def main():\n    pass\n"}, "Hello --help prints nothing"),
        ({"hello_there/cli.py": "def main():\n    raise SystemExit(3)\n"}, "exit status 3 from"),
    ],
)
def test_a_broken_wheel_fails_and_the_others_are_tried(smoke, tmp_path, files, complaint):
    build(tmp_path / "dist", "hello_there", HELLO | files, COMMAND)
    build(tmp_path / "dist", "zebra", {"zebra/__init__.py": ""})
    status, output = smoke()
    assert status == 1
    assert complaint in output.out
    assert "zebra 1.0: 1 modules" in output.out


def test_a_wheel_that_was_built_again_is_the_one_that_is_tried(smoke, tmp_path):
    build(tmp_path / "dist", "hello_there", HELLO, COMMAND)
    assert smoke()[0] == 0
    build(tmp_path / "dist", "hello_there", HELLO | {"hello_there/_private.py": "changed = True\n"}, COMMAND)
    status, output = smoke()
    assert status == 0, output


def test_an_import_that_loads_torch_fails(smoke, tmp_path):
    build(
        tmp_path / "dist",
        "av_memory",
        {"av_memory/__init__.py": "try:\n    import torch\nexcept ImportError: ..."},
    )
    status, output = smoke()
    assert status == 1
    assert "import av_memory loads torch" in output.out


def test_looking_whether_torch_is_there_is_not_loading_it(tmp_path):
    for name, code in {
        "looks": "import importlib.util\nimportlib.util.find_spec('torch')",
        "loads": "import tensorflow",
    }.items():
        (tmp_path / f"{name}.py").write_text(code)
    # -I leaves the folder out, so an environment's own file adds it, as an installed package would be found.
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\ncd {tmp_path} && shift && exec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    assert heavy_imports(python, "looks") == []
    assert heavy_imports(python, "loads") == ["tensorflow"]


def test_import_times_are_those_of_the_import(tmp_path):
    (tmp_path / "sleeper.py").write_text("import time\ntime.sleep(0.2)\n")
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\ncd {tmp_path} && shift && exec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    assert import_seconds(python, "sleeper") >= 0.2
    millis, name = slowest_imports(python, "sleeper")[0]
    assert name == "sleeper"
    assert millis >= 200


def test_a_distribution_of_others_is_noticed(tmp_path):
    wheel = read_wheel(build(tmp_path / "dist", "hello_there", HELLO))
    site = tmp_path / "env/lib/python3.11/site-packages"
    site.mkdir(parents=True)
    assert foreign_files(wheel, tmp_path / "env") == []
    with zipfile.ZipFile(wheel.path) as archive:
        archive.extractall(site)
    assert foreign_files(wheel, tmp_path / "env") == []
    (site / "hello_there/deep/down.py").write_text("x = 2\n")
    assert foreign_files(wheel, tmp_path / "env") == ["hello_there/deep/down.py"]


def test_nothing_to_try(smoke, tmp_path):
    status, output = smoke()
    assert status == 2
    assert "'make wheels' builds them" in output.err
    build(tmp_path / "dist", "zebra", {"zebra/__init__.py": ""})
    status, output = smoke("--only", "lion")
    assert status == 2
    assert "no wheel of lion" in output.err
