import subprocess
import sys

import numpy as np
import pyarrow
import pytest
import torch
from llm_trainer.data import LanguageModelingDataset, create_dataloader, read_texts
from llm_trainer.data import _formats as formats
from llm_trainer.exceptions import ConfigurationError, DataError
from pyarrow import parquet
from torch.utils.data import DataLoader

TEXTS = ["the first function", "return value", "", "def function_3(value):\n    return value * 3"]


def documents(tokenizer, texts=TEXTS):
    return [[*tokenizer.encode(text), tokenizer.eos_token_id] for text in texts if text]


def test_packed_rows_are_the_documents_in_order(tokenizer):
    dataset = LanguageModelingDataset(TEXTS, tokenizer, max_length=7, packing="concatenate")
    ids, mask = (torch.cat([row[name] for row in dataset]) for name in ("input_ids", "attention_mask"))
    expected = documents(tokenizer)
    stream = [token for document in expected for token in document]
    assert ids[mask != 0].tolist() == stream
    assert len(dataset) == -(-len(stream) // 7)
    assert (ids[mask == 0] == tokenizer.pad_token_id).all()


def test_each_row_numbers_its_documents_and_predicts_no_first_token(tokenizer):
    dataset = LanguageModelingDataset(TEXTS, tokenizer, max_length=7, packing="concatenate")
    stream = [
        (number, place)
        for number, document in enumerate(documents(tokenizer))
        for place in range(len(document))
    ]
    for index, row in enumerate(dataset):
        part = stream[index * 7 : index * 7 + 7]
        first = part[0][0]
        assert row["attention_mask"].tolist() == [number - first + 1 for number, _ in part] + [0] * (
            7 - len(part)
        )
        labels = [
            -100 if place == 0 else token
            for (_, place), token in zip(part, row["input_ids"].tolist(), strict=False)
        ]
        assert row["labels"].tolist() == labels + [-100] * (7 - len(part))


def test_unpacked_rows_belong_to_one_document(tokenizer):
    dataset = LanguageModelingDataset(TEXTS, tokenizer, max_length=7, pack_sequences=False)
    found = [row["input_ids"][row["attention_mask"] != 0].tolist() for row in dataset]
    expected = [
        document[start : start + 7]
        for document in documents(tokenizer)
        for start in range(0, len(document), 7)
    ]
    assert found == expected
    assert all(set(row["attention_mask"].tolist()) <= {0, 1} for row in dataset)


def test_statistics_are_counts(tokenizer):
    dataset = LanguageModelingDataset(TEXTS, tokenizer, max_length=7, min_length=1)
    stats = dataset.get_stats()
    expected = documents(tokenizer)
    total = sum(len(document) for document in expected)
    assert stats["num_documents"] == 3
    assert stats["num_dropped_documents"] == 1
    assert stats["num_tokens"] == total
    assert stats["num_text_bytes"] == sum(len(text) for text in TEXTS)
    assert stats["fill"] == total / (7 * len(dataset))


def test_short_documents_are_dropped(tokenizer):
    lengths = [len(document) - 2 for document in documents(tokenizer)]
    dataset = LanguageModelingDataset(TEXTS, tokenizer, max_length=7, min_length=max(lengths))
    assert dataset.get_stats()["num_documents"] == lengths.count(max(lengths)) < 3
    with pytest.raises(DataError, match=r"no text of at least 1000 tokens \(min_length\) among 4"):
        LanguageModelingDataset(TEXTS, tokenizer, min_length=1000)
    with pytest.raises(DataError, match="nothing to train"):
        LanguageModelingDataset([], tokenizer)
    with pytest.raises(DataError, match="one string"):
        LanguageModelingDataset("abc", tokenizer)
    with pytest.raises(ConfigurationError, match="max_length is 1"):
        LanguageModelingDataset(TEXTS, tokenizer, max_length=1)


def test_tokens_take_two_bytes(tokenizer):
    assert LanguageModelingDataset(TEXTS, tokenizer)._data.tokens.dtype == np.uint16


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"min_length": "x"}, r"min_length is 'x'; it must be an integer of at least 0"),
        ({"min_length": -1}, "min_length is -1"),
        ({"pack_sequences": "best_fit"}, "pack_sequences is 'best_fit'"),
    ],
)
def test_impossible_settings_are_refused(tokenizer, settings, message):
    with pytest.raises(ConfigurationError, match=message):
        LanguageModelingDataset(TEXTS, tokenizer, **settings)


def test_rows_past_the_end_end_a_loop(tokenizer):
    dataset = LanguageModelingDataset(TEXTS, tokenizer, max_length=7)
    with pytest.raises(IndexError):
        dataset[len(dataset)]
    assert torch.equal(dataset[-1]["input_ids"], dataset[len(dataset) - 1]["input_ids"])


@pytest.mark.parametrize("workers", [0, 1])
def test_loader_visits_every_row_once_a_pass_in_a_seeded_order(tokenizer, corpus, workers):
    dataset = LanguageModelingDataset(corpus, tokenizer, max_length=16, packing="concatenate")

    def passes(seed):
        loader = create_dataloader(dataset, batch_size=5, num_workers=workers, seed=seed)
        return [[row.tolist() for batch in loader for row in batch["input_ids"]] for _ in range(2)]

    first, second = passes(1)
    rows = [row["input_ids"].tolist() for row in dataset]
    assert sorted(first) == sorted(second) == sorted(rows)
    assert first != second
    assert passes(1) == [first, second]
    assert passes(2)[0] != first


