import dataclasses
import json
import logging

import pytest
import torch
from llm_trainer.config import DataConfig, ModelConfig
from llm_trainer.data import TokenStore, load_splits
from llm_trainer.data._sources import FileSource
from llm_trainer.exceptions import ConfigurationError, DataError, FormatError
from llm_trainer.tokenizer import BPETokenizer, CharTokenizer


@pytest.fixture
def config(tmp_path, corpus):
    folder = tmp_path / "text"
    folder.mkdir()
    for number, text in enumerate(corpus):
        (folder / f"{number:03}.txt").write_text(text)
    (tmp_path / "held_out.jsonl").write_text(json.dumps({"text": corpus[0]}))
    return DataConfig(
        train_file=str(folder),
        validation_file=str(tmp_path / "held_out.jsonl"),
        vocab_size=300,
        max_length=32,
        cache_dir=str(tmp_path / "cache"),
        preprocessing_num_workers=2,
    )


def rows(dataset):
    return [{name: value.tolist() for name, value in row.items()} for row in dataset]


def contents(folder):
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()
    }


def test_every_setting_does_what_it_says(config, corpus):
    splits = load_splits(config)
    assert isinstance(splits.tokenizer, BPETokenizer)
    assert splits.tokenizer.vocab_size == 300
    assert splits.train.get_stats()["num_documents"] == len(corpus)
    assert splits.validation is not None
    assert splits.validation.get_stats()["num_documents"] == 1
    assert (splits.train.max_length, splits.train.packed, splits.train.packing) == (32, True, "best_fit")
    lengths = sorted(len(splits.tokenizer.encode_ordinary(text)) for text in corpus)
    other = load_splits(
        dataclasses.replace(
            config,
            pack_sequences=False,
            packing="concatenate",
            min_length=lengths[-1],
            validation_file=None,
        )
    )
    assert (other.train.packed, other.train.packing) == (False, "concatenate")
    assert other.train.get_stats()["num_documents"] == lengths.count(lengths[-1]) < len(corpus)
    assert other.validation is None


def test_in_memory_and_in_files_are_the_same(config, tmp_path):
    cached = load_splits(config)
    in_memory = load_splits(dataclasses.replace(config, cache_dir=None))
    elsewhere = load_splits(dataclasses.replace(config, cache_dir=None), cache_dir=tmp_path / "run" / "data")
    assert len(list((tmp_path / "run" / "data").iterdir())) == 3
    assert in_memory.tokenizer.fingerprint() == cached.tokenizer.fingerprint()
    for name in ("train", "validation"):
        one, two, three = (getattr(splits, name) for splits in (cached, in_memory, elsewhere))
        assert rows(one) == rows(two) == rows(three)
        assert one.fingerprint() == two.fingerprint() == three.fingerprint()


def test_what_is_ready_is_used_without_reading_the_text(config, tmp_path, monkeypatch, caplog):
    with caplog.at_level(logging.INFO):
        first = load_splits(config)
    assert caplog.text.count("Preparing") == 3
    before = contents(tmp_path / "cache")
    texts = FileSource.texts

    def first_document(source):
        yield next(texts(source))
        pytest.fail("the text was read")

    monkeypatch.setattr(FileSource, "texts", first_document)
    caplog.clear()
    with caplog.at_level(logging.INFO):
        # These belong to the rows, not to the tokens.
        second = load_splits(dataclasses.replace(config, max_length=64, packing="concatenate"))
        assert rows(load_splits(config).train) == rows(first.train)
    assert caplog.text == ""
    assert second.train.max_length == 64
    assert contents(tmp_path / "cache") == before


def test_what_changed_is_prepared_anew_beside_the_old(config, tmp_path, caplog):
    first = load_splits(config)
    before = contents(tmp_path / "cache")
    caplog.clear()
    with caplog.at_level(logging.INFO):
        load_splits(dataclasses.replace(config, min_length=11))
    assert caplog.text.count("Preparing tokens") == 2
    assert "delete what is not wanted" in caplog.text
    (tmp_path / "text" / "new.txt").write_text("def another_function(value): return value")
    second = load_splits(config)
    assert second.train.get_stats()["num_documents"] == first.train.get_stats()["num_documents"] + 1
    assert contents(tmp_path / "cache").items() > before.items()


