"""calibration_tokens: what it draws from, that windows are pieces of it, and what it refuses."""

import collections
import itertools
import json
import logging.handlers
import os
import random
import subprocess
import sys
import tracemalloc
import warnings
from pathlib import Path

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import tokenizers
import torch
import transformers
from auto_round.exceptions import AutoRoundError, CalibrationError, ConfigurationError, MissingPackageError
from auto_round.quantization import _calibration_files
from auto_round.quantization._calibration import calibration_tokens
from auto_round.quantization._calibration_files import PART, shuffled
from hypothesis import given, settings
from hypothesis import strategies as st

EOS = 0


class Letters:
    """A character is a token; the letter x is 120, and nothing else is ever added."""

    eos_token_id = EOS

    def __call__(self, text):
        return {"input_ids": [ord(character) for character in text]}

    def __len__(self):
        return 0x110000


class NoEnd(Letters):
    eos_token_id = None


def draw(data, *, nsamples=4, seqlen=8, seed=0, tokenizer=None, vocab_size=None):
    found = calibration_tokens(
        data, tokenizer, nsamples=nsamples, seqlen=seqlen, seed=seed, vocab_size=vocab_size
    )
    assert found.dtype == torch.int64
    assert found.device.type == "cpu"
    assert found.dim() == 2
    assert found.shape[1] == seqlen
    return found


def draw_text(data, **options):
    return draw(data, **{"tokenizer": Letters(), **options})


def as_text(windows):
    return ["".join(map(chr, row)) for row in windows.tolist()]


@pytest.fixture(scope="module")
def bpe():
    """A byte-level BPE tokenizer as transformers wraps it, which would add a begin token if it were let."""
    raw = tokenizers.Tokenizer(tokenizers.models.BPE())
    raw.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    raw.train_from_iterator([Path(__file__).read_text()], trainer)
    raw.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    wrapped = transformers.PreTrainedTokenizerFast(tokenizer_object=raw, model_max_length=16)
    wrapped.add_special_tokens({"bos_token": "<s>", "eos_token": "</s>"})
    return wrapped


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(0, 30), min_size=1, max_size=12),
    st.integers(1, 9),
    st.integers(1, 6),
    st.integers(0, 2**32 - 1),
)
def test_windows_are_pieces_of_the_joined_stream_and_do_not_overlap(lengths, seqlen, nsamples, seed):
    """Every character of all documents is another one, so that a window says where it comes from."""
    names = iter(range(1000, 2000))
    documents = ["".join(chr(next(names)) for _ in range(length)) for length in lengths]
    filled = [document for document in documents if document]
    whole = max(sum(lengths) + len(filled) - 1, 0) // seqlen
    if whole == 0:
        with pytest.raises(CalibrationError):
            draw_text(documents, nsamples=nsamples, seqlen=seqlen, seed=seed)
        return
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        windows = as_text(draw_text(documents, nsamples=nsamples, seqlen=seqlen, seed=seed))
    assert len(windows) == min(whole, nsamples)
    assert bool(caught) is (whole < nsamples)
    used = collections.Counter(character for window in windows for character in window)
    assert all(count == 1 for character, count in used.items() if ord(character) != EOS)
    for window in windows:
        pieces = window.split(chr(EOS))
        assert all(any(piece in document for document in filled) for piece in pieces)
        assert all(piece in filled for piece in pieces[1:-1])
        for left, right in itertools.pairwise(pieces):
            assert not left or any(document.endswith(left) for document in filled)
            assert not right or any(document.startswith(right) for document in filled)


def test_without_an_end_token_documents_follow_each_other():
    windows = as_text(draw_text(["abc", "def"], nsamples=2, seqlen=3, tokenizer=NoEnd()))
    assert sorted(windows) == ["abc", "def"]


@pytest.mark.parametrize("opened", [list, iter])
def test_every_window_of_the_pool_is_drawn_equally_often(opened):
    rows = torch.arange(12).reshape(12, 1)
    counts = torch.zeros(12)
    for seed in range(600):
        counts[draw(opened(rows), nsamples=3, seqlen=1, seed=seed).flatten()] += 1
    expected = 600 * 3 / 12
    # 11 degrees of freedom: 31.3 is passed once in a thousand times.
    assert float(((counts - expected) ** 2 / expected).sum()) < 31.3


