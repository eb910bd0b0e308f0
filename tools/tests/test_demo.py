"""The demo, in small, as a user starts it: with good text, with bad text, and interrupted."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

DEMO = Path(__file__).resolve().parents[1] / "demo.py"
SMALL = [
    "--steps",
    "4",
    "--batch",
    "2",
    "--length",
    "64",
    "--width",
    "64",
    "--layers",
    "1",
    "--vocab-size",
    "300",
]
SENTENCES = [
    f"The {a} of the {b} [bold]is not[/] markup, and <b>neither</b> is this. " for a in "xyz" for b in "uvw"
]


def heed_interrupts() -> None:
    """What runs in the background of a shell is started with Ctrl-C ignored, and would go on ignoring it."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def start(arguments: list[str], folder: Path, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, str(DEMO), *arguments],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=heed_interrupts,
        env={**os.environ, "HOME": str(folder), "TEXT": "", "OUT": "", **environment},
    )


def run(arguments: list[str], folder: Path, **environment: str) -> tuple[int, str]:
    process = start(arguments, folder, **environment)
    out, err = process.communicate(timeout=350)
    return process.returncode, out + err


def text_of(characters: int) -> str:
    text = "".join(SENTENCES[i % 9] + ("\n" if i % 3 else " ") for i in range(characters // 60))
    return text[:characters]


def test_a_folder_of_text_becomes_a_model_and_a_page(tmp_path: Path):
    (tmp_path / "texts").mkdir()
    for number in range(21):
        (tmp_path / "texts" / f"{number}.txt").write_text(text_of(12_000))
    (tmp_path / "texts" / "latin.txt").write_bytes("café".encode("latin-1") * 10)
    code, out = run(SMALL, tmp_path, TEXT="texts", OUT="made")
    assert code == 0, out
    assert "1 files are not UTF-8" in out
    page = (tmp_path / "made/report.html").read_text(encoding="utf-8")
    assert str(tmp_path / "made/report.html") in out.replace("\n", "")
    for expected in ("Loss on the held-out files", "Train the model", "<svg", "What it writes"):
        assert expected in page
    # The text's own angle brackets are shown, not obeyed.
    samples = page[page.index("What it writes") : page.index("Timeline")]
    assert "<b>neither" not in samples.replace("<pre><b>", "")
    assert {path.name for path in (tmp_path / "made").iterdir()} == {"model", "report.html", "training"}
    assert {path.name for path in (tmp_path / "made/training").iterdir()} == {
        "history.jsonl",
        "loss.png",
        "report.html",
        "run.json",
    }
    losses = [float(match) for match in re.findall(r"held-out loss ([\d.]+)", out)]
    assert len(losses) == 4
    assert losses[-1] < losses[0] < 6.5


@pytest.mark.parametrize(
    "texts",
    [
        {"one[red].txt": text_of(250_000)},
        {"one line.txt": text_of(250_000).replace("\n", " ")},
        {"wide.TXT": ("漢字" * 20 + "\n") * 6000},
        {f"{number}[red].md": text_of(30_000) for number in range(8)},
    ],
    ids=["single file", "single line", "wide letters", "few files in a folder"],
)
def test_texts_of_all_shapes(texts: dict[str, str], tmp_path: Path):
    folder = tmp_path / "cl[/]ean :key:"
    folder.mkdir(parents=True)
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")
    source = folder if len(texts) > 1 else folder / next(iter(texts))
    code, out = run([*SMALL, "--text", str(source), "--output", "o[bold]x"], tmp_path)
    assert code == 0, out
    assert str(tmp_path / "o[bold]x/report.html") in out
    assert str(source) in out
    assert (tmp_path / "o[bold]x/report.html").exists()


@pytest.mark.parametrize(
    "arguments", [["--width", "200"], ["--width", "0"], ["--length", "1"], ["--steps", "0"]]
)
def test_wrong_options_are_refused_before_anything_is_done(arguments: list[str], tmp_path: Path):
    code, out = run(arguments, tmp_path)
    assert code == 2
    assert arguments[0] in out
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: None, "no file and no folder"),
        (lambda path: path.write_text(""), "200,000"),
        (lambda path: path.write_bytes(os.urandom(300_000)), "200,000"),
        (lambda path: path.write_text("too little"), "200,000"),
        (lambda path: path.mkdir(), "200,000"),
    ],
    ids=["missing", "empty", "binary", "small", "empty folder"],
)
def test_text_that_is_of_no_use_is_refused_at_once(make, message: str, tmp_path: Path):
    make(tmp_path / "text")
    code, out = run([*SMALL, "--text", "text"], tmp_path)
    assert code == 1
    assert message in out.replace("\n", " ")
    assert "Traceback" not in out


def test_ctrl_c_says_so_and_leaves_no_temporary_files(tmp_path: Path):
    (tmp_path / "one.txt").write_text(text_of(250_000))
    with start([*SMALL[2:], "--steps", "100000", "--text", "one.txt"], tmp_path) as process:
        try:
            while "Train the model" not in process.stdout.readline():
                assert process.poll() is None
            time.sleep(1.5)
            process.send_signal(signal.SIGINT)
            out, err = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == 130, out + err
    assert "interrupted" in out
    assert "Traceback" not in out + err
    assert not [path for path in (tmp_path / "runs").rglob("*") if path.name.startswith(".")]
