"""Raises the version of one package: in pyproject.toml, in __version__, and as a new changelog section.

Ranges of other packages are left alone; those that do not hold the new version are listed. Exit status: 0
when done, 2 where nothing was changed.
"""

import re
import sys
from pathlib import Path

from packaging.version import Version
from workspace import Member, WorkspaceError, read_members, workspace_parser

__all__ = ["bump", "next_version", "outgrown"]

PARTS = ("major", "minor", "patch")


def next_version(version: Version, part: str) -> Version:
    """The final release after `version`: `part` is raised by one and what is right of it becomes zero."""
    numbers = [version.major, version.minor, version.micro]
    place = PARTS.index(part)
    return Version(".".join(map(str, [*numbers[:place], numbers[place] + 1, 0, 0][:3])))


def bump(member: Member, version: Version) -> list[Path]:
    """Write `version` into the three files of `member`; all are checked before the first is written."""
    places = {
        member.path / "pyproject.toml": (r'^(version = ")[^"]+(")$', rf"\g<1>{version}\2"),
        member.source / "__init__.py": (r'^(__version__ = ")[^"]+(")$', rf"\g<1>{version}\2"),
        member.path / "CHANGELOG.md": (r"^(?=## )", f"## {version}\n\n"),
    }
    texts: dict[Path, str] = {}
    for file, (pattern, replacement) in places.items():
        text = file.read_text(encoding="utf-8")
        texts[file], found = re.subn(pattern, replacement, text, count=1, flags=re.MULTILINE)
        if not found:
            raise WorkspaceError(f"{file} has no line like '{pattern}'")
    for file, text in texts.items():
        file.write_text(text, encoding="utf-8")
    return list(texts)


def outgrown(members: list[Member], name: str, version: Version) -> list[str]:
    """The requirements, with the member that has them, which do not hold `version` of the member `name`."""
    return [
        f"{member.name}: {requirement}"
        for member in members
        for requirement in member.requirements
        if requirement.name == name and not requirement.specifier.contains(version)
    ]


def main(arguments: list[str] | None = None) -> int:
    parser = workspace_parser(__doc__)
    parser.add_argument("package", help="distribution name, such as av-memory")
    parser.add_argument("part", choices=PARTS)
    options = parser.parse_args(arguments)
    try:
        members = read_members(options.root)
        member = next((m for m in members if m.name == options.package), None)
        if member is None:
            names = ", ".join(m.name for m in members)
            raise WorkspaceError(f"'{options.package}' is no package of this workspace; there are: {names}")
        version = next_version(member.version, options.part)
        changed = bump(member, version)
    except (WorkspaceError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{member.name} {member.version} -> {version}")
    for file in changed:
        print(f"  wrote {file}")
    print(f"  say what changed under '## {version}' in {member.path / 'CHANGELOG.md'}")
    for requirement in outgrown(members, member.name, version):
        print(f"  no longer holds: {requirement}; widen it once that package is tested with {version}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