def test_the_seed_alone_decides_and_the_global_generators_are_left_alone():
    rows = torch.arange(800).reshape(100, 8)
    first = draw(rows, seed=5)
    random.seed(1)
    torch.manual_seed(1)
    states = random.getstate(), torch.random.get_rng_state()
    assert torch.equal(draw(rows, seed=5), first)
    assert random.getstate() == states[0]
    assert torch.equal(torch.random.get_rng_state(), states[1])
    assert not torch.equal(draw(rows, seed=6), first)


def test_another_process_draws_the_same_and_loads_no_optional_library(tmp_path):
    for name in "abcdef":
        (tmp_path / f"{name}.txt").write_text(name * 50)
    code = (
        "import sys\n"
        "from auto_round.quantization._calibration import calibration_tokens\n"
        "class T:\n"
        "    eos_token_id = 0\n"
        "    def encode(self, text): return list(map(ord, text))\n"
        f"print(calibration_tokens({str(tmp_path)!r}, T(), nsamples=5, seqlen=9, seed=3).tolist())\n"
        "assert not {'transformers', 'datasets', 'pyarrow', 'tokenizers'} & set(sys.modules)"
    )
    # This process hashes with another seed.
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONHASHSEED": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert json.loads(done.stdout) == draw_text(tmp_path, nsamples=5, seqlen=9, seed=3).tolist()


def test_the_order_in_which_a_folder_is_listed_does_not_matter(tmp_path, monkeypatch):
    for number in range(8):
        (tmp_path / "inner" / str(number % 3)).mkdir(parents=True, exist_ok=True)
        (tmp_path / "inner" / str(number % 3) / f"{number}.md").write_text(str(number) * 40)
    first = draw_text(tmp_path, seqlen=10)
    walk = os.walk

    def backwards(*arguments, **options):
        found = [(folder, inner, names[::-1]) for folder, inner, names in walk(*arguments, **options)]
        return iter(found[::-1])

    monkeypatch.setattr(os, "walk", backwards)
    assert torch.equal(draw_text(tmp_path, seqlen=10), first)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 500), st.integers(0, 2**20))
def test_shuffled_reaches_everything_once(total, seed):
    assert sorted(shuffled(total, random.Random(seed))) == list(range(total))


def test_shuffled_of_very_many_is_no_list_and_repeats_nothing():
    total = 10**12
    order = shuffled(total, random.Random(0))
    found = [next(order) for _ in range(1000)]
    assert len(set(found)) == 1000
    assert total // 3 < sum(found) / 1000 < total * 2 // 3


