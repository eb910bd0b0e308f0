"""Every Python block of every README runs as it stands, in a folder of its own."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
BLOCKS = [
    (path.relative_to(ROOT), number, block)
    for path in [ROOT / "README.md", *sorted(ROOT.glob("packages/*/README.md"))]
    for number, block in enumerate(
        re.findall(r"^```python\n(.*?)^```", path.read_text(), re.DOTALL | re.MULTILINE), 1
    )
]


def test_there_is_an_example_for_every_package():
    shown = {path.parent.name for path, _, _ in BLOCKS if path.parent != Path()}
    assert shown == {path.parent.name for path in ROOT.glob("packages/*/README.md")}


@pytest.mark.parametrize(
    ("path", "number", "block"), BLOCKS, ids=[f"{path}-{number}" for path, number, _ in BLOCKS]
)
def test_block_runs(path: Path, number: int, block: str, tmp_path: Path):
    result = subprocess.run(
        [sys.executable, "-c", block],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=350,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HOME": str(tmp_path)},
        check=False,
    )
    assert result.returncode == 0, f"block {number} of {path}:\n{result.stdout}{result.stderr}"
