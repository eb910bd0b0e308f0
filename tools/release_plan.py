"""Says which packages await publication, those that others need first.

A package awaits publication where its version has no tag `<name>-v<version>`. Nothing is published to a name
on the public index that the project does not own. Exit status: 0 where all that awaits may be published, 1
where something may not, 2 where no plan can be made.
"""

import sys
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter

from workspace import Member, WorkspaceError, last_tag, read_members, workspace_parser

__all__ = ["OWNED", "TAKEN", "Step", "plan"]

OWNED: frozenset[str] = frozenset()
"""Names that the project has registered on PyPI with a trusted publisher. Add one when it is true."""

TAKEN: Mapping[str, str] = {
    "hamerspace": "the name belongs to another project on PyPI",
    "llm-trainer": "the name belongs to another project on PyPI",
    "auto-round-core": "Intel's auto-round has the same import name; each overwrites the other's files",
}


@dataclass(frozen=True, kw_only=True)
class Step:
    """One package that awaits publication, and why it may not be published, if so."""

    member: Member
    refused: str | None


def plan(
    members: list[Member],
    tagged: Mapping[str, str | None],
    *,
    owned: Collection[str] = OWNED,
    taken: Mapping[str, str] = TAKEN,
) -> list[Step]:
    """The packages of `members` whose version differs from their last tag in `tagged`, bottom-up."""
    by_name = {member.name: member for member in members}
    graph = {m.name: sorted(sibling.name for sibling in m.siblings(members)) for m in members}
    try:
        order = list(TopologicalSorter(graph).static_order())
    except CycleError as error:
        raise WorkspaceError(f"packages need one another in a circle: {' -> '.join(error.args[1])}") from None
    steps: dict[str, Step] = {}
    for name in order:
        member = by_name[name]
        if tagged.get(name) == f"{name}-v{member.version}":
            continue
        blocking = [sibling for sibling in graph[name] if sibling in steps and steps[sibling].refused]
        refused = taken.get(name)
        if refused is None and name not in owned:
            refused = "the name is not registered by the project on PyPI (table OWNED in this tool)"
        if refused is None and blocking:
            refused = f"it needs {', '.join(blocking)}, which may not be published"
        steps[name] = Step(member=member, refused=refused)
    return list(steps.values())


def main(arguments: list[str] | None = None) -> int:
    root = workspace_parser(__doc__).parse_args(arguments).root
    try:
        members = read_members(root)
        steps = plan(members, {member.name: last_tag(root, member) for member in members})
    except WorkspaceError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if not steps:
        print("every package's version is tagged: nothing to publish")
    for number, step in enumerate(steps, 1):
        verdict = f"REFUSED: {step.refused}" if step.refused else "publish"
        print(f"{number}. {step.member.name} {step.member.version}: {verdict}")
    return 1 if any(step.refused for step in steps) else 0


if __name__ == "__main__":
    sys.exit(main())
