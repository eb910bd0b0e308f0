import hashlib
import inspect
import json
import logging
import multiprocessing
import pickle
import resource
import subprocess
import sys
import textwrap
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from multiprocessing.connection import wait

import numpy as np
import pytest
import torch
from llm_trainer.data import LanguageModelingDataset, TokenStore, create_dataloader
from llm_trainer.data import _encode as encode
from llm_trainer.data._folder import make_folder
from llm_trainer.exceptions import DataError, FormatError

TEXTS = ["the first function", "return value", "", "def function_3(value):\n    return value * 3"]


@pytest.fixture
def store(tmp_path, tokenizer, corpus):
    return TokenStore.create(tmp_path / "store", corpus, tokenizer)


def expected_tokens(tokenizer, texts):
    return [[*tokenizer.encode(text), tokenizer.eos_token_id] for text in texts if text]


def test_the_files_are_the_documents(tmp_path, tokenizer):
    store = TokenStore.create(tmp_path / "store", TEXTS, tokenizer, source={"name": "four"})
    documents = expected_tokens(tokenizer, TEXTS)
    # Read without the class: the format is what its description says.
    tokens = np.fromfile(tmp_path / "store" / "tokens.bin", dtype="<u2").tolist()
    offsets = np.fromfile(tmp_path / "store" / "offsets.bin", dtype="<i8").tolist()
    assert [tokens[start:end] for start, end in pairwise(offsets)] == documents
    assert offsets[-1] == len(tokens)
    meta = json.loads((tmp_path / "store" / "meta.json").read_text())
    assert meta["num_text_bytes"] == sum(len(text) for text in TEXTS)
    assert (meta["num_documents"], meta["num_dropped_documents"], meta["version"]) == (3, 1, 1)
    assert meta["source"] == {"name": "four"}
    assert meta["tokenizer_fingerprint"] == tokenizer.fingerprint()
    assert store.tokens.tolist() == tokens
    assert [path.name for path in tmp_path.iterdir()] == ["store"]


def test_rows_are_those_of_the_same_texts_in_memory(store, tokenizer, corpus):
    for packing in ("best_fit", "concatenate"):
        in_memory = LanguageModelingDataset(corpus, tokenizer, 16, packing=packing)
        mapped = LanguageModelingDataset.from_store(store, 16, packing=packing)
        assert mapped.fingerprint() == in_memory.fingerprint()
        assert mapped.get_stats() == in_memory.get_stats()
        for one, other in zip(mapped, in_memory, strict=True):
            assert all(torch.equal(one[name], other[name]) for name in one)


def test_any_number_of_threads_gives_the_same_file(tmp_path, tokenizer, corpus, monkeypatch):
    monkeypatch.setattr(encode, "GROUP_CHARS", 200)
    one, four = (
        TokenStore.create(tmp_path / str(threads), corpus, tokenizer, num_threads=threads)
        for threads in (1, 4)
    )
    assert one.meta == four.meta


def test_long_documents_in_pieces_have_the_ids_of_the_whole(tmp_path, tokenizer, corpus, monkeypatch):
    text = "".join(corpus) + "ü" + "many  spaces \n\n and lines\r\n" * 20
    whole = TokenStore.create(tmp_path / "whole", ["short", text, "end"], tokenizer)
    monkeypatch.setattr(encode, "PIECE_CHARS", 300)
    pieces = TokenStore.create(tmp_path / "pieces", ["short", text, "end"], tokenizer, num_threads=2)
    assert pieces.meta == whole.meta
    # Where there is nowhere to cut well, the text is still the same.
    blank = "x" * 1000
    cut = TokenStore.create(tmp_path / "cut", [blank], tokenizer)
    assert tokenizer.decode(cut.tokens.tolist()) == blank


@pytest.mark.parametrize("least", [50, 500])
def test_a_long_document_is_dropped_only_if_all_of_it_is_too_short(tmp_path, tokenizer, monkeypatch, least):
    text = "one two three\n" * 40
    count = len(tokenizer.encode_ordinary(text))
    assert 50 < count < 500
    monkeypatch.setattr(encode, "PIECE_CHARS", 60)
    texts = ["short", text, "a b" * 700]
    store = TokenStore.create(tmp_path / "store", texts, tokenizer, min_length=least)
    kept = [ids for ids in expected_tokens(tokenizer, texts) if len(ids) - 2 >= least]
    assert store.tokens.tolist() == [token for ids in kept for token in ids]
    assert store.dropped == 3 - len(kept)
    assert store.text_bytes == (2100 if least == 500 else 2100 + len(text))


