from workspace import main, read_members


def test_members_know_their_siblings(made_up):
    lower, upper = read_members(made_up.root)
    assert (lower.name, upper.name, upper.import_name) == ("lower", "upper-part", "upper")
    assert upper.siblings([lower, upper]) == [lower]
    assert lower.siblings([lower, upper]) == []


def test_constraints(made_up, capsys):
    assert main(["--root", str(made_up.root)]) == 0
    assert capsys.readouterr().out == "lower==0.2.1\nupper-part==1.0.0\n"


def test_wheels_are_named_by_their_files(made_up, tmp_path, capsys):
    extras = '[project.optional-dependencies]\nall = ["packaging"]\n\n[tool.hatch'
    made_up.replace("packages/upper-part/pyproject.toml", "[tool.hatch", extras)
    made_up.write("dist/lower-0.2.1-py3-none-any.whl", "")
    arguments = ["--root", str(made_up.root), "--wheels", str(made_up.root / "dist")]
    assert main(arguments) == 2
    assert "has no wheel upper_part-1.0.0-*.whl" in capsys.readouterr().err
    made_up.write("dist/upper_part-1.0.0-py3-none-any.whl", "")
    assert main(arguments) == 0
    folder = f"file://{made_up.root}/dist"
    assert capsys.readouterr().out == (
        f"lower @ {folder}/lower-0.2.1-py3-none-any.whl\n"
        f"upper-part[all] @ {folder}/upper_part-1.0.0-py3-none-any.whl\n"
    )