def test_loader_cuts_common_padding(tokenizer):
    dataset = LanguageModelingDataset(["one", "two words"], tokenizer, max_length=100, pack_sequences=False)
    (batch,) = create_dataloader(dataset, batch_size=2, shuffle=False)
    longest = max(len(document) for document in documents(tokenizer, ["one", "two words"]))
    assert longest < 32
    assert {name: value.shape for name, value in batch.items()} == dict.fromkeys(batch, (2, 32))
    # The plain loader works on the same rows.
    (plain,) = DataLoader(dataset, batch_size=2)
    assert torch.equal(plain["labels"][:, :32], batch["labels"])


def test_reading_folders(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / "a.txt").write_text("first", encoding="utf-8")
    (tmp_path / "b" / "c.txt").write_text("zweite ü", encoding="utf-8-sig")
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "other.md").write_text("third")
    assert list(read_texts(tmp_path)) == ["first", "zweite ü"]
    assert list(read_texts(str(tmp_path), patterns=["*.md", "a.*", "*.txt"])) == [
        "first",
        "zweite ü",
        "third",
    ]
    assert list(read_texts(tmp_path / "other.md")) == ["third"]


@pytest.mark.parametrize("pattern", ["../*.txt", "b/../../*.txt", "/etc/*", "", "."])
def test_patterns_do_not_leave_the_folder(tmp_path, pattern):
    (tmp_path / "in").mkdir()
    (tmp_path / "secret.txt").write_text("secret")
    with pytest.raises(DataError, match="not a file name inside"):
        read_texts(tmp_path / "in", ["*.txt", pattern])
    with pytest.raises(DataError, match="one string"):
        read_texts(tmp_path / "in", "*.txt")


def test_rows_of_padding_are_a_batch(tokenizer):
    row = {name: torch.zeros(70, dtype=torch.long) for name in ("input_ids", "attention_mask", "labels")}
    (batch,) = create_dataloader([row | {"weight": torch.tensor(1.0)}] * 3, batch_size=3)
    assert batch["input_ids"].shape == (3, 32)
    assert batch["weight"].shape == (3,)


def test_what_cannot_be_read_is_named(tmp_path):
    with pytest.raises(DataError, match=r"missing\.txt does not exist"):
        read_texts(tmp_path / "missing.txt")
    with pytest.raises(DataError, match=r"no text in files named \*\.txt or \*\.md"):
        list(read_texts(tmp_path, ["*.txt", "*.md"]))
    path = tmp_path / "a.txt"
    for content, message in (
        (b"ab\xff", r"a\.txt is not UTF-8 text \(byte 2\)"),
        (b"a\0b", "zero byte at 1"),
        (b"  ", "is empty"),
    ):
        path.write_bytes(content)
        with pytest.raises(DataError, match=message):
            list(read_texts(path))


LINES = "def größe(n):\n    return n\n\n\n" * 40


@pytest.mark.parametrize(
    ("text", "starts"),
    [
        (LINES, "def"),
        # No line that begins without a blank, or no line at all: cut between characters.
        (" ü\n" * 300, " ü\n"),
        ("\U0001f600" * 300, "\U0001f600"),
        ("x" * 1000, "x"),
    ],
)
def test_a_large_file_is_several_documents(tmp_path, monkeypatch, text, starts):
    path = tmp_path / "a.txt"
    path.write_text(text, encoding="utf-8-sig")
    size = path.stat().st_size
    monkeypatch.setattr(formats, "TEXT_BYTES", size)
    assert list(read_texts(path)) == [text]
    for most in (size - 1, 101, 102, 103):
        monkeypatch.setattr(formats, "TEXT_BYTES", most)
        found = list(formats.read_text(path))
        assert "".join(found) == text
        assert len(found) > 1
        assert all(len(piece.encode()) <= most for piece in found)
        assert all(piece[0] in starts for piece in found)
        if text is LINES:
            assert all(piece.startswith("def") for piece in found)


def test_what_is_not_text_in_a_large_file_has_its_place(tmp_path, monkeypatch):
    monkeypatch.setattr(formats, "TEXT_BYTES", 50)
    path = tmp_path / "a.txt"
    good = ("ü" * 9 + "\n").encode() * 20
    for place in (0, 50, 99, 205, 380):
        for bad, message in (
            (b"\xff", rf"not UTF-8 text \(byte {place}\)"),
            (b"\0", f"zero byte at {place}"),
        ):
            at = place - (place % 19) % 2
            path.write_bytes(good[:at] + b"x" * (place - at) + bad + good[at:])
            with pytest.raises(DataError, match=rf"a\.txt is .*{message}"):
                list(read_texts(path))
    path.write_bytes(good + b"\xc3")
    with pytest.raises(DataError, match=r"not UTF-8 text \(byte 380\)"):
        list(read_texts(path))


PEAK = r"""
import re, sys
from pathlib import Path
from pyarrow import parquet
from llm_trainer.data import describe_source, read_dataset
def peak_mib():
    # Not ru_maxrss, which begins with that of the process that started this one.
    return int(re.search(r"VmHWM:\s*(\d+)", Path("/proc/self/status").read_text())[1]) / 1024
before = peak_mib()
size = sum(len(text) for text in read_dataset(sys.argv[1]))
describe_source(sys.argv[1])
print(size >> 20, peak_mib() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak in /proc")
@pytest.mark.parametrize("name", ["large.txt", "large.parquet"])
def test_a_file_is_never_in_memory_as_a_whole(tmp_path, name):
    path = tmp_path / name
    page = "some words of text\n" * 3449 + "\n" * 5
    if name == "large.txt":
        with path.open("w") as file:
            file.writelines(page for _ in range(2560))
    else:
        table = pyarrow.table({"text": [page] * 2560})
        parquet.write_table(table, path, row_group_size=500, compression="none", use_dictionary=False)
    done = subprocess.run([sys.executable, "-c", PEAK, path], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    size_mib, grown_mib = map(float, done.stdout.split())
    assert size_mib == 160
    assert grown_mib < size_mib