def test_a_text_that_is_the_name_of_a_folder_by_chance(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = as_text(draw_text([".", "a text of two words"], nsamples=1, seqlen=21))[0]
    assert found in (".\0a text of two words", "a text of two words\0.")
    with pytest.raises(CalibrationError, match=r"such as \., and 'a text' names no file"):
        draw_text([Path(), "a text"])


def test_a_fast_tokenizer_of_transformers_adds_nothing_but_the_joining_end(bpe):
    texts = ["def first(value):\n    return value\n", "class Second:\n    pass\n" * 3]
    pieces = [bpe.backend_tokenizer.encode(text, add_special_tokens=False).ids for text in texts]
    streams = [pieces[0] + [1] + pieces[1], pieces[1] + [1] + pieces[0]]
    said = logging.handlers.BufferingHandler(99)
    logger = transformers.utils.logging.get_logger("transformers")
    logger.addHandler(said)
    try:
        found = draw(texts, nsamples=1, seqlen=len(streams[0]), tokenizer=bpe)
        assert found[0].tolist() in streams
        # The documents are longer than the 16 tokens of the tokenizer, of which nobody needs to be told.
        assert not said.buffer
        bpe(texts[1])
        assert said.buffer
    finally:
        logger.removeHandler(said)


def test_tokenizers_of_other_makes(bpe):
    text = ["a text of some length " * 4]
    ids = bpe.backend_tokenizer.encode(text[0], add_special_tokens=False).ids

    class Encoding:
        def encode(self, text):
            return torch.tensor(ids)

    for tokenizer in (bpe.backend_tokenizer, Encoding(), lambda text: {"input_ids": ids}, lambda text: ids):
        assert draw(text, nsamples=1, tokenizer=tokenizer, seqlen=len(ids))[0].tolist() == ids
    with pytest.raises(CalibrationError, match="encode"):
        draw(text, tokenizer=object())


def test_a_stream_is_read_no_further_than_needed():
    taken = 0

    def endless():
        nonlocal taken
        while True:
            taken += 1
            yield "abcdefgh"

    draw_text(endless(), nsamples=4, seqlen=8)
    assert taken <= 8 * 4
    assert as_text(draw_text((text for text in ["abcdefgh"] * 4), tokenizer=NoEnd())) == ["abcdefgh"] * 4


def test_a_long_string_is_several_documents():
    found = draw_text(["x" * (2 * PART + 10)], nsamples=1, seqlen=2 * PART + 12)
    assert (found == EOS).nonzero()[:, 1].tolist() == [PART, 2 * PART + 1]


def test_a_file_list_of_files_and_folder_give_the_same_characters(tmp_path):
    (tmp_path / "one.txt").write_text("abcd", newline="")
    (tmp_path / "two.py").write_bytes(b"\xef\xbb\xbfef\r\ngh")
    (tmp_path / ".hidden").write_bytes(b"\xff")
    (tmp_path / "__pycache__").mkdir()
    (tmp_path / "__pycache__" / "two.pyc").write_bytes(b"\xff")
    expected = sorted("abcdef\ngh" + chr(EOS))
    paths = [tmp_path / "one.txt", tmp_path / "two.py"]
    for data in (tmp_path, str(tmp_path), paths, [str(path) for path in paths], [paths[0], str(paths[1])]):
        assert sorted(as_text(draw_text(data, nsamples=1, seqlen=10))[0]) == expected
    assert as_text(draw_text(paths[0], nsamples=1, seqlen=4)) == ["abcd"]


def test_a_large_file_is_read_in_parts_which_cut_no_character(tmp_path, monkeypatch):
    monkeypatch.setattr(_calibration_files, "PART", 5)
    text = "aä€𝄞bcßdé" * 20
    (tmp_path / "text.txt").write_text(text, encoding="utf-8")
    found = as_text(draw_text(tmp_path / "text.txt", nsamples=1, seqlen=len(text), tokenizer=NoEnd()))[0]
    assert sorted(found) == sorted(text)
    assert found != text


def test_memory_does_not_grow_with_a_file(tmp_path):
    path = tmp_path / "large.txt"
    path.write_bytes(b"abcdefg\n" * 2**23)
    tracemalloc.start()
    found = draw_text(path, nsamples=2, seqlen=PART, tokenizer=NoEnd())
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert as_text(found)[0][:8] == "abcdefg\n"
    assert peak < 2**24 < path.stat().st_size / 3


def records(texts):
    return [{"text": text, "meta": {"n": number}} for number, text in enumerate(texts)]


TEXTS = [character * 9 for character in "abcdefghij"]


def windows_of_texts(data, **options):
    return sorted(as_text(draw_text(data, nsamples=len(TEXTS), seqlen=9, tokenizer=NoEnd(), **options)))


def test_lines_of_json(tmp_path, monkeypatch):
    lines = "\n".join(json.dumps(record) for record in records(TEXTS)) + "\n\n"
    (tmp_path / "a.jsonl").write_text(lines)
    assert windows_of_texts(tmp_path / "a.jsonl") == TEXTS
    for part in (1, 7, 50, 64):
        monkeypatch.setattr(_calibration_files, "PART", part)
        assert windows_of_texts(tmp_path / "a.jsonl") == TEXTS


@pytest.mark.parametrize("value", [records(TEXTS), TEXTS, [{"content": text} for text in TEXTS]])
def test_json(tmp_path, value):
    (tmp_path / "a.json").write_text(json.dumps(value))
    assert windows_of_texts(tmp_path / "a.json") == TEXTS
    (tmp_path / "b.json").write_text(json.dumps({"body": "abcdefghi", "n": 1}))
    assert as_text(draw_text(tmp_path / "b.json", nsamples=1, seqlen=9)) == ["abcdefghi"]


def test_parquet(tmp_path):
    table = pyarrow.table({"text": TEXTS, "picture": [b"\xff"] * len(TEXTS)})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet", row_group_size=3)
    assert windows_of_texts(tmp_path / "a.parquet") == TEXTS
    pyarrow.parquet.write_table(pyarrow.table({"body": TEXTS}), tmp_path / "b.parquet")
    assert windows_of_texts(tmp_path / "b.parquet") == TEXTS
    pyarrow.parquet.write_table(pyarrow.table({"a": TEXTS, "b": TEXTS}), tmp_path / "c.parquet")
    with pytest.raises(CalibrationError, match=r"c\.parquet has no column 'text'.*\['a', 'b'\]"):
        windows_of_texts(tmp_path / "c.parquet")
    (tmp_path / "d.parquet").write_bytes(b"no parquet")
    with pytest.raises(CalibrationError, match=r"d\.parquet cannot be read"):
        windows_of_texts(tmp_path / "d.parquet")


@pytest.mark.parametrize("package", ["pyarrow", "datasets"])
def test_a_missing_package_is_named_with_its_remedy(tmp_path, monkeypatch, package):
    datasets.Dataset.from_dict({"text": TEXTS}).save_to_disk(tmp_path / "set")
    pyarrow.parquet.write_table(pyarrow.table({"text": TEXTS}), tmp_path / "a.parquet")
    for name in (package, f"{package}.parquet"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(MissingPackageError, match=f"pip install {package}") as caught:
        windows_of_texts(tmp_path / ("a.parquet" if package == "pyarrow" else "set"))
    assert isinstance(caught.value, ImportError)


def test_data_sets_of_text(tmp_path):
    whole = datasets.Dataset.from_dict({"text": TEXTS, "number": list(range(len(TEXTS)))})
    parts = datasets.DatasetDict({"test": whole.select([0]), "train": whole})
    whole.save_to_disk(tmp_path / "whole")
    parts.save_to_disk(tmp_path / "parts")
    stream = whole.to_iterable_dataset()
    untyped = datasets.IterableDataset.from_generator(lambda: iter([{"text": text} for text in TEXTS]))
    for data in (
        whole, parts, stream, untyped, datasets.IterableDatasetDict({"train": stream}),
        datasets.DatasetDict({"only": whole}), whole["text"], whole.rename_column("text", "body"),
        tmp_path / "whole", str(tmp_path / "parts"),
    ):  # fmt: skip
        assert windows_of_texts(data) == TEXTS
    with pytest.raises(CalibrationError, match=r"no split 'train' but \['a', 'b'\]"):
        windows_of_texts(datasets.DatasetDict({"a": whole, "b": whole}))
    with pytest.raises(CalibrationError, match=r"no column 'text'.*\['number'\]"):
        windows_of_texts(whole.select_columns(["number"]))
    with pytest.raises(CalibrationError, match=r"whole is a data set .* give it alone"):
        windows_of_texts([tmp_path / "whole", tmp_path / "parts"])
    (tmp_path / "whole" / "dataset_info.json").write_text("{")
    with pytest.raises(CalibrationError, match="whole cannot be read"):
        windows_of_texts(tmp_path / "whole")


def test_a_data_set_of_token_ids():
    rows = [list(range(start, start + 8)) for start in range(5)]
    data = datasets.Dataset.from_dict({"input_ids": rows, "text": ["x"] * 5})
    for source in (data, data.with_format("torch"), data.with_format("numpy"), data.to_iterable_dataset()):
        assert draw(source, nsamples=5).tolist() == rows


ROWS = torch.arange(32).reshape(4, 8)


@pytest.mark.parametrize(
    "data",
    [
        ROWS,
        ROWS.to(torch.int32),
        ROWS.numpy(),
        ROWS.numpy().astype(np.uint64),
        ROWS.tolist(),
        list(ROWS),
        tuple(ROWS.numpy()),
        [{"input_ids": row} for row in ROWS.tolist()],
        [{"input_ids": ROWS[:2]}, {"input_ids": ROWS[2:]}],
        {"input_ids": ROWS, "attention_mask": torch.ones(4, 8)[:, :8].int()},
        transformers.BatchEncoding({"input_ids": ROWS.tolist()}),
        iter(ROWS),
        ROWS.flatten(),
        ROWS.flatten().tolist(),
        ROWS.reshape(2, 16),
        torch.utils.data.DataLoader([{"input_ids": row} for row in ROWS], batch_size=3),
    ],
    ids=range(16),
)
def test_exactly_as_many_ids_as_asked_for_come_out_as_they_are(data):
    assert torch.equal(draw(data), ROWS)


def test_long_rows_are_cut_into_windows_of_their_own():
    found = draw([list(range(19)), list(range(100, 125))], nsamples=5)
    starts = [0, 8, 100, 108, 116]
    assert found.tolist() == [list(range(start, start + 8)) for start in starts]


def test_padding_is_cut_away():
    ids = torch.tensor([[9, 9, 1, 2, 3, 4], [5, 6, 7, 8, 9, 9]])
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]])
    expected = [[1, 2, 3, 4], [5, 6, 7, 8]]
    assert draw({"input_ids": ids, "attention_mask": mask}, nsamples=2, seqlen=4).tolist() == expected
    rows = [
        {"input_ids": row.tolist(), "attention_mask": (kept != 0).tolist()}
        for row, kept in zip(ids, mask, strict=True)
    ]
    assert draw(rows, nsamples=2, seqlen=4).tolist() == expected


