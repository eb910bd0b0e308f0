import pytest
from release_plan import OWNED, TAKEN, main, plan
from workspace import WorkspaceError, last_tag, read_members

BOTH = frozenset({"lower", "upper-part"})


def steps(made_up, tagged=None, **tables):
    tables = {"owned": BOTH, "taken": {}} | tables
    found = plan(read_members(made_up.root), tagged or {}, **tables)
    return [(step.member.name, step.refused) for step in found]


def test_what_others_need_comes_first(made_up):
    assert steps(made_up) == [("lower", None), ("upper-part", None)]


def test_what_is_tagged_is_left_out(made_up):
    assert steps(made_up, {"lower": "lower-v0.2.1"}) == [("upper-part", None)]
    assert steps(made_up, {"lower": "lower-v0.2.0", "upper-part": "upper-part-v1.0.0"}) == [("lower", None)]


def test_a_name_of_others_is_refused_and_blocks_what_needs_it(made_up):
    found = dict(steps(made_up, taken={"lower": "it is Jane's"}))
    assert found == {"lower": "it is Jane's", "upper-part": "it needs lower, which may not be published"}


def test_a_name_in_neither_table_is_refused(made_up):
    assert "not registered by the project" in dict(steps(made_up, owned={"lower"}))["upper-part"]


def test_what_is_published_already_does_not_block(made_up):
    assert steps(made_up, {"lower": "lower-v0.2.1"}, owned={"upper-part"}) == [("upper-part", None)]


def test_a_circle_is_an_error(made_up):
    manifest = "packages/lower/pyproject.toml"
    made_up.replace(manifest, "dependencies = []", 'dependencies = ["upper-part>=1,<2"]')
    with pytest.raises(WorkspaceError, match=r"in a circle: .*lower -> upper-part"):
        steps(made_up)


def test_tags_are_read_from_git_and_compared_as_versions(made_up, capsys):
    assert main(["--root", str(made_up.root)]) == 2
    assert "git cannot list the tags" in capsys.readouterr().err
    made_up.commit()
    for tag in ("lower-v0.2.1", "lower-v0.10.0", "lower-v0.9.0", "upper-part-v1.0.0"):
        made_up.git("tag", tag)
    lower, upper = read_members(made_up.root)
    assert last_tag(made_up.root, lower) == "lower-v0.10.0"
    assert last_tag(made_up.root, upper) == "upper-part-v1.0.0"
    assert main(["--root", str(made_up.root)]) == 1
    assert capsys.readouterr().out.startswith("1. lower 0.2.1: REFUSED")


def test_no_name_is_both_owned_and_taken():
    assert not OWNED & TAKEN.keys()
    assert {"hamerspace", "llm-trainer"} <= TAKEN.keys()
