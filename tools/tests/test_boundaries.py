"""The contracts of the root pyproject.toml, tried on copies of the real packages."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def packages(tmp_path):
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    for source in ROOT.glob("packages/*/src/*"):
        if (source / "__init__.py").exists():
            shutil.copytree(source, tmp_path / source.name)
    return tmp_path


def lint(folder):
    code = "from importlinter.cli import lint_imports_command; lint_imports_command()"
    # import-linter finds packages through sys.path, where the working directory comes first.
    command = [sys.executable, "-c", code, "--no-cache"]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    ("module", "code"),
    [
        ("bitcore", "import bitlayers"),
        ("bitlayers", "import bitmodels.exceptions"),
        ("av_memory", "import llm_trainer"),
        ("llm_trainer", "import auto_round.exceptions"),
        ("auto_round", "from hamerspace import exceptions"),
        ("hamerspace", "import bitmodels"),
        ("bitmodels", "import hamerspace"),
        ("bitlayers", "import av_memory"),
    ],
)
def test_a_violating_import_is_caught(packages, module, code):
    (packages / module / "trespass.py").write_text(f"{code}\n")
    result = lint(packages)
    assert result.returncode == 1, result.stdout + result.stderr
    assert f"{module}.trespass -> {code.split()[1].split('.')[0]}" in result.stdout


def test_backend_modules_alone_may_import_hamerspace(packages):
    for module in ("bitmodels", "auto_round", "llm_trainer"):
        backend = packages / module / "hamerspace_backend.py"
        backend.write_text("import hamerspace\nimport hamerspace.exceptions\n")
    result = lint(packages)
    assert result.returncode == 0, result.stdout + result.stderr
    (packages / "bitmodels" / "hamerspace_backend.py").write_text("import llm_trainer\n")
    assert lint(packages).returncode == 1
