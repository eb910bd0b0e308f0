"""Checks what no other tool does: that the members' versions, files, ranges and imports agree.

Exit status: 0 where every rule holds, 1 with one line for each that does not, 2 where nothing can be judged.
"""

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import InvalidVersion, Version
from sibling_imports import find_trespasses
from workspace import Member, WorkspaceError, read_members, read_toml, workspace_parser

__all__ = ["Workspace", "check", "read_workspace"]

EVERY_MEMBER_HAS = ("README.md", "CHANGELOG.md", "LICENSE")


@dataclass(frozen=True, kw_only=True)
class Workspace:
    root: Path
    manifest: dict[str, Any]
    members: list[Member]

    def show(self, path: Path) -> str:
        return str(path.relative_to(self.root))


def read_workspace(root: Path) -> Workspace:
    root = root.resolve()
    return Workspace(root=root, manifest=read_toml(root / "pyproject.toml"), members=read_members(root))


def sibling_ranges(workspace: Workspace) -> Iterator[str]:
    """uv takes siblings from their folders and never looks at these ranges; an installer of wheels does."""
    by_name = {member.name: member for member in workspace.members}
    for member in workspace.members:
        for requirement in member.requirements:
            sibling = by_name.get(canonicalize_name(requirement.name))
            if sibling and sibling is not member:
                problem = _range_problem(requirement, sibling.version)
                if problem:
                    yield f"{workspace.show(member.path)}/pyproject.toml: '{requirement}' {problem}"


def _range_problem(requirement: Requirement, version: Version) -> str | None:
    bounds = {specifier.operator: specifier.version for specifier in requirement.specifier}
    if len(requirement.specifier) != 2 or bounds.keys() != {">=", "<"}:
        return "must be of the form '>=floor,<next major'"
    major = Version(bounds[">="]).major + 1
    if bounds["<"] != str(major):
        return f"must end in '<{major}', the major version after its floor"
    if not requirement.specifier.contains(version, prereleases=True):
        return f"does not hold the sibling's current version {version}"
    return None


def versions(workspace: Workspace) -> Iterator[str]:
    for member in workspace.members:
        init = member.source / "__init__.py"
        found = re.search(r'^__version__ = "([^"]*)"', init.read_text(encoding="utf-8"), re.MULTILINE)
        if not found or found[1] != str(member.version):
            says = f"says {found[1]}" if found else "has no __version__"
            yield f"{workspace.show(init)} {says}; pyproject.toml says {member.version}"


def changelogs(workspace: Workspace) -> Iterator[str]:
    for member in workspace.members:
        file = member.path / "CHANGELOG.md"
        if not file.exists():
            continue
        _, *sections = re.split(r"^## ", file.read_text(encoding="utf-8"), flags=re.MULTILINE)
        title, _, body = (sections[0] if sections else "").partition("\n")
        try:
            top = Version(title.split()[0].strip("[]"))
        except (IndexError, InvalidVersion):
            yield f"{workspace.show(file)}: the first section ('## {title}') must be a version"
            continue
        if top != member.version:
            yield f"{workspace.show(file)} begins with {top}; pyproject.toml says {member.version}"
        elif not body.strip():
            yield f"{workspace.show(file)}: the section {top} says nothing"


def files(workspace: Workspace) -> Iterator[str]:
    licence = workspace.root / "LICENSE"
    if not licence.exists():
        yield "LICENSE is missing"
    for member in workspace.members:
        for path in (*(member.path / name for name in EVERY_MEMBER_HAS), member.source / "py.typed"):
            if not path.exists():
                yield f"{workspace.show(path)} is missing"
        own = member.path / "LICENSE"
        if own.exists() and licence.exists() and own.read_bytes() != licence.read_bytes():
            yield f"{workspace.show(own)} differs from the LICENSE of the workspace"


def pythons(workspace: Workspace) -> Iterator[str]:
    wanted = workspace.manifest.get("project", {}).get("requires-python")
    for member in workspace.members:
        if member.requires_python != wanted:
            yield f"{member.name} requires Python '{member.requires_python}', the workspace '{wanted}'"


def listed(workspace: Workspace) -> Iterator[str]:
    """A member that the root forgets is neither installed nor held to the boundaries."""
    manifest = workspace.manifest
    tools: dict[str, Any] = manifest.get("tool", {})
    group: list[str] = manifest.get("dependency-groups", {}).get("members", [])
    grouped = {canonicalize_name(Requirement(text).name) for text in group}
    sources: dict[str, Any] = tools.get("uv", {}).get("sources", {})
    bounded: list[str] = tools.get("importlinter", {}).get("root_packages", [])
    for member in workspace.members:
        if member.name not in grouped:
            yield f"{member.name} is not in the root's dependency group 'members'"
        if sources.get(member.name) != {"workspace": True}:
            yield f"{member.name} is not a workspace source in the root's [tool.uv.sources]"
        if member.import_name not in bounded:
            yield f"{member.import_name} is not among the root_packages of [tool.importlinter]"


def public_imports(workspace: Workspace) -> Iterator[str]:
    for member in workspace.members:
        siblings = {m.import_name: m.source for m in workspace.members if m is not member}
        for file in sorted(member.source.rglob("*.py")):
            for problem in find_trespasses(file, siblings):
                yield problem.removeprefix(f"{workspace.root}/")


def declared_imports(workspace: Workspace) -> Iterator[str]:
    """deptry finds imports that the member's own pyproject.toml does not declare."""
    names = ",".join(f"{m.name}={m.import_name}" for m in workspace.members)
    for member in workspace.members:
        with tempfile.TemporaryDirectory() as folder:
            report = Path(folder) / "deptry.json"
            # DEP002, declared and not imported, is no fault: a dependency may be used as a plugin.
            command = [sys.executable, "-m", "deptry", "src", "--no-ansi", "--ignore", "DEP002"]
            command += ["--package-module-name-map", names, "--json-output", str(report)]
            result = subprocess.run(command, cwd=member.path, capture_output=True, text=True, check=False)
            if not report.exists():
                raise WorkspaceError(
                    f"deptry failed on {member.name}: {(result.stderr or result.stdout).strip()}"
                )
            found = json.loads(report.read_text(encoding="utf-8"))
        for entry in found:
            place = entry["location"]
            yield (
                f"{workspace.show(member.path)}/{place['file']}:{place['line']}: "
                f"{entry['error']['code']} {entry['error']['message']}"
            )


RULES: tuple[Callable[[Workspace], Iterator[str]], ...] = (
    sibling_ranges,
    versions,
    changelogs,
    files,
    pythons,
    listed,
    public_imports,
    declared_imports,
)


def check(workspace: Workspace) -> list[str]:
    """Every breach of every rule."""
    return [problem for rule in RULES for problem in rule(workspace)]


def main(arguments: list[str] | None = None) -> int:
    options = workspace_parser(__doc__).parse_args(arguments)
    try:
        workspace = read_workspace(options.root)
        problems = check(workspace)
    except WorkspaceError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for problem in problems:
        print(problem)
    print(f"{len(workspace.members)} members, {len(RULES)} rules, {len(problems)} problems")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