def test_large_vocabularies_take_four_bytes(tmp_path):
    class Wide:
        vocab_size, bos_token_id, eos_token_id, pad_token_id = 1 << 17, 1 << 16, 65537, 65538

        def encode_ordinary(self, text):
            return np.array([ord(letter) for letter in text], dtype=np.uint32)

        def fingerprint(self):
            return "wide"

    store = TokenStore.create(tmp_path / "store", ["a\U0001f600"], Wide())
    assert store.tokens.dtype == np.uint32
    assert store.tokens.tolist() == [65536, 97, 0x1F600, 65537]


def test_a_pickled_store_is_small_and_reads_the_files(store):
    ids = store.tokens.tolist()
    sent = pickle.dumps(store)
    assert len(sent) < 3000
    assert pickle.loads(sent).tokens.tolist() == ids  # noqa: S301 - it was made here
    with pytest.raises(ValueError, match="read-only"):
        store.tokens[0] = 1


def test_workers_read_the_store_themselves(store):
    dataset = LanguageModelingDataset.from_store(store, 16)
    here, there = (
        [batch["input_ids"].tolist() for batch in create_dataloader(dataset, 4, num_workers=workers, seed=1)]
        for workers in (0, 2)
    )
    assert here == there


@pytest.mark.parametrize("name", ["tokens.bin", "offsets.bin", "meta.json"])
@pytest.mark.parametrize("damage", ["flip", "cut", "delete", "grow"])
def test_every_damage_is_found_and_named(store, name, damage):
    path = store.path / name
    content = bytearray(path.read_bytes())
    if damage == "delete":
        path.unlink()
    else:
        content[len(content) // 2] ^= damage == "flip"
        path.write_bytes(content[:-5] if damage == "cut" else bytes(content) + b"!!" * (damage == "grow"))
    with pytest.raises(FormatError, match=name):
        TokenStore.open(store.path)


def test_newer_and_other_folders_are_refused(store, tmp_path):
    path = store.path / "meta.json"
    meta = json.loads(path.read_text())
    path.write_text(json.dumps(meta | {"version": 2}))
    with pytest.raises(FormatError, match="upgrade"):
        TokenStore.open(store.path)
    path.write_text(json.dumps(meta | {"format": "other"}))
    with pytest.raises(FormatError, match="not of a token store"):
        TokenStore.open(store.path)
    with pytest.raises(FormatError, match="does not exist"):
        TokenStore.open(tmp_path / "gone")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_tokens": 7}, "contradicts itself"),
        ({"num_documents": -1}, "contradicts itself"),
        ({"dtype": "float64"}, "lacks what"),
        ({"num_tokens": None}, "lacks what"),
        ({"files": ["tokens.bin"]}, "lacks what"),
        ({"files": {"../../other": {"bytes": 1}}}, "contradicts itself"),
    ],
)
def test_a_forged_description_is_refused(store, change, message):
    path = store.path / "meta.json"
    meta = json.loads(path.read_text()) | change
    del meta["checksum"]
    content = json.dumps(meta, sort_keys=True, separators=(",", ":"))
    path.write_text(json.dumps(meta | {"checksum": hashlib.sha256(content.encode()).hexdigest()}))
    with pytest.raises(FormatError, match=message):
        TokenStore.open(store.path)


def test_a_failed_preparation_leaves_what_was_there(store, tokenizer, corpus):
    before = sorted((path.name, path.read_bytes()) for path in store.path.iterdir())

    def broken():
        yield from corpus
        raise KeyboardInterrupt

    for texts, error in ((broken(), KeyboardInterrupt), (["", ""], DataError), (["a", 3], DataError)):
        with pytest.raises(error):
            TokenStore.create(store.path, texts, tokenizer)
    assert sorted((path.name, path.read_bytes()) for path in store.path.iterdir()) == before
    assert [path.name for path in store.path.parent.iterdir()] == ["store"]
    # And one that succeeds replaces it.
    assert TokenStore.create(store.path, ["one"], tokenizer).num_documents == 1
    assert [path.name for path in store.path.parent.iterdir()] == ["store"]


class Bytes:
    vocab_size, bos_token_id, eos_token_id, pad_token_id = 259, 256, 257, 258

    def encode_ordinary(self, text):
        return np.frombuffer(text.encode(), dtype=np.uint8).astype(np.uint32)

    def fingerprint(self):
        return "bytes"


