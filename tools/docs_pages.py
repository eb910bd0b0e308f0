"""Lays out the source of the site: docs/, a page for each package's README and docstrings, and the map.

The pages are made when the site is built, so that a new package needs nothing here and none is forgotten.
"""

import shutil
import sys
from pathlib import Path

from workspace import Member, WorkspaceError, read_members, read_toml, workspace_parser

__all__ = ["lay_out", "package_map"]

MAP = "<!-- packages -->"


def lay_out(root: Path, target: Path) -> None:
    """Fill `target`, which is emptied first."""
    members = read_members(root)
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(root / "docs", target)
    (target / "packages").mkdir(exist_ok=True)
    (target / "reference").mkdir(exist_ok=True)
    for member in members:
        shutil.copy(member.path / "README.md", target / "packages" / f"{member.name}.md")
        text = f"# {member.import_name}\n\n::: {member.import_name}\n"
        (target / "reference" / f"{member.import_name}.md").write_text(text, encoding="utf-8")
    index = target / "index.md"
    text = index.read_text(encoding="utf-8")
    if MAP not in text:
        raise WorkspaceError(f"{root}/docs/index.md has no line '{MAP}' for the map of the packages")
    index.write_text(text.replace(MAP, package_map(members)), encoding="utf-8")


def package_map(members: list[Member]) -> str:
    """A table of the packages: what each is, what of the others it needs, and where its reference is."""
    rows = ["| package | import | what it is | needs |", "| --- | --- | --- | --- |"]
    for member in members:
        about = read_toml(member.path / "pyproject.toml")["project"].get("description", "")
        needs = ", ".join(sibling.name for sibling in member.siblings(members)) or "none of the others"
        reference = f"[`{member.import_name}`](reference/{member.import_name}.md)"
        rows.append(f"| [{member.name}](packages/{member.name}.md) | {reference} | {about} | {needs} |")
    return "\n".join(rows)


def main(arguments: list[str] | None = None) -> int:
    parser = workspace_parser(__doc__)
    parser.add_argument("target", type=Path, help="folder to fill; what is in it is lost")
    options = parser.parse_args(arguments)
    try:
        lay_out(options.root, options.target)
    except (WorkspaceError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
