"""What importing the package loads, and beside which distributions it refuses to load."""

import os
import subprocess
import sys

import pytest


def run(code, *folders):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, folders))}
    return subprocess.run(
        [sys.executable, "-c", code],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def install(folder, name, version="0.16.0"):
    """Leave what an installer leaves of a distribution, without its modules."""
    info = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.4\nName: {name}\nVersion: {version}\n")


@pytest.mark.parametrize("name", ["auto-round", "auto-round-hpu", "auto-round-nightly", "Auto_Round"])
def test_refuses_beside_another_distribution_of_the_import_name(name, tmp_path):
    install(tmp_path, name)
    result = run("import auto_round", tmp_path)
    assert result.returncode != 0
    last = result.stderr.splitlines()[-1]
    assert last.startswith("ImportError: auto-round-core and Intel's auto-round")
    assert str(tmp_path) in last
    plain = name.lower().replace("_", "-")
    assert f"pip uninstall {plain} auto-round-core" in last


def test_every_module_refuses(tmp_path):
    install(tmp_path, "auto-round")
    code = """
try:
    import auto_round.config_manager
except ImportError as error:
    assert error.name == "auto_round", error.name
else:
    raise SystemExit("it was imported")
"""
    result = run(code, tmp_path)
    assert result.returncode == 0, result.stderr


def test_its_own_distribution_and_the_like_are_no_hindrance(tmp_path):
    for name in ("auto-round-core", "auto-round-lib", "auto-rounding", "round"):
        install(tmp_path, name)
    result = run("import auto_round; print(auto_round.__version__)", tmp_path)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize(
    "module", ["auto_round", "auto_round.config_manager", "auto_round.memory_utils", "auto_round.exceptions"]
)
def test_loads_no_heavy_library(module):
    code = f"""
import sys
import {module}
heavy = {{"torch", "transformers", "accelerate", "safetensors", "numpy"}} & sys.modules.keys()
assert not heavy, heavy
"""
    result = run(code)
    assert result.returncode == 0, result.stderr
