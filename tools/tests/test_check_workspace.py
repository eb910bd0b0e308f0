import pytest
from check_workspace import check, main, read_workspace
from workspace import WorkspaceError

UPPER = "packages/upper-part/pyproject.toml"
LOWER = "packages/lower/pyproject.toml"


def problems(made_up):
    return check(read_workspace(made_up.root))


def only(made_up):
    """The single problem there is."""
    found = problems(made_up)
    assert len(found) == 1, found
    return found[0]


def test_a_workspace_in_order_has_no_problem(made_up, capsys):
    assert main(["--root", str(made_up.root)]) == 0
    assert capsys.readouterr().out == "2 members, 8 rules, 0 problems\n"


@pytest.mark.parametrize(
    ("declared", "complaint"),
    [
        ("lower>=0.3,<1", "does not hold the sibling's current version 0.2.1"),
        ("lower>=0.2", "must be of the form"),
        ("lower==0.2.1", "must be of the form"),
        ("lower", "must be of the form"),
        ("lower>=0.2,<2", "must end in '<1'"),
        ("lower>=1.4,<2", "does not hold"),
    ],
)
def test_sibling_range(made_up, declared, complaint):
    made_up.replace(UPPER, "lower>=0.2.0,<1", declared)
    assert complaint in only(made_up)


def test_sibling_range_in_an_extra(made_up):
    made_up.replace(
        UPPER,
        "[tool.hatch",
        '[project.optional-dependencies]\nmore = ["Lower>=0.9,<1"]\n\n[tool.hatch',
    )
    assert "does not hold" in only(made_up)


def test_version_constant(made_up):
    made_up.replace("packages/lower/src/lower/__init__.py", '"0.2.1"', '"0.2.0"')
    assert "__init__.py says 0.2.0; pyproject.toml says 0.2.1" in only(made_up)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("# Changelog\n\n## 0.2.0\n\n- Older.\n", "begins with 0.2.0"),
        ("# Changelog\n\n## 0.2.1\n\n## 0.2.0\n\n- Older.\n", "0.2.1 says nothing"),
        ("# Changelog\n\n## Unreleased\n\n- New.\n", "must be a version"),
        ("# Changelog\n", "must be a version"),
    ],
)
def test_changelog(made_up, text, complaint):
    made_up.write("packages/lower/CHANGELOG.md", text)
    assert complaint in only(made_up)


@pytest.mark.parametrize("name", ["README.md", "CHANGELOG.md", "LICENSE", "src/lower/py.typed"])
def test_missing_file(made_up, name):
    (made_up.root / "packages/lower" / name).unlink()
    assert only(made_up) == f"packages/lower/{name} is missing"


def test_licence_that_differs(made_up):
    made_up.write("packages/lower/LICENSE", "Ask first.\n")
    assert only(made_up) == "packages/lower/LICENSE differs from the LICENSE of the workspace"


def test_python_that_differs(made_up):
    made_up.replace(LOWER, ">=3.11,<3.14", ">=3.12")
    assert only(made_up) == "lower requires Python '>=3.12', the workspace '>=3.11,<3.14'"


@pytest.mark.parametrize(
    ("old", "new", "complaint"),
    [
        (
            'members = ["lower", "upper-part"]',
            'members = ["lower"]',
            "upper-part is not in the root's dependency",
        ),
        ("lower = { workspace = true }\n", "", "lower is not a workspace source"),
        ('["lower", "upper"]', '["lower"]', "upper is not among the root_packages"),
    ],
)
def test_member_the_root_forgets(made_up, old, new, complaint):
    made_up.replace("pyproject.toml", old, new)
    assert complaint in only(made_up)


def test_undeclared_import(made_up):
    made_up.write("packages/lower/src/lower/reading.py", "import packaging\n")
    assert "packages/lower/src/lower/reading.py:1: DEP" in only(made_up)
    made_up.replace(LOWER, "dependencies = []", 'dependencies = ["packaging"]')
    assert problems(made_up) == []


def test_undeclared_sibling(made_up):
    made_up.replace(UPPER, '"lower>=0.2.0,<1"', "")
    assert all("'lower'" in problem for problem in problems(made_up))
    assert len(problems(made_up)) == 2


def test_private_name_of_a_sibling(made_up):
    file = made_up.write("packages/upper-part/src/upper/peek.py", "from lower import hidden\n")
    assert only(made_up) == f"{file.relative_to(made_up.root)}:1: lower.hidden is not in the __all__ of lower"


def test_what_cannot_be_judged(made_up, tmp_path, capsys):
    with pytest.raises(WorkspaceError, match=r"pyproject\.toml is missing"):
        read_workspace(tmp_path)
    made_up.replace(LOWER, 'version = "0.2.1"', 'version = "two"')
    assert main(["--root", str(made_up.root)]) == 2
    assert "Invalid version: 'two'" in capsys.readouterr().err
    made_up.replace(LOWER, 'version = "two"\n', "")
    with pytest.raises(WorkspaceError, match="has no version"):
        read_workspace(made_up.root)
    made_up.write("packages/lower/src/second/__init__.py", "")
    with pytest.raises(WorkspaceError, match="exactly one package"):
        read_workspace(made_up.root)
