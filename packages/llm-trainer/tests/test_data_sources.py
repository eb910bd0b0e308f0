import gzip
import json
import os
import sys
import sysconfig
from pathlib import Path

import datasets
import huggingface_hub
import pyarrow
import pytest
from llm_trainer.data import describe_source, read_dataset, read_texts
from llm_trainer.exceptions import DataError, MissingPackageError
from pyarrow import parquet

ROWS = ["first", None, "zweite ü", "\U0001f600 third\nline", ""]
TEXTS = ["first", "zweite ü", "\U0001f600 third\nline"]


def write_parquet(path, values, column="text", row_group_size=2):
    table = pyarrow.table({"id": list(range(len(values))), column: values})
    parquet.write_table(table, path, row_group_size=row_group_size)


def write_json_lines(path, rows):
    content = "\n".join(json.dumps({"id": 1, "text": row}) for row in rows).encode() + b"\n\n"
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    (write_parquet if path.suffix == ".parquet" else write_json_lines)(path, rows)
    return path


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz", "rows.parquet"])
def test_rows_of_files(tmp_path, name):
    path = write(tmp_path / name, ROWS)
    assert list(read_dataset(str(path))) == TEXTS
    assert list(read_texts(path)) == TEXTS
    # Reading again gives the same, and many rows come in order.
    many = [f"row {number}" for number in range(3000)]
    assert list(read_dataset(str(write(path, many)))) == many


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.parquet"])
def test_other_columns(tmp_path, name):
    path = tmp_path / name
    if name.endswith("parquet"):
        write_parquet(path, ["a", "b"], column="content")
    else:
        path.write_text('{"content": "a"}\n{"content": "b"}\n')
    assert list(read_dataset(str(path), text_column="content")) == ["a", "b"]
    with pytest.raises(DataError, match=r"rows\..*'text'"):
        list(read_dataset(str(path)))
    with pytest.raises(DataError, match=r"rows\..*'id' .*int: [01]"):
        list(read_dataset(str(write(path, ["a"])), text_column="id"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"text": "a"}\n{"text": "b"\n', r"line 2 is not valid JSON"),
        (b'{"text": "a"}\n["b"]\n', r"line 2 has no key 'text'"),
        (b'\n{"text": 3}\n', r"line 2: 'text' is not text but of type int: 3"),
        (b'{"text": "\xff"}\n', r"line 1 is not valid JSON"),
        (b'{"text": "a\\ud800"}\n', r"line 1 is not valid JSON.*surrogates"),
        (b"[" * 100_000 + b"\n", r"line 1 is not valid JSON"),
        (b"", "is empty"),
    ],
)
def test_bad_lines_are_named(tmp_path, content, message):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        list(read_dataset(str(path)))
    assert str(path) in str(caught.value)
    assert len(str(caught.value)) < 500 + len(str(path))


def test_pairs_of_surrogates_are_characters(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "\\ud83d\\ude00"}')
    assert list(read_dataset(str(path))) == ["\U0001f600"]


def test_damaged_files_are_named(tmp_path):
    packed = write(tmp_path / "rows.jsonl.gz", TEXTS * 50)
    packed.write_bytes(packed.read_bytes()[:-20])
    with pytest.raises(DataError, match=r"rows\.jsonl\.gz cannot be read"):
        list(read_dataset(str(packed)))
    columns = tmp_path / "rows.parquet"
    columns.write_bytes(b"PAR1 nothing PAR1")
    # At the call: the end of the file says what is in it.
    with pytest.raises(DataError, match=r"rows\.parquet cannot be read"):
        read_dataset(str(columns))
    write_parquet(columns, TEXTS, column="other")
    with pytest.raises(DataError, match=r"rows\.parquet has no column 'text'.*'id', 'other'"):
        read_dataset(str(columns))


def test_folders_are_read_at_any_depth_in_order(tmp_path):
    write(tmp_path / "b" / "two.parquet", ["two", "three"])
    write(tmp_path / "c.jsonl", ["four"])
    (tmp_path / "a.txt").write_text("one")
    (tmp_path / "left_out.md").write_text("left out")
    assert list(read_dataset(str(tmp_path))) == ["one", "two", "three", "four"]
    assert list(read_dataset(str(tmp_path), patterns=["*.md"])) == ["left out"]


def test_links_to_files_are_followed_and_to_folders_not(tmp_path):
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "linked.txt").write_text("linked")
    (outside / "other.txt").write_text("other")
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "a.txt").symlink_to(outside / "linked.txt")
    (folder / "b").symlink_to(outside, target_is_directory=True)
    (folder / "loop").symlink_to(folder, target_is_directory=True)
    assert list(read_dataset(str(folder))) == ["linked"]