def test_short_rows_are_left_out_or_refused():
    short = [[1, 2, 3], *ROWS.tolist()]
    with pytest.warns(UserWarning, match=r"1 rows were left out .* item 0 of the calibration data holds 3"):
        assert torch.equal(draw(short, nsamples=4), ROWS)
    with pytest.raises(CalibrationError, match=r"item 0 .* holds 3 tokens, fewer .* of 8, .* 4 .* where 5"):
        draw(short, nsamples=5)
    with pytest.warns(UserWarning, match="holds 4 sequences of 8 tokens, not the 6"):
        assert torch.equal(draw(ROWS, nsamples=6), ROWS)


def test_no_data_is_refused_and_nothing_is_made_up():
    with pytest.raises(
        CalibrationError, match=r"no calibration data.*list of texts.*'self'.*'rtn'"
    ) as caught:
        draw_text(None)
    assert isinstance(caught.value, ValueError)
    assert isinstance(caught.value, AutoRoundError)


@pytest.mark.parametrize("data", [[], (), [""], ["", ""], iter([]), torch.zeros(0, dtype=torch.int64)])
def test_empty_data_is_refused(data):
    with pytest.raises(CalibrationError, match=r"empty list|holds no text|holds 0 tokens"):
        draw_text(data)


@pytest.mark.parametrize("data", [3, 2.5, b"bytes", len, object(), torch.zeros(1, 2, 3), torch.tensor(3)])
def test_what_is_no_data_is_refused(data):
    with pytest.raises(CalibrationError, match=r"cannot be|shape"):
        draw_text(data)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (torch.rand(2, 8), "float32"),
        (torch.full((2, 8), torch.nan), "float32"),
        (torch.ones(2, 8, dtype=torch.bool), "bool"),
        (np.full((2, 8), np.nan), "float64, such as nan"),
        ([[1.0] * 8], "float64, such as 1.0"),
        ([[1, float("nan")] * 4], "float64"),
        ([[1, "a"] * 4], "holds <U"),
        ([[True] * 8], "bool"),
        ([[1, [2, 3]]], "inhomogeneous"),
        ([[2**63] * 8], "uint64|object"),
        ([[None] * 8], "object"),
        ([[1, 2, -100, 4, 5, 6, 7, 8]], r"item 0 .* token id -100 at place 2, .* 0 or more"),
        ([{"input_ids": [1, 2], "attention_mask": [1]}], r"shape \[2\] and an attention mask of shape \[1\]"),
        ([torch.zeros(1, 1, 8, dtype=torch.int64)], r"shape \[1, 1, 8\]"),
        ([b"abc"], "must hold token ids"),
    ],
)
def test_ids_that_are_none_are_refused(data, message):
    with pytest.raises(CalibrationError, match=message):
        draw(data, nsamples=1)


