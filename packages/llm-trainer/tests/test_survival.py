"""The short form of the survival benchmark: killed at random moments, resumed, and the same to the bit."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARK = Path(__file__).resolve().parents[1] / "benchmarks" / "bench_survival.py"


@pytest.mark.timeout(600)
def test_runs_that_are_killed_end_as_runs_that_are_not(request: pytest.FixtureRequest, tmp_path: Path):
    rounds, kills = (50, 5) if request.config.getoption("--slow") else (4, 2)
    done = subprocess.run(
        [
            *(sys.executable, str(BENCHMARK), "--rounds", str(rounds), "--kills", str(kills)),
            *("--json", str(tmp_path / "result.json")),
        ],
        capture_output=True,
        text=True,
        timeout=None if request.config.getoption("--slow") else 590,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads((tmp_path / "result.json").read_text())
    assert (result["rounds"], result["different"]) == (rounds, 0)
    assert sum(result["kills"].values()) >= rounds
    assert {moment.split(",")[0] for moment in result["kills"]} >= {"while saving", "while rotating"}
