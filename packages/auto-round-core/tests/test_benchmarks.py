"""The helpers of the benchmarks: cells, their summary, the dealing of text, perplexity."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("tokenizers")
ROOT = Path(__file__).resolve().parents[3]
MODULES = ("_small_llama", "_evaluate", "_cells", "_summary", "bench_quality", "bench_time")


@pytest.fixture(scope="module")
def bench() -> Iterator[Any]:
    """The benchmarks' modules, whose plain names are taken back afterwards, as are the variables they set."""
    folders = [str(ROOT / "packages" / "auto-round-core" / "benchmarks"), str(ROOT / "tools")]
    before, variables = set(sys.modules), dict(os.environ)
    sys.path[:0] = folders
    try:
        found = SimpleNamespace(**{name.removeprefix("_"): __import__(name) for name in MODULES})
        yield found
    finally:
        for name in ({*MODULES, "measuring"} - before) & set(sys.modules):
            del sys.modules[name]
        for folder in folders:
            sys.path.remove(folder)
        os.environ.clear()
        os.environ.update(variables)


def test_every_cell_has_a_name_of_its_own(bench: Any) -> None:
    cells = bench.cells.all_cells(("code", "prose"), (0, 1, 2))
    # 4 schemes, symmetric or not: 2 roundings each, and 4 methods by 2 kinds by 3 seeds.
    assert len({cell.name for cell in cells}) == len(cells) == 8 * (2 + 4 * 2 * 3)
    assert {cell.seed for cell in cells[: len(cells) // 3]} == {0}


def test_patterns_choose_cells_in_their_order(bench: Any) -> None:
    cells = bench.cells.all_cells(("code", "prose"), (0, 1))
    names = [c.name for c in bench.cells.chosen(cells, ["w3g128-sym.intel-200.*", "*.rtn"])]
    assert names[:4] == [
        f"w3g128-sym.intel-200.{rest}" for rest in ("code.s0", "prose.s0", "code.s1", "prose.s1")
    ]
    assert len(names) == 4 + 8
    assert all(name.endswith(".rtn") for name in names[4:])
    assert bench.cells.chosen(cells, []) == cells
    with pytest.raises(SystemExit, match=r"no cell is called 'w9\*'; one is 'w2g32-sym.rtn'"):
        bench.cells.chosen(cells, ["w9*"])


@pytest.mark.parametrize(
    ("method", "iters", "quality", "text"),
    [
        ("rtn", 0, "rtn", "user"),
        ("intel-rtn", 0, "rtn", "user"),
        ("intel-200", 200, "signround", "user"),
        ("ours-200", 200, "signround", "user"),
        ("ours-best", 200, "best", "user"),
        ("ours-best-mixed", 200, "best", "mixed"),
    ],
)
def test_a_method_becomes_settings(bench: Any, method: str, iters: int, quality: str, text: str) -> None:
    cell = bench.cells.Cell(bits=3, group_size=128, symmetric=False, method=method, kind="prose", seed=2)
    task = cell.task(Path("model"), compiled=True)
    assert (task["iters"], task["quality"], task["text"]) == (iters, quality, text)
    assert (task["bits"], task["group_size"], task["symmetric"], task["seed"]) == (3, 128, False, 2)
    assert task["calibration"] == "calibration.prose.2"
    assert task["compile"] is True


def test_shares_and_errors_worked_out_by_hand(bench: Any) -> None:
    assert bench.summary.recovered(20.0, 17.0, 16.0) == 0.75
    mean, error = bench.summary.mean_and_error([1.0, 2.0, 3.0])
    assert mean == 2.0
    assert error == pytest.approx(1 / math.sqrt(3))
    assert bench.summary.mean_and_error([5.0]) == (5.0, None)


@pytest.mark.parametrize("baseline", ["rtn", "intel-rtn"])
def test_the_tables_hold_what_the_cells_say(bench: Any, baseline: str) -> None:
    cells = bench.cells.all_cells(("code",), (0, 1))
    results = {
        f"w2g32-sym.{baseline}": {"perplexity": {"code": 20.0}, "cpu_s": 1.0, "peak_mb": 10.0},
        "w2g32-sym.intel-200.code.s0": {"perplexity": {"code": 18.0}, "cpu_s": 90.0, "peak_mb": 30.0},
        "w2g32-sym.intel-200.code.s1": {"perplexity": {"code": 17.0}, "cpu_s": 110.0, "peak_mb": 20.0},
    }
    rows = bench.summary.summarise(cells, results, {"code": 16.0})
    tuned = next(row for row in rows if row["method"] == "intel-200")
    assert (tuned["perplexity"], tuned["perplexity_error"], tuned["seeds"]) == (17.5, 0.5, 2)
    assert (tuned["recovered"], tuned["recovered_error"]) == (0.625, 0.125)
    assert (tuned["cpu_s"], tuned["peak_mb"], tuned["baseline"]) == (100.0, 30.0, baseline)
    shown = bench.summary.show(rows, {"code": 16.0})
    rounded = "20.000 |  | " if baseline == "rtn" else " | 20.000 | "
    assert f"| w2g32-sym | code | {rounded}17.500 ± 0.500 |  |  |  |" in shown
    assert "| w2g32-sym | code | 62.5 ± 12.5 |  |  |  |" in shown


def test_cells_that_were_made_otherwise_are_told_of(bench: Any) -> None:
    cells = bench.cells.all_cells(("code",), (0, 1))
    cell = {"perplexity": {"code": 17.0}, "cpu_s": 1.0, "peak_mb": 1.0}
    names = ["w2g32-sym.intel-200.code.s0", "w2g32-sym.intel-200.code.s1", "w3g128-sym.intel-200.code.s0"]
    new, newer = {"torch": "2.9.1"}, {"torch": "2.15.0"}

    def shown(*made_with: dict[str, str]) -> str:
        pairs = zip(names, made_with, strict=True)
        results = {name: {**cell, "made_with": one} for name, one in pairs}
        return bench.summary.show(bench.summary.summarise(cells, results, {"code": 16.0}), {"code": 16.0})

    assert "made alike" not in shown(new, new, new)
    for mixed in (shown(new, newer, new), shown(new, new, newer)):
        assert f"Cells of intel-200 were not all made alike: {new}; {newer}" in mixed


def test_what_was_only_rounded_is_shown_too(bench: Any) -> None:
    cells = bench.cells.all_cells(("code",), (0,))
    results = {"w4g128-sym.rtn": {"perplexity": {"code": 17.0}, "cpu_s": 1.0, "peak_mb": 1.0}}
    rows = bench.summary.summarise(cells, results, {"code": 16.0})
    assert "| w4g128-sym |  | 17.000 |" in bench.summary.show(rows, {"code": 16.0})


@settings(max_examples=30, deadline=None)
@given(
    texts=st.lists(st.text("abc", min_size=1, max_size=6), max_size=40),
    share=st.sampled_from([0.05, 0.2, 0.4]),
)
def test_no_text_is_in_two_parts(bench: Any, texts: list[str], share: float) -> None:
    parts = bench.small_llama.deal(texts, share)
    assert sorted(text for part in parts.values() for text in part) == sorted(texts)
    sets = [set(part) for part in parts.values()]
    assert sum(map(len, sets)) == len(set(texts))
    assert bench.small_llama.deal(texts[::-1], share) == parts


def test_a_share_is_one_of_the_characters(bench: Any) -> None:
    parts = bench.small_llama.deal([f"text {number:04}" for number in range(1000)], 0.1)
    assert [len(part) for part in parts.values()] == [100, 100, 800]


def test_articles_end_where_the_next_begins(bench: Any) -> None:
    text = "\n = First = \n \n Words . \n \n = = Part = = \n \n More . \n \n = Second = \n \n End . \n"
    first, second = bench.small_llama.articles(text)
    assert first.startswith(" = First = \n")
    assert "= = Part = =" in first
    assert second == " = Second = \n \n End . \n"


def test_windows_are_pieces_of_the_joined_texts(bench: Any) -> None:
    texts = [f"line {number}\n" * 50 for number in range(8)]
    tokenizer = bench.small_llama.train_tokenizer(texts, 300)
    end = tokenizer.token_to_id(bench.small_llama.END)
    joined = [t for text in texts for t in [*tokenizer.encode(text).ids, end]]
    rows = bench.small_llama.windows(tokenizer, texts, torch.Generator().manual_seed(0))
    size = bench.small_llama.WINDOW
    pieces = [joined[start : start + size] for start in range(0, len(joined) - size + 1, size)]
    assert len(pieces) > 2
    assert sorted(rows.tolist()) == sorted(pieces)


def test_the_learning_rate_rises_and_falls(bench: Any) -> None:
    recipe = {"warmup": 10, "steps": 110}
    factors = [bench.small_llama.learning_rate_factor(step, recipe) for step in range(110)]
    assert factors[0] == 0.1
    assert factors[9] == factors[10] == 1.0
    assert factors[60] == pytest.approx(0.01 + 0.99 / 2)
    assert factors[-1] < 0.011


class Biased(torch.nn.Module):
    """Says of every token that it is number 7 with probability 1/2, else any of the 49 others."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(2, 2))

    def forward(self, input_ids: torch.Tensor, use_cache: bool) -> SimpleNamespace:
        assert not use_cache
        logits = torch.zeros(*input_ids.shape, 50)
        logits[..., 7] = math.log(49)
        return SimpleNamespace(logits=logits)


def test_perplexity_of_known_probabilities(bench: Any) -> None:
    # The first token of a window is not predicted: probabilities 1/2, 1/2, 1/98 and 1/2, 1/98, 1/98.
    rows = torch.tensor([[3, 7, 7, 8], [7, 7, 9, 9]])
    expected = (2 * 2 * 98 * 2 * 98 * 98) ** (1 / 6)
    assert bench.evaluate.perplexity(Biased(), rows) == pytest.approx(expected, rel=1e-5)
    assert bench.evaluate.perplexity(Biased(), rows.repeat(3, 1), batch=4) == pytest.approx(
        expected, rel=1e-5
    )


def test_weights_are_replaced_in_their_shapes(bench: Any) -> None:
    model = Biased()
    bench.evaluate.replace_weights(model, {"weight": torch.ones(2, 2)})
    assert torch.equal(model.weight, torch.ones(2, 2))
    with pytest.raises(AttributeError):
        bench.evaluate.replace_weights(model, {"other": torch.ones(2, 2)})
    with pytest.raises(SystemExit, match=r"weight is \(1, 2\), and \(2, 2\) in the float model"):
        bench.evaluate.replace_weights(model, {"weight": torch.ones(1, 2)})


def test_a_script_that_fails_shows_what_it_said(bench: Any, tmp_path: Path) -> None:
    log = tmp_path / "run.log"
    bench.cells.run_script(sys.executable, ["-c", "print('fine')"], log, tmp_path)
    assert not log.exists()
    with pytest.raises(SystemExit, match="the reason"):
        bench.cells.run_script(sys.executable, ["-c", "raise SystemExit('the reason')"], log, tmp_path)
    code = "import os; assert os.environ['OMP_NUM_THREADS'] == '1' and os.environ['SOME'] == 'x'"
    bench.cells.run_script(sys.executable, ["-c", code], log, tmp_path, SOME="x")


def test_json_is_written_under_its_name_at_last(bench: Any, tmp_path: Path) -> None:
    bench.cells.write_json(tmp_path / "cell.json", {"a": 1})
    assert json.loads((tmp_path / "cell.json").read_text()) == {"a": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["cell.json"]


def test_the_data_folder_is_asked_for(bench: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AV_DATA", raising=False)
    with pytest.raises(SystemExit, match="AV_DATA"):
        bench.small_llama.data_folder(None)
    (tmp_path / "wikitext-2").mkdir()
    (tmp_path / "wikitext-2" / "valid.txt").touch()
    monkeypatch.setenv("AV_DATA", str(tmp_path))
    assert bench.small_llama.data_folder(None) == tmp_path


def test_the_options(bench: Any, tmp_path: Path) -> None:
    quality = bench.bench_quality.parse(["--only", "w2*", "*.rtn", "--jobs", "2"])
    assert (quality.only, quality.jobs, quality.peer_compile) == (["w2*", "*.rtn"], 2, False)
    timing = bench.bench_time.parse(["--only", "ours", "--rounds", "3"])
    assert (timing.only, timing.rounds, timing.bits, timing.group_size) == (["ours"], 3, 4, 128)
    assert bench.bench_time.parse([]).only == list(bench.bench_time.VARIANTS)
    with pytest.raises(SystemExit):
        bench.bench_time.parse(["--only", "theirs"])
    assert bench.cells.intel_python(tmp_path / "python", tmp_path) == tmp_path / "python"


def test_medians_of_the_rounds(bench: Any) -> None:
    runs = [{"cpu_s": cpu, "wall_s": cpu + 1, "peak_mb": 100 - cpu} for cpu in (10.0, 40.0, 20.0)]
    found = bench.bench_time.summarise({"ours": runs})["ours"]
    assert found == {"cpu_s": 20.0, "wall_s": 21.0, "peak_mb": 90.0, "cpu_spread": 1.5, "rounds": 3}
