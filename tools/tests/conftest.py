"""A made-up workspace that breaks no rule, for tests to break one at a time."""

import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

# The tools are scripts, not a package: they find one another through the folder they lie in, and so do tests.
TOOLS = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(TOOLS))

ROOT_MANIFEST = """\
[project]
name = "made-up"
version = "0"
requires-python = ">=3.11,<3.14"

[dependency-groups]
members = ["lower", "upper-part"]

[tool.uv]
package = false

[tool.uv.workspace]
members = ["packages/*"]

[tool.uv.sources]
lower = { workspace = true }
upper-part = { workspace = true }

[tool.importlinter]
root_packages = ["lower", "upper"]
"""

MANIFEST = """\
[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"

[project]
name = "{name}"
version = "{version}"
requires-python = ">=3.11,<3.14"
dependencies = [{dependencies}]

[tool.hatch.build.targets.wheel]
packages = ["src/{package}"]
"""


@dataclass(frozen=True)
class MadeUp:
    """The folder of a workspace, with short ways to change what lies in it."""

    root: Path

    def write(self, path: str, text: str) -> Path:
        file = self.root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
        return file

    def replace(self, path: str, old: str, new: str) -> None:
        text = (self.root / path).read_text()
        assert old in text
        self.write(path, text.replace(old, new))

    def add_member(self, name: str, package: str, version: str, dependencies: str) -> None:
        manifest = MANIFEST.format(name=name, package=package, version=version, dependencies=dependencies)
        self.write(f"packages/{name}/pyproject.toml", manifest)
        self.write(f"packages/{name}/README.md", f"# {name}\n")
        self.write(f"packages/{name}/CHANGELOG.md", f"# Changelog\n\n## {version}\n\n- First.\n")
        self.write(f"packages/{name}/LICENSE", "Do as you please.\n")
        self.write(f"packages/{name}/src/{package}/py.typed", "")

    def git(self, *arguments: str) -> None:
        who = ["-c", "user.name=Somebody", "-c", "user.email=somebody@example.org"]
        subprocess.run(["git", "-C", str(self.root), *who, *arguments], check=True, capture_output=True)

    def commit(self) -> None:
        self.git("init", "--quiet")
        self.git("add", "--all")
        self.git("commit", "--quiet", "--message", "State")


@pytest.fixture(scope="session")
def uv() -> str:
    """Path of the uv that the Makefile uses."""
    found = shutil.which("uv") or next(map(str, TOOLS.parent.glob(".uv/*/bin/uv")), None)
    if found is None:
        pytest.skip("no uv on PATH or in .uv; 'make setup' brings one")
    return found


@pytest.fixture
def made_up(tmp_path: Path) -> MadeUp:
    """Two members: `lower`, and `upper-part` (imported as upper) which needs it."""
    workspace = MadeUp(tmp_path / "workspace")
    workspace.write("pyproject.toml", ROOT_MANIFEST)
    workspace.write("LICENSE", "Do as you please.\n")
    workspace.add_member("lower", "lower", "0.2.1", "")
    lower = '"""Below."""\n\n__version__ = "0.2.1"\n\n__all__ = ["shared"]\n\nshared = hidden = 1\n'
    workspace.write("packages/lower/src/lower/__init__.py", lower)
    shapes = '__all__ = ["Shape"]\n\n\nclass Shape:\n    sides = 3\n\n\nclass Draft:\n    pass\n'
    workspace.write("packages/lower/src/lower/shapes.py", shapes)
    workspace.write("packages/lower/src/lower/_inner.py", '__all__ = ["thing"]\n\nthing = 1\n')
    workspace.add_member("upper-part", "upper", "1.0.0", '"lower>=0.2.0,<1"')
    upper = "import lower.shapes\nfrom lower import shared\n\nvalue = (shared, lower.shapes.Shape)\n"
    workspace.write("packages/upper-part/src/upper/__init__.py", f'{upper}\n__version__ = "1.0.0"\n')
    return workspace
