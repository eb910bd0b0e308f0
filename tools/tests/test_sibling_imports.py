import pytest
from sibling_imports import find_trespasses, read_all


def trespasses(made_up, code):
    file = made_up.write("packages/upper-part/src/upper/other.py", code)
    sources = {"lower": made_up.root / "packages/lower/src/lower"}
    return [problem.removeprefix(f"{file}:") for problem in find_trespasses(file, sources)]


@pytest.mark.parametrize(
    "code",
    [
        "import lower",
        "from lower import shared, shapes, __version__",
        "from lower.shapes import Shape",
        "import lower.shapes as s\nprint(s.Shape.sides)",
        "from lower import shapes\nprint(shapes.Shape.anything)",
        "import lower\nprint(lower.shared, lower.__version__)",
        "from . import _own",
        "import elsewhere._private",
        "hidden = 1\nprint(hidden)",
    ],
)
def test_allowed(made_up, code):
    assert trespasses(made_up, code) == []


@pytest.mark.parametrize(
    ("code", "problem"),
    [
        ("from lower import hidden", "1: lower.hidden is not in the __all__ of lower"),
        ("from lower.shapes import Draft", "1: lower.shapes.Draft is not in the __all__ of lower.shapes"),
        ("from lower import _inner", "1: lower._inner is private to lower"),
        ("import lower._inner", "1: lower._inner is private to lower"),
        ("from lower._inner import thing", "1: lower._inner is private to lower"),
        ("from lower import *", "1: lower is imported with a star"),
        ("import lower\nlower.hidden", "2: lower.hidden is not in the __all__ of lower"),
        ("import lower as low\nlow._inner.thing", "2: lower._inner is private to lower"),
        (
            "import lower.shapes as s\ns.Draft()",
            "2: lower.shapes.Draft is not in the __all__ of lower.shapes",
        ),
        ("def f():\n    from lower import hidden", "2: lower.hidden is not in the __all__ of lower"),
        ("import lower.absent", "1: lower.absent is not in the __all__ of lower"),
    ],
)
def test_refused(made_up, code, problem):
    assert trespasses(made_up, code) == [problem]


def test_read_all(tmp_path):
    file = tmp_path / "m.py"
    for code, names in [
        ('__all__ = ["a", "b"]', {"a", "b"}),
        ('__all__: list[str] = ["a"]', {"a"}),
        ('__all__ = ("a",)', {"a"}),
        ("__all__: list[str] = []", set()),
        ("a = 1", None),
    ]:
        file.write_text(code)
        assert read_all(file) == names
