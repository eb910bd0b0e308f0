"""The members of the workspace as their pyproject.toml files describe them.

Run as a script it prints the exact version of every member, in the form of a pip constraints file.
"""

import argparse
import re
import subprocess
import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import canonicalize_name
from packaging.version import InvalidVersion, Version

__all__ = ["Member", "WorkspaceError", "last_tag", "read_members", "read_toml", "workspace_parser"]

ROOT = Path(__file__).resolve().parent.parent


class WorkspaceError(Exception):
    """The folder is no workspace of the expected form; no rule can be judged. Tools exit with 2."""


@dataclass(frozen=True, kw_only=True)
class Member:
    """One distribution of the workspace."""

    name: str
    path: Path
    import_name: str
    version: Version
    requires_python: str
    requirements: tuple[Requirement, ...]
    """Everything declared, extras included."""
    extras: tuple[str, ...] = ()

    @property
    def source(self) -> Path:
        return self.path / "src" / self.import_name

    def siblings(self, members: list["Member"]) -> list["Member"]:
        """Those of `members` that this one declares, itself left out."""
        declared = {canonicalize_name(requirement.name) for requirement in self.requirements}
        return [other for other in members if other.name in declared and other.name != self.name]


def read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise WorkspaceError(f"{path} is missing") from None
    except tomllib.TOMLDecodeError as error:
        raise WorkspaceError(f"{path} is not valid TOML: {error}") from None


def read_members(root: Path) -> list[Member]:
    """Every `packages/*/pyproject.toml` under `root`, by name."""
    manifests = sorted(root.glob("packages/*/pyproject.toml"))
    if not manifests:
        raise WorkspaceError(f"{root} has no packages/*/pyproject.toml; name the workspace with --root")
    return sorted((_read_member(manifest) for manifest in manifests), key=lambda member: member.name)


def _read_member(manifest: Path) -> Member:
    project = read_toml(manifest).get("project", {})
    extras: dict[str, list[str]] = project.get("optional-dependencies", {})
    texts = [*project.get("dependencies", []), *(text for extra in extras.values() for text in extra)]
    packages = [init.parent.name for init in manifest.parent.glob("src/*/__init__.py")]
    if len(packages) != 1:
        raise WorkspaceError(f"{manifest.parent}/src must hold exactly one package, found {packages}")
    try:
        return Member(
            name=canonicalize_name(project["name"]),
            path=manifest.parent,
            import_name=packages[0],
            version=Version(project["version"]),
            requires_python=project["requires-python"],
            requirements=tuple(Requirement(text) for text in texts),
            extras=tuple(extras),
        )
    except KeyError as error:
        raise WorkspaceError(f"{manifest}: [project] has no {error.args[0]}") from None
    except (InvalidVersion, InvalidRequirement) as error:
        raise WorkspaceError(f"{manifest}: {error}") from None


def last_tag(root: Path, member: Member) -> str | None:
    """The tag `<name>-v<version>` of the highest version, or None where the member was never tagged."""
    command = ["git", "-C", str(root), "tag", "--list", f"{member.name}-v*"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        raise WorkspaceError(f"git cannot list the tags of {root}: {result.stderr.strip()}")
    versions = [tag.removeprefix(f"{member.name}-v") for tag in result.stdout.split()]
    known = [Version(text) for text in versions if re.fullmatch(r"\d+(\.\d+)*\w*", text)]
    return f"{member.name}-v{max(known)}" if known else None


def workspace_parser(description: str | None) -> argparse.ArgumentParser:
    """An argument parser with the one option that all tools share."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--root", type=Path, default=ROOT, help="the workspace (default: this file's)")
    return parser


def _from_wheel(member: Member, folder: Path) -> str:
    """A requirement that no other project's distribution of the same name and version can meet."""
    stem = f"{member.name.replace('-', '_')}-{member.version}"
    wheels = sorted(folder.resolve().glob(f"{stem}-*.whl"))
    if not wheels:
        raise WorkspaceError(f"{folder} has no wheel {stem}-*.whl; 'make wheels' builds it")
    return f"{member.name}{'[all]' if 'all' in member.extras else ''} @ {wheels[0].as_uri()}"


def main(arguments: list[str] | None = None) -> int:
    parser = workspace_parser(__doc__)
    parser.add_argument("--wheels", type=Path, help="print what installs the wheels of this folder")
    options = parser.parse_args(arguments)
    wheels: Path | None = options.wheels
    try:
        members = read_members(options.root)
        lines = [_from_wheel(m, wheels) if wheels else f"{m.name}=={m.version}" for m in members]
    except WorkspaceError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print("\n".join(lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
