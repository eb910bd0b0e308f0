"""What the tests of this package share."""

import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator

import av_memory
import pytest


@pytest.fixture(autouse=True)
def _fresh_recording() -> Iterator[None]:
    av_memory.enable_memory_tracking(True)
    av_memory.clear_memory_stats()
    yield
    av_memory.enable_memory_tracking(True)


@pytest.fixture
def run_fresh() -> Callable[..., str]:
    """Run code in a new interpreter and return what it printed; a failure there fails the test."""

    def run(code: str, *, env: dict[str, str] | None = None, prefix: list[str] | None = None) -> str:
        import os

        result = subprocess.run(
            [*(prefix or []), sys.executable, "-W", "error", "-c", textwrap.dedent(code)],
            capture_output=True,
            text=True,
            timeout=100,
            env={**os.environ, "OMP_NUM_THREADS": "1", **(env or {})},
            check=False,
        )
        assert result.returncode == 0, result.stdout + result.stderr
        return result.stdout

    return run
