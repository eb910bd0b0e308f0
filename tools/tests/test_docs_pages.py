from docs_pages import main


def test_pages_are_made_from_every_package(made_up, tmp_path):
    made_up.write("docs/index.md", "# Map\n\n<!-- packages -->\n")
    assert main(["--root", str(made_up.root), str(tmp_path / "site")]) == 0
    index = (tmp_path / "site/index.md").read_text()
    upper = "| [upper-part](packages/upper-part.md) | [`upper`](reference/upper.md) |  | lower |"
    assert index.startswith("# Map\n\n| package |")
    assert upper in index
    assert (tmp_path / "site/packages/lower.md").read_text() == "# lower\n"
    assert "::: upper\n" in (tmp_path / "site/reference/upper.md").read_text()


def test_a_map_with_no_place_is_an_error(made_up, tmp_path, capsys):
    made_up.write("docs/index.md", "# Map\n")
    assert main(["--root", str(made_up.root), str(tmp_path / "site")]) == 2
    assert "has no line '<!-- packages -->'" in capsys.readouterr().err