def test_ids_outside_the_vocabulary_are_refused(bpe):
    assert draw(ROWS, vocab_size=32).max() == 31
    with pytest.raises(CalibrationError, match=r"row 3 .* token id 31 at place 7, but ids are 0 to 30"):
        draw(ROWS, vocab_size=31)
    with pytest.raises(CalibrationError, match=f"0 to {len(bpe) - 1}"):
        draw(ROWS + 1000, tokenizer=bpe)
    with pytest.raises(CalibrationError, match="another tokenizer"):
        draw(["text of some letters"], tokenizer=bpe, vocab_size=10)


def test_text_needs_a_tokenizer_and_does_not_mix_with_ids():
    with pytest.raises(CalibrationError, match=r"item \d of .* is text, and there is no tokenizer"):
        draw(["some text", "more"])
    with pytest.raises(CalibrationError, match=r"The tokenizer is a str.*AutoTokenizer"):
        draw(["some text", "more"], tokenizer="models/small")
    with pytest.raises(CalibrationError, match="give one kind alone"):
        draw_text(["a text of some length", [1, 2, 3, 4, 5, 6, 7, 8]])
    with pytest.raises(CalibrationError, match=r"has a list in the field 'text'"):
        draw_text([{"text": ["a"]}])
    with pytest.raises(CalibrationError, match=r"no field 'text' and no single string.*\['a', 'b'\]"):
        draw_text([{"a": "x", "b": "y"}])