@pytest.mark.parametrize("kind", ["train-tokens", "validation-tokens", "train-bpe"])
def test_what_is_damaged_is_prepared_anew_with_a_warning(config, tmp_path, kind, caplog):
    expected = load_splits(config)
    before = contents(tmp_path / "cache")
    (folder,) = (tmp_path / "cache").glob(f"*-{kind}-*")
    path = folder / ("tokenizer.json" if kind == "train-bpe" else "tokens.bin")
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with caplog.at_level(logging.WARNING):
        again = load_splits(config)
    assert path.name in caplog.text or "tokenizer" in caplog.text
    assert rows(again.train) == rows(expected.train)
    assert contents(tmp_path / "cache") == before


def test_tokenizers_of_every_kind(config, tmp_path, tokenizer):
    assert load_splits(config, tokenizer).tokenizer is tokenizer
    characters = load_splits(dataclasses.replace(config, tokenizer="char"))
    assert isinstance(characters.tokenizer, CharTokenizer)
    tokenizer.save_pretrained(tmp_path / "saved")
    read = load_splits(dataclasses.replace(config, tokenizer=str(tmp_path / "saved")))
    assert read.tokenizer.fingerprint() == tokenizer.fingerprint()
    stores = [TokenStore.open(path) for path in (tmp_path / "cache").glob("*-train-tokens-*")]
    assert {store.meta["tokenizer_fingerprint"] for store in stores} == {
        tokenizer.fingerprint(),
        characters.tokenizer.fingerprint(),
    }
    with pytest.raises(DataError, match=r"tokenizer is 'pbe', which is no folder and none of bpe, char"):
        load_splits(dataclasses.replace(config, tokenizer="pbe"))
    with pytest.raises(FormatError):
        load_splits(dataclasses.replace(config, tokenizer=str(tmp_path / "text")))


def test_data_sets_by_name_have_splits(tmp_path, corpus):
    for split, texts in (("train", corpus), ("test", corpus[:3])):
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps({"body": text}) + "\n" for text in texts))
    config = DataConfig(
        dataset_name=str(tmp_path), validation_split="test", text_column="body", vocab_size=300, max_length=32
    )
    splits = load_splits(config)
    assert splits.train.get_stats()["num_documents"] == len(corpus)
    assert splits.validation is not None
    assert splits.validation.get_stats()["num_documents"] == 3
    assert load_splits(dataclasses.replace(config, validation_split=None)).validation is None
    assert torch.equal(splits.train[0]["input_ids"], load_splits(config).train[0]["input_ids"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train_file": "gone"}, "gone does not exist"),
        ({"validation_file": "gone"}, "gone does not exist"),
        ({"train_file": None, "dataset_name": "./gone"}, r"\./gone does not exist"),
        (
            {"train_file": None, "dataset_name": "python-stdlib", "validation_file": None}
            | {"validation_split": "test"},
            "no split 'test'",
        ),
        ({"file_patterns": ("*.md",)}, r"no text in files named \*\.md"),
        ({"file_patterns": ("../*",)}, "not a file name inside"),
    ],
)
def test_bad_input_is_found_before_any_work(config, tmp_path, changes, message):
    with pytest.raises(DataError, match=message):
        load_splits(dataclasses.replace(config, **changes))
    cache = tmp_path / "cache"
    assert not cache.exists() or list(cache.iterdir()) == []


@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "held_out.jsonl is empty"),
        ('{"text": " "}\n', "is empty"),
        ('{"txt": "a"}\n', "line 1 has no key"),
    ],
)
def test_bad_held_out_text_is_found_before_any_work(config, tmp_path, monkeypatch, content, message, cached):
    (tmp_path / "held_out.jsonl").write_text(content)
    monkeypatch.setattr(BPETokenizer, "train", lambda *_: pytest.fail("a tokenizer is trained"))
    with pytest.raises(DataError, match=message):
        load_splits(config if cached else dataclasses.replace(config, cache_dir=None))
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("wrong", [{"train_file": "a.txt"}, ModelConfig(), None])
def test_what_is_no_configuration_is_refused(wrong):
    with pytest.raises(ConfigurationError, match="config must be a DataConfig, but is of type"):
        load_splits(wrong)


def test_text_that_changes_while_it_is_read_is_not_taken(config, tmp_path, tokenizer):
    class Meddling:
        def __getattr__(self, name):
            return getattr(tokenizer, name)

        def encode_ordinary(self, text):
            (tmp_path / "text" / "000.txt").write_text("something else, in the middle")
            return tokenizer.encode_ordinary(text)

    with pytest.raises(DataError, match="changed while it was read"):
        load_splits(dataclasses.replace(config, validation_file=None), Meddling())
    assert list((tmp_path / "cache").iterdir()) == []
