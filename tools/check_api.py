"""Compares the public names of each package with those of its last release, the tag `<package>-v<version>`.

A package without a tag has its public names listed. Exit status: 0 where nothing broke, or where the version
was raised as a break asks (the major part, or the minor part before 1.0); 1 where something broke and it was
not; 2 where nothing can be compared.
"""

import io
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import griffe
from packaging.version import Version
from workspace import Member, WorkspaceError, last_tag, read_members, workspace_parser

__all__ = ["breaks", "may_break", "public_names"]


def public_names(package: griffe.Object | griffe.Alias) -> list[str]:
    """Every name that a module of `package` lists in its `__all__`, with the module before it."""
    names = [f"{package.path}.{name}" for name in package.exports or () if isinstance(name, str)]
    for module in package.modules.values():
        if not module.name.startswith("_") and not module.is_alias:
            names += public_names(module)
    return sorted(names)


def may_break(old: Version, new: Version) -> bool:
    """Whether the step from `old` to `new` announces a break, by semantic versioning."""
    return new.major > old.major or (new.major == old.major == 0 and new.minor > old.minor)


def breaks(root: Path, member: Member, tag: str) -> list[str]:
    """What the member's public interface lost or changed since `tag`, one explanation each."""
    folder = member.source.relative_to(root).as_posix()
    command = ["git", "-C", str(root), "archive", "--format=zip", tag, "--", folder]
    archive = subprocess.run(command, capture_output=True, check=False)
    if archive.returncode:
        raise WorkspaceError(f"git has no {folder} at {tag}: {archive.stderr.decode().strip()}")
    with tempfile.TemporaryDirectory() as before:
        with zipfile.ZipFile(io.BytesIO(archive.stdout)) as files:
            files.extractall(before)
        old = griffe.load(member.import_name, search_paths=[(Path(before) / folder).parent])
        new = _load(member)
        found = griffe.find_breaking_changes(old, new)
        style = griffe.ExplanationStyle.ONE_LINE
        return [change.explain(style).replace(f"{before}/", "") for change in found]


def _load(member: Member) -> griffe.Object | griffe.Alias:
    return griffe.load(member.import_name, search_paths=[member.source.parent])


def main(arguments: list[str] | None = None) -> int:
    parser = workspace_parser(__doc__)
    parser.add_argument("--package", help="this one only")
    options = parser.parse_args(arguments)
    root: Path = options.root.resolve()
    failed = False
    try:
        members = [m for m in read_members(root) if options.package in (None, m.name)]
        if not members:
            raise WorkspaceError(f"no package is named '{options.package}'")
        for member in members:
            tag = last_tag(root, member)
            if tag is None:
                names = public_names(_load(member))
                print(f"{member.name}: no tag {member.name}-v* to compare with; {len(names)} public names")
                print("".join(f"  {name}\n" for name in names), end="")
                continue
            found = breaks(root, member, tag)
            announced = may_break(Version(tag.removeprefix(f"{member.name}-v")), member.version)
            failed |= bool(found) and not announced
            state = "announced by the version" if announced else f"version is {member.version}"
            print(f"{member.name}: {len(found)} breaks since {tag}" + (f" ({state})" if found else ""))
            print("".join(f"  {line}\n" for line in found), end="")
    except WorkspaceError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
