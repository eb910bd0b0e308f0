"""The shared conftest.py, tried on a small suite in a process of its own."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

SUITE = """
import sys
import pytest

def test_plain():
    assert "torch" not in sys.modules

@pytest.mark.browser
def test_browser(chromium):
    assert chromium.endswith("/chromium")

@pytest.mark.slow
def test_slow():
    pass
"""

CUDA = """
import pytest

def test_one_thread():
    import torch
    assert torch.get_num_threads() == 1
    torch.set_num_threads(2)

def test_still_one_thread():
    import torch
    assert torch.get_num_threads() == 1

@pytest.mark.cuda
def test_device():
    pass
"""


@pytest.fixture
def suite(tmp_path):
    """Runs pytest on one file with the real settings; PATH holds only what the test puts into `bin`."""
    for name in ("conftest.py", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "bin").mkdir()

    def run(code, *arguments, **environment):
        (tmp_path / "test_made_up.py").write_text(code)
        base = {k: v for k, v in os.environ.items() if not k.startswith("REQUIRE_")}
        base |= {"PATH": str(tmp_path / "bin"), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "4"}
        command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "test_made_up.py", *arguments]
        options = {"cwd": tmp_path, "env": base | environment, "capture_output": True, "text": True}
        return subprocess.run(command, check=False, **options).stdout

    return run


def test_what_is_missing_is_skipped_with_its_reason(suite):
    output = suite(SUITE)
    assert "1 passed, 2 skipped" in output
    assert "no browser on PATH (looked for chromium," in output
    assert "slow: run with --slow" in output


def test_what_is_required_and_missing_is_an_error(suite):
    output = suite(SUITE, "--slow", REQUIRE_BROWSER="1")
    assert "2 passed, 1 error" in output
    assert "REQUIRE_BROWSER=1, but no browser on PATH" in output


def test_a_browser_on_the_path_is_used(suite, tmp_path):
    browser = tmp_path / "bin" / "chromium"
    browser.write_text("#!/bin/sh\n")
    browser.chmod(0o755)
    assert "2 passed, 1 skipped" in suite(SUITE, REQUIRE_BROWSER="1")


def test_cuda_and_threads(suite):
    output = suite(CUDA, REQUIRE_CUDA="1")
    assert "2 passed, 1 error" in output
    assert "REQUIRE_CUDA=1, but torch" in output
