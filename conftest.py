"""What every suite shares: one thread a process, and the markers for what a machine may lack."""

import functools
import importlib.util
import os
import shutil
import sys
from collections.abc import Iterator

import pytest

# Two numeric thread pools on two busy cores are several times slower than one thread each. The variables
# work for whatever is imported later and for every child process.
for _variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ[_variable] = "1"

CHROMIUM_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="run the tests marked slow as well")


@functools.cache
def find_chromium() -> str | None:
    return next((path for name in CHROMIUM_NAMES if (path := shutil.which(name))), None)


@functools.cache
def why_no_cuda() -> str | None:
    """The reason why CUDA tests cannot run, or None. Imports torch, hence only called for such a test."""
    if importlib.util.find_spec("torch") is None:
        return "torch is not installed"
    import torch

    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA"
    return None if torch.cuda.is_available() else "torch sees no CUDA device"


def _require(variable: str, reason: str | None) -> None:
    if reason is None:
        return
    if os.environ.get(variable) == "1":
        pytest.fail(f"{variable}=1, but {reason}", pytrace=False)
    pytest.skip(reason)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("slow") and not item.config.getoption("--slow"):
        pytest.skip("slow: run with --slow")
    if item.get_closest_marker("browser"):
        missing = f"no browser on PATH (looked for {', '.join(CHROMIUM_NAMES)})"
        _require("REQUIRE_BROWSER", None if find_chromium() else missing)
    if item.get_closest_marker("cuda"):
        _require("REQUIRE_CUDA", why_no_cuda())


@pytest.fixture(autouse=True)
def one_torch_thread() -> Iterator[None]:
    """A test that raises torch's thread count does so for itself alone."""
    yield
    torch = sys.modules.get("torch")
    if torch is not None and torch.get_num_threads() != 1:
        torch.set_num_threads(1)


@pytest.fixture(scope="session")
def chromium() -> str:
    """Path of the browser for tests marked `browser`, to be given to Playwright as `executable_path`."""
    path = find_chromium()
    if path is None:
        pytest.skip("no browser on PATH")
    return path