def test_memory_does_not_grow_with_the_corpus(tmp_path):
    program = inspect.getsource(Bytes) + textwrap.dedent("""
        page = "some words of text\\n" * 5000
        TokenStore.create(target / "small", (page for _ in range(20)), Bytes(), num_threads=2)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        store = TokenStore.create(target / "large", (page for _ in range(2000)), Bytes(), num_threads=2)
        after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        print(before, after, store.meta["num_tokens"] / 2**20)
    """)
    imports = "import resource, sys\nimport numpy as np\nfrom pathlib import Path\n"
    imports += "from llm_trainer.data import TokenStore\ntarget = Path(sys.argv[1])\n"
    done = subprocess.run(
        [sys.executable, "-c", imports + program, tmp_path], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    before, after, millions = map(float, done.stdout.split())
    # 181 million tokens, 362 MB of them and half as much text.
    assert millions > 180
    assert after - before < 40


@pytest.fixture
def process():
    """Starts a function in a process of its own, which can say where it is."""
    context = multiprocessing.get_context("fork")
    started = []

    def start(function, *arguments):
        here, there = context.Pipe()
        started.append(context.Process(target=function, args=(there, *arguments)))
        started[-1].start()
        there.close()
        return started[-1], here

    yield start
    for child in started:
        child.kill()
        child.join()


def prepare(connection, target, texts):
    def slowly():
        yield from texts
        connection.send("under way")
        connection.recv()
        yield "the last text"

    TokenStore.create(target, slowly(), Bytes())


def test_what_a_killed_process_left_is_removed_and_never_taken_for_whole(tmp_path, process):
    child, connection = process(prepare, tmp_path / "store", ["text " * 100_000] * 4)
    connection.recv()
    child.kill()
    child.join()
    left = [path.name for path in tmp_path.iterdir()]
    assert any(name.endswith(".partial") for name in left)
    assert "store" not in left
    # Another target in the same folder clears up as well: the one that was wanted may never be again.
    make_folder(tmp_path / "other", lambda folder: (folder / "file").touch())
    assert not [path for path in tmp_path.iterdir() if path.name.endswith(".partial")]
    TokenStore.create(tmp_path / "store", ["text"], Bytes())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other", "store"]


def test_a_running_preparation_is_not_cleared_away(tmp_path, process):
    child, connection = process(prepare, tmp_path / "slow", ["text " * 60_000])
    connection.recv()
    make_folder(tmp_path / "other", lambda folder: (folder / "file").touch())
    connection.send("go on")
    child.join()
    assert child.exitcode == 0
    assert TokenStore.open(tmp_path / "slow").num_documents == 2


def make_slowly(connection, folder):
    def make(partial):
        with (folder / "log").open("a") as log:
            log.write("made\n")
        connection.send("has it")
        time.sleep(0.5)
        (partial / "file").touch()

    make_folder(folder / "made", make, is_good=lambda path: (path / "file").exists())


def test_processes_at_once_make_it_once_and_say_that_they_wait(tmp_path, process, caplog):
    children = [process(make_slowly, tmp_path) for _ in range(3)]
    wait([connection for _, connection in children])
    with caplog.at_level(logging.INFO):
        make_folder(tmp_path / "made", lambda _: pytest.fail("made twice"), lambda path: path.exists())
    assert "Another process makes made" in caplog.text
    for child, _ in children:
        child.join()
        assert child.exitcode == 0
    assert (tmp_path / "log").read_text() == "made\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["log", "made"]


def test_who_makes_the_same_in_quick_turns_finds_no_lock_that_another_is_deleting(tmp_path):
    def make_often():
        for _ in range(200):
            make_folder(tmp_path / "made", lambda _: None, is_good=lambda path: path.exists())

    with ThreadPoolExecutor(max_workers=4) as pool:
        for run in [pool.submit(make_often) for _ in range(4)]:
            run.result()
    assert [path.name for path in tmp_path.iterdir()] == ["made"]


def prepare_too_much(connection, target):
    # A limit on the size of files stands for the disk's end.
    resource.setrlimit(resource.RLIMIT_FSIZE, (3_000_000, 3_000_000))
    try:
        TokenStore.create(target, ("word " * 10_000 for _ in range(100)), Bytes())
    except OSError as error:
        connection.send(str(error))


def test_a_full_disk_is_said_and_nothing_is_left(tmp_path, process):
    _, connection = process(prepare_too_much, tmp_path / "store")
    message = connection.recv()
    assert str(tmp_path / "store") in message
    assert "does not fit, and nothing was left" in message
    assert list(tmp_path.iterdir()) == []


def test_progress_is_shown_where_it_is_wanted(tmp_path, tokenizer, capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    TokenStore.create(tmp_path / "a", TEXTS, tokenizer)
    assert capsys.readouterr().err == ""
    TokenStore.create(tmp_path / "b", TEXTS, tokenizer, show_progress=True)
    assert "3 documents" in capsys.readouterr().err


def test_the_folder_has_the_permissions_of_new_ones(store, tmp_path):
    (tmp_path / "plain").mkdir()
    assert store.path.stat().st_mode == (tmp_path / "plain").stat().st_mode
    assert (store.path / "tokens.bin").stat().st_mode & 0o444 == 0o444