def test_a_text_shorter_than_one_sequence_is_refused(tmp_path):
    (tmp_path / "short.txt").write_text("abc")
    with pytest.raises(CalibrationError, match=r"short\.txt holds 3 tokens, .* one sequence of 8.*at most 3"):
        draw_text(tmp_path / "short.txt")
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(CalibrationError, match=r"empty\.txt holds no text"):
        draw_text(tmp_path / "empty.txt")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"abc\xff" + b"d" * 20, r"a\.txt is not text: byte 3, 0xff, is no UTF-8"),
        ("a.txt", b"ab\0c" * 20, r"a\.txt is not text: byte 2, 0x00, is zero"),
        ("a.txt", "text".encode("utf-16") * 9, r"byte 0, 0xff"),
        ("a.jsonl", b'{"text": "abc"}\n{"text": \n', r"a\.jsonl, the line at byte 16, is not valid JSON"),
        ("a.jsonl", b'{"text": "ab\xff"}\n', r"a\.jsonl is not text: byte 12, 0xff"),
        ("a.jsonl", b"[" * 100_000, r"the line at byte 0, is not valid JSON"),
        ("a.json", b"{", r"a\.json is not valid JSON"),
        ("a.json", b"17", r"a\.json has token ids of shape \[\]"),
    ],
)
def test_a_damaged_file_is_named_with_the_byte(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CalibrationError, match=message):
        draw_text(tmp_path / name)


def test_the_byte_is_counted_from_the_beginning_of_the_file(tmp_path):
    content = bytearray(b"a" * (3 * PART))
    content[2 * PART + 77] = 0xC3
    (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(CalibrationError, match=f"byte {2 * PART + 77}, 0xc3"):
        draw_text(tmp_path / "a.txt", nsamples=10**5)


def test_paths_that_do_not_exist_are_refused(tmp_path):
    for missing in (
        tmp_path / "no.txt",
        str(tmp_path / "no.txt"),
        "some text\nthat is no path",
        "a\0b",
        "x" * 9999,
    ):
        with pytest.raises(CalibrationError, match="is no file and no folder"):
            draw_text(missing)
    (tmp_path / "yes.txt").write_text("abcdefgh" * 9)
    with pytest.raises(CalibrationError, match=r"yes\.txt, and .*no\.txt.* names no file"):
        draw_text([str(tmp_path / "yes.txt"), str(tmp_path / "no.txt")])
    with pytest.raises(CalibrationError, match=r"no\.txt is neither a file nor a folder"):
        draw_text([tmp_path / "no.txt"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(CalibrationError, match="empty holds no file"):
        draw_text(tmp_path / "empty")


def test_lines_and_files_that_would_fill_the_memory_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(_calibration_files, "_MOST_LINE", 100)
    monkeypatch.setattr(_calibration_files, "_MOST_JSON", 100)
    (tmp_path / "a.jsonl").write_text(json.dumps("x" * 200))
    (tmp_path / "a.json").write_text(json.dumps("x" * 200))
    with pytest.raises(CalibrationError, match="longer than 100 bytes; split it"):
        draw_text(tmp_path / "a.jsonl")
    with pytest.raises(CalibrationError, match=r"longer than 100 bytes .*\.jsonl"):
        draw_text(tmp_path / "a.json")


@pytest.mark.parametrize(
    "wrong",
    [{"nsamples": 0}, {"seqlen": 0}, {"seqlen": 8.0}, {"seed": -1}, {"seed": None}, {"nsamples": True}],
)
def test_numbers_that_are_none_are_refused(wrong):
    with pytest.raises(ConfigurationError, match=next(iter(wrong))):
        draw(ROWS, **wrong)
