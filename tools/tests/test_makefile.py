import re
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def make(*arguments):
    command = ["make", "--no-print-directory", "-C", str(ROOT), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_help_is_the_default_and_lists_every_target():
    result = make()
    assert result.returncode == 0
    phony = re.findall(r"^\.PHONY: (\w[\w-]*)", (ROOT / "Makefile").read_text(), re.MULTILINE)
    listed = re.findall(r"^  ([a-z-]+) +[A-Z]", result.stdout, re.MULTILINE)
    assert sorted(listed) == sorted(phony)
    assert {"setup", "demo", "check", "test", "bench", "wheels", "wheel-smoke", "lowest", "clean"} <= set(
        listed
    )


def test_a_wrong_package_names_the_right_ones():
    result = make("test", "P=av_memory")
    assert result.returncode == 2
    assert "P=av_memory is no package of this workspace" in result.stderr
    for manifest in ROOT.glob("packages/*/pyproject.toml"):
        assert manifest.parent.name in result.stderr


def test_bump_without_its_variables_says_how():
    result = make("bump", "--assume-old=.venv/.synced")
    assert result.returncode == 2
    assert "usage: make bump P=<package> PART=major|minor|patch" in result.stderr
