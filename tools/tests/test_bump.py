import pytest
from bump import main, next_version, outgrown
from check_workspace import check, read_workspace
from packaging.version import Version
from workspace import read_members


@pytest.mark.parametrize(
    ("old", "part", "new"),
    [
        ("0.2.1", "patch", "0.2.2"),
        ("0.2.1", "minor", "0.3.0"),
        ("0.2.1", "major", "1.0.0"),
        ("1.9.9", "minor", "1.10.0"),
        ("1.0.0rc1", "patch", "1.0.1"),
    ],
)
def test_next_version(old, part, new):
    assert next_version(Version(old), part) == Version(new)


def test_three_files_change_and_an_empty_changelog_section_is_a_problem(made_up, capsys):
    assert main(["--root", str(made_up.root), "lower", "minor"]) == 0
    assert "lower 0.2.1 -> 0.3.0" in capsys.readouterr().out
    lower = made_up.root / "packages/lower"
    assert (lower / "CHANGELOG.md").read_text() == "# Changelog\n\n## 0.3.0\n\n## 0.2.1\n\n- First.\n"
    assert check(read_workspace(made_up.root)) == [
        "packages/lower/CHANGELOG.md: the section 0.3.0 says nothing"
    ]
    made_up.replace("packages/lower/CHANGELOG.md", "## 0.3.0\n", "## 0.3.0\n\n- Second.\n")
    assert check(read_workspace(made_up.root)) == []


def test_ranges_that_no_longer_hold_are_named_and_left(made_up, capsys):
    before = (made_up.root / "packages/upper-part/pyproject.toml").read_text()
    assert main(["--root", str(made_up.root), "lower", "major"]) == 0
    assert "no longer holds: upper-part: lower<1,>=0.2.0" in capsys.readouterr().out
    assert (made_up.root / "packages/upper-part/pyproject.toml").read_text() == before
    assert outgrown(read_members(made_up.root), "lower", Version("0.9")) == []


def test_nothing_is_written_where_one_file_does_not_fit(made_up, capsys):
    made_up.write("packages/lower/CHANGELOG.md", "# Changelog\n")
    assert main(["--root", str(made_up.root), "lower", "patch"]) == 2
    assert "CHANGELOG.md has no line like" in capsys.readouterr().err
    assert 'version = "0.2.1"' in (made_up.root / "packages/lower/pyproject.toml").read_text()


def test_unknown_package(made_up, capsys):
    assert main(["--root", str(made_up.root), "lowest", "patch"]) == 2
    assert "'lowest' is no package of this workspace; there are: lower, upper-part" in capsys.readouterr().err
