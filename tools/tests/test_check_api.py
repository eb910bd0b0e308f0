import pytest
from check_api import main, may_break
from packaging.version import Version

SHAPES = "packages/lower/src/lower/shapes.py"


@pytest.mark.parametrize(
    ("old", "new", "may"),
    [
        ("0.2.1", "0.3.0", True),
        ("0.2.1", "0.2.2", False),
        ("1.2.0", "1.3.0", False),
        ("1.2.0", "2.0.0", True),
        ("0.9.0", "1.0.0", True),
    ],
)
def test_may_break(old, new, may):
    assert may_break(Version(old), Version(new)) is may


def run(made_up, capsys, *arguments):
    status = main(["--root", str(made_up.root), "--package", "lower", *arguments])
    return status, capsys.readouterr().out


def test_without_a_tag_names_are_listed(made_up, capsys):
    made_up.commit()
    status, text = run(made_up, capsys)
    assert status == 0
    assert text == (
        "lower: no tag lower-v* to compare with; 2 public names\n  lower.shapes.Shape\n  lower.shared\n"
    )


def test_a_break_needs_its_version(made_up, capsys):
    made_up.commit()
    made_up.git("tag", "lower-v0.2.1")
    assert run(made_up, capsys) == (0, "lower: 0 breaks since lower-v0.2.1\n")
    made_up.replace(SHAPES, '["Shape"]', '["Shape", "draw"]')
    made_up.replace(SHAPES, "class Draft", "def draw(colour):\n    return colour\n\n\nclass Draft")
    made_up.commit()
    made_up.git("tag", "lower-v0.2.2")
    made_up.replace(SHAPES, "draw(colour)", "draw(colour, width)")
    status, text = run(made_up, capsys)
    assert status == 1
    assert "1 breaks since lower-v0.2.2" in text
    assert "draw" in text
    assert "width" in text
    made_up.replace("packages/lower/pyproject.toml", "0.2.1", "0.3.0")
    status, text = run(made_up, capsys)
    assert status == 0
    assert "announced by the version" in text


def test_unknown_package(made_up, capsys):
    assert main(["--root", str(made_up.root), "--package", "lowest"]) == 2
    assert "no package is named 'lowest'" in capsys.readouterr().err