def test_splits_of_a_folder(tmp_path):
    (tmp_path / "a.txt").write_text("all")
    assert list(read_dataset(str(tmp_path))) == ["all"]
    with pytest.raises(DataError, match="no split 'validation'"):
        read_dataset(str(tmp_path), split="validation")
    with pytest.raises(DataError, match="no split 'test'"):
        read_dataset(str(tmp_path / "a.txt"), split="test")
    write(tmp_path / "validation-00000-of-00001.parquet", ["held out"])
    assert list(read_dataset(str(tmp_path), split="validation")) == ["held out"]
    # What else there is may or may not be for training: that has to be said.
    with pytest.raises(DataError, match="no split 'train'"):
        read_dataset(str(tmp_path))
    write(tmp_path / "train" / "x.jsonl", ["to train on"])
    assert list(read_dataset(str(tmp_path))) == ["to train on"]


def test_saved_data_sets(tmp_path):
    train = datasets.Dataset.from_dict({"text": ROWS, "number": list(range(5))})
    train.save_to_disk(tmp_path / "one")
    # Chosen and turned round: the rows are not those of the file.
    both = datasets.DatasetDict({"train": train.select([3, 0]), "test": train.select([2])})
    both.save_to_disk(tmp_path / "both")
    assert list(read_dataset(str(tmp_path / "one"))) == [*TEXTS, ""]
    assert list(read_dataset(str(tmp_path / "both"))) == [TEXTS[2], "first"]
    assert list(read_dataset(str(tmp_path / "both"), split="test")) == ["zweite ü"]
    with pytest.raises(DataError, match=r"no split 'validation'; it has \['test', 'train'\]"):
        read_dataset(str(tmp_path / "both"), split="validation")
    with pytest.raises(DataError, match=r"no column 'body'.*'text', 'number'"):
        read_dataset(str(tmp_path / "one"), text_column="body")
    with pytest.raises(DataError, match="row 1: 'number' is not text but of type int"):
        list(read_dataset(str(tmp_path / "one"), text_column="number"))
    fingerprints = {
        describe_source(str(tmp_path / name), split=split)["fingerprint"]
        for name, split in (("one", "train"), ("both", "train"), ("both", "test"))
    }
    assert len(fingerprints) == 3


def test_the_standard_library():
    train = list(read_dataset("python-stdlib"))
    held_out = list(read_dataset("python-stdlib", split="validation"))
    assert train == list(read_dataset("python-stdlib"))
    assert 0.03 < len(held_out) / len(train + held_out) < 0.08
    library = Path(sysconfig.get_path("stdlib"))
    json_module = (library / "json" / "decoder.py").read_text()
    assert (json_module in train) != (json_module in held_out)
    assert not set(train) & set(held_out)
    tests = library / "test" / "test_grammar.py"
    assert not tests.exists() or tests.read_text() not in train + held_out
    assert sum(map(len, train)) > 5_000_000
    with pytest.raises(DataError, match="no split 'test'; it has 'train' and 'validation'"):
        read_dataset("python-stdlib", split="test")


@pytest.mark.parametrize("name", ["gone.jsonl", "./gone", "/gone/at/all", "gone.txt"])
def test_missing_paths_are_not_looked_for_elsewhere(name):
    with pytest.raises(DataError, match="does not exist"):
        read_dataset(name)


def test_data_sets_by_name_need_a_network_and_say_what_does_not(monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match="some-people/some-data") as caught:
        read_dataset("some-people/some-data", "english", split="train")
    for part in ("'english'", "'train'", "Local forms", ".parquet", "save_to_disk", "python-stdlib"):
        assert part in str(caught.value)


def test_missing_packages_are_said_with_the_remedy(tmp_path, monkeypatch):
    path = write(tmp_path / "rows.parquet", ["a"])
    for name, source in (("pyarrow", str(path)), ("datasets", "some-data")):
        with monkeypatch.context() as without:
            without.setitem(sys.modules, name, None)
            with pytest.raises(MissingPackageError, match="pip install datasets pyarrow") as caught:
                read_dataset(source)
            assert isinstance(caught.value, ImportError)


def test_descriptions_follow_content_and_names_but_not_place_and_time(tmp_path):
    def describe(folder, **options):
        return describe_source(str(folder), **options)["fingerprint"]

    folder = tmp_path / "one"
    folder.mkdir()
    (folder / "a.txt").write_text("text")
    (folder / "b.txt").write_text("more")
    before = describe(folder)
    assert describe_source(str(folder))["bytes"] == 8
    os.utime(folder / "a.txt", (1, 1))
    folder = folder.rename(tmp_path / "two")
    assert describe(folder) == before
    assert describe(folder, text_column="other") != before
    assert describe(folder, patterns=["a.txt"]) != before
    # Of the same size, at the same time.
    (folder / "a.txt").write_text("texT")
    os.utime(folder / "a.txt", (1, 1))
    changed = describe(folder)
    assert changed != before
    (folder / "a.txt").write_text("text")
    (folder / "a.txt").rename(folder / "c.txt")
    assert describe(folder) not in (before, changed)
    assert describe_source("python-stdlib") == describe_source("python-stdlib")
