import io
import json
import os
import pickle
import subprocess
import sys
import threading
import time
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_context

import datasets
import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from llm_trainer.exceptions import (
    FormatError,
    MissingPackageError,
    TokenizerError,
    TokenizerNotTrainedException,
)
from llm_trainer.tokenizer import (
    BPETokenizer,
    CharTokenizer,
    HFTokenizer,
    Tokenizer,
    create_tokenizer,
    load_tokenizer,
)
from llm_trainer.tokenizer._pieces import reading_progress
from rich.console import Console
from tokenizers import models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

CHAT = ["<|user|>", "<|assistant|>"]
FOREIGN_WORDS = ["Zażółć gęślą jaźń", "漢字かな", "👩‍👩‍👧 é e\u0301"]


@pytest.fixture(scope="module")
def bpe(corpus):
    trained = BPETokenizer(special_tokens=CHAT)
    trained.train(corpus + FOREIGN_WORDS, vocab_size=340)
    return trained


@pytest.fixture(scope="module")
def char(corpus):
    trained = CharTokenizer(special_tokens=CHAT)
    trained.train(corpus + FOREIGN_WORDS)
    return trained


@pytest.fixture(scope="module")
def hf(bpe, tmp_path_factory):
    folder = tmp_path_factory.mktemp("hf")
    bpe.save_pretrained(folder)
    return HFTokenizer.from_pretrained(folder)


@pytest.fixture(params=["bpe", "char", "hf"])
def any_kind(request):
    return request.getfixturevalue(request.param)


AWKWARD = st.lists(
    st.one_of(
        st.text(max_size=15),
        st.text(alphabet="ażółć漢字👩\u200d\u0301 \r\n", max_size=15),
        st.sampled_from(["<|bos|>", "<|user|>", "<|pad|>", "def function_3(value):"]),
    )
).map("".join)


@settings(max_examples=150, deadline=None)
@given(text=AWKWARD)
def test_every_text_comes_back(bpe, char, hf, text):
    for tokenizer in (bpe, char, hf):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert tokenizer.decode(ids, skip_special_tokens=False) == "<|bos|>" + text
        ordinary = tokenizer.encode_ordinary(text)
        assert ordinary.dtype == np.uint32
        assert [tokenizer.bos_token_id, *ordinary.tolist()] == ids
        # Text that spells a special token does not become one.
        assert not set(ordinary.tolist()) & {tokenizer.token_to_id(name) for name in tokenizer.special_tokens}
        assert tokenizer.token_byte_lengths()[ids].sum() == len(text.encode())


@pytest.fixture(scope="module")
def folders(bpe, char, tmp_path_factory):
    made = []
    for tokenizer in (bpe, char):
        folder = tmp_path_factory.mktemp(tokenizer.kind)
        tokenizer.save_pretrained(folder)
        made.append((tokenizer, folder))
    return made


@pytest.fixture(scope="module")
def theirs(folders):
    return [
        (ours, kind.from_pretrained(folder))
        for ours, folder in folders
        for kind in (PreTrainedTokenizerFast, AutoTokenizer)
    ]


@settings(max_examples=150, deadline=None)
@given(text=AWKWARD)
def test_transformers_gives_the_same_ids(theirs, text):
    for ours, fast in theirs:
        ids = ours.encode(text)
        assert fast(text, split_special_tokens=True)["input_ids"] == ids
        assert fast.decode(ids, skip_special_tokens=True) == text


def test_transformers_has_the_same_special_tokens(theirs):
    for ours, fast in theirs:
        assert len(fast) == ours.vocab_size
        assert fast.get_vocab() == ours.vocab
        assert fast.convert_tokens_to_ids(ours.special_tokens) == [
            ours.token_to_id(name) for name in ours.special_tokens
        ]
        assert (fast.bos_token_id, fast.pad_token_id) == (ours.bos_token_id, ours.pad_token_id)
        # There text may become a special token, unless told otherwise.
        assert ours.token_to_id("<|user|>") in fast("a<|user|>b")["input_ids"]


def test_special_tokens_of_one_s_own(any_kind):
    tokenizer = any_kind
    size = tokenizer.vocab_size
    assert tokenizer.special_tokens == ["<|bos|>", "<|eos|>", "<|pad|>", "<|user|>", "<|assistant|>"]
    assert [tokenizer.token_to_id(name) for name in tokenizer.special_tokens] == list(range(size - 5, size))
    user = tokenizer.token_to_id("<|user|>")
    assert tokenizer.id_to_token(user) == "<|user|>"
    ids = [user, *tokenizer.encode("hi", add_special_tokens=False), tokenizer.eos_token_id]
    assert tokenizer.decode(ids) == "hi"
    assert tokenizer.decode(ids, skip_special_tokens=False) == "<|user|>hi<|eos|>"
    assert tokenizer.id_to_token(tokenizer.token_to_id("Ġ")) == "Ġ"
    assert tokenizer.decode([tokenizer.token_to_id("Ġ")]) == " "
    with pytest.raises(TokenizerError, match=r"no token '<\|nobody\|>'"):
        tokenizer.token_to_id("<|nobody|>")
    with pytest.raises(TokenizerError, match="-1"):
        tokenizer.id_to_token(-1)


def test_trained_anew_it_keeps_its_special_tokens(folders, corpus):
    for ours, folder in folders:
        again = load_tokenizer(folder)
        again.train(corpus[:4], vocab_size=300)
        assert again.special_tokens == ours.special_tokens
        assert again.fingerprint() != ours.fingerprint()


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ("<|user|>", "one string"),
        (["<|user|>", "<|user|>"], "twice"),
        (["<|eos|>"], "twice"),
        ([""], "not empty"),
        ([3], "must be a string"),
        (["user"], "end in punctuation"),
        (["<|>"], "letter or digit"),
        (["<\ud800>"], "lone surrogate"),
    ],
)
@pytest.mark.parametrize("kind", [BPETokenizer, CharTokenizer])
def test_impossible_special_tokens(kind, names, message):
    with pytest.raises(TokenizerError, match=message):
        kind(special_tokens=names)


def test_saving_and_loading(any_kind, tmp_path, corpus):
    any_kind.save_pretrained(tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert type(loaded) is type(any_kind)
    assert loaded.fingerprint() == any_kind.fingerprint()
    assert loaded.vocab == any_kind.vocab
    assert loaded.encode_batch(corpus) == [any_kind.encode(text) for text in corpus]
    assert create_tokenizer(any_kind.kind, tmp_path).fingerprint() == any_kind.fingerprint()


def test_a_folder_of_another_kind_is_refused(folders, tmp_path):
    (bpe, bpe_folder), (_, char_folder) = folders
    with pytest.raises(FormatError, match=r"'char' tokenizer; load_tokenizer"):
        BPETokenizer.from_pretrained(char_folder)
    with pytest.raises(FormatError, match="no character tokenizer"):
        CharTokenizer.from_pretrained(bpe_folder)
    bpe.save_pretrained(tmp_path)
    config = tmp_path / "tokenizer_config.json"
    config.write_text(config.read_text().replace('"bpe"', '"char"'))
    with pytest.raises(FormatError, match="damaged"):
        CharTokenizer.from_pretrained(tmp_path)
    config.write_text(config.read_text().replace('"char"', '"word"'))
    with pytest.raises(FormatError, match="unknown kind, 'word'"):
        load_tokenizer(tmp_path)


def test_characters(char):
    assert char.encode("ab", add_special_tokens=False) == [ord("a"), ord("b")]
    # Seen in training: a token each, in order of code points.
    seen = sorted({character for word in FOREIGN_WORDS for character in word if ord(character) > 127})
    assert char.encode("".join(seen), add_special_tokens=False) == list(range(256, 256 + len(seen)))
    # Not seen: its UTF-8 bytes.
    assert char.encode("xЖ", add_special_tokens=False) == [ord("x"), *"Ж".encode()]
    assert char.vocab_size == 256 + len(seen) + 5


def test_the_most_frequent_characters_are_kept():
    tokenizer = CharTokenizer()
    tokenizer.train(["ééé", "żż", "漢"], vocab_size=261)
    assert tokenizer.encode("éż漢", add_special_tokens=False) == [256, 257, *"漢".encode()]


def test_a_wrapped_tokenizer_without_bytes(tmp_path, monkeypatch):
    wrapped = tokenizers.Tokenizer(models.WordLevel({"a": 0, "b": 1, "[UNK]": 2}, "[UNK]"))
    wrapped.pre_tokenizer = pre_tokenizers.Whitespace()
    wrapped.enable_truncation(2)
    wrapped.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(tmp_path)
    assert type(tokenizer) is HFTokenizer
    assert tokenizer.encode("a b c a") == [0, 1, 2, 0]
    assert tokenizer.special_tokens == ["<|bos|>", "<|eos|>", "<|pad|>"]
    assert tokenizer.vocab_size == 6
    assert tokenizer.get_vocab_stats() == {"vocab_size": 6, "num_special_tokens": 3}
    with pytest.raises(TokenizerError, match="no bytes"):
        tokenizer.token_byte_lengths()
    with pytest.raises(TokenizerError, match="has been trained"):
        tokenizer.train(["a"])
    with pytest.raises(TokenizerError, match="has been trained"):
        tokenizer.train_from_dataset("no/such/dataset", vocab_size=300)
    with monkeypatch.context() as without:
        without.setitem(sys.modules, "tokenizers", None)
        with pytest.raises(MissingPackageError, match="pip install tokenizers"):
            load_tokenizer(tmp_path)
    no_unknown = tokenizers.Tokenizer(models.WordLevel({"a": 0, "b": 1}, "[UNK]"))
    no_unknown.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(TokenizerError, match="cannot encode"):
        HFTokenizer.from_pretrained(tmp_path).encode("c")


@pytest.mark.parametrize("far", [4_000_000_000, -1, "7"])
def test_impossible_ids_are_refused(far, tmp_path):
    wrapped = tokenizers.Tokenizer(models.WordLevel({"a": 0, "b": 7}, "a"))
    content = json.loads(wrapped.to_str())
    content["model"]["vocab"]["c"] = far
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(FormatError, match=f"3 tokens, and one has the id {far!r}"):
        HFTokenizer.from_pretrained(tmp_path)


def test_an_id_that_no_token_has(tmp_path):
    tokenizers.Tokenizer(models.WordLevel({"a": 0, "b": 7}, "a")).save(str(tmp_path / "tokenizer.json"))
    tokenizer = HFTokenizer.from_pretrained(tmp_path)
    assert tokenizer.decode([0, 7]) == "a b"
    with pytest.raises(TokenizerError, match="5 is not in the vocabulary: no token has it"):
        tokenizer.decode([0, 5])
    # Where the library would give a new token the id of an old one.
    tokenizers.Tokenizer(models.WordLevel({"a": 0, "b": 2}, "a")).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(FormatError, match="two tokens with one id"):
        HFTokenizer.from_pretrained(tmp_path)


def test_kinds_by_name(tmp_path):
    assert type(create_tokenizer("bpe", special_tokens=CHAT)) is BPETokenizer
    assert type(create_tokenizer("char")) is CharTokenizer
    for arguments, options, message in (
        (("words",), {}, "there are bpe, char, hf"),
        (("hf",), {}, "needs the path"),
        (("bpe",), {"min_frequency": 2}, "no option min_frequency"),
        (("bpe", tmp_path), {"special_tokens": CHAT}, "for a new tokenizer"),
        (("char", tmp_path), {}, "does not exist"),
    ):
        with pytest.raises((TokenizerError, FormatError), match=message):
            create_tokenizer(*arguments, **options)


@pytest.mark.parametrize("kind", [BPETokenizer, CharTokenizer, HFTokenizer])
def test_an_untrained_one_says_so(kind, tmp_path):
    uses = (
        lambda t: t.encode("a"),
        lambda t: t.encode_batch([]),
        lambda t: t.decode([1]),
        lambda t: t.vocab,
        lambda t: t.vocab_size,
        lambda t: t.special_tokens,
        lambda t: t.fingerprint(),
        lambda t: t.get_vocab_stats(),
        lambda t: t.save_pretrained(tmp_path),
    )
    for use in uses:
        with pytest.raises(TokenizerNotTrainedException, match=f"{kind.__name__}.from_pretrained"):
            use(kind())
    assert not list(tmp_path.iterdir())


def test_bad_input(any_kind):
    for use, message in (
        (lambda t: t.encode(None), "not a NoneType"),
        (lambda t: t.encode(b"a"), "not a bytes"),
        (lambda t: t.encode("a\ud800"), r"U\+D800.*position 1"),
        (lambda t: t.encode_batch("abc"), "one string"),
        (lambda t: t.encode_batch(["a", 3]), "not a int"),
        (lambda t: t.decode([t.vocab_size]), "not in the vocabulary"),
        (lambda t: t.decode([-1]), "Token id -1"),
        (lambda t: t.decode([1.5]), "integers"),
        (lambda t: t.decode(["a"]), "integers"),
        (lambda t: t.decode(3), "integers"),
    ):
        with pytest.raises(TokenizerError, match=message):
            use(any_kind)


@pytest.mark.parametrize("kind", [BPETokenizer, CharTokenizer])
def test_bad_training_input(kind):
    for texts, size, message in (
        (["a"], 258, "at least 259"),
        (["a"], "300", "vocab_size is '300'; it must be an integer"),
        (["a"], None, "vocab_size is None"),
        (["a"], 300.5, "vocab_size is 300.5"),
        ([], 300, "no text"),
        ("abc", 300, "one string"),
        ([b"abc"], 300, "must be strings, not bytes"),
        (["ab", "ab\ud800"], 300, r"lone surrogate \(U\+D800\) at position 2"),
    ):
        with pytest.raises(TokenizerError, match=message):
            kind().train(texts, vocab_size=size)


@pytest.mark.parametrize("num_threads", [None, 1, 3])
def test_batches_keep_their_order(any_kind, corpus, num_threads):
    texts = [*corpus * 9, ""]
    expected = [any_kind.encode(text) for text in texts]
    assert any_kind.encode_batch(iter(texts), num_threads=num_threads) == expected
    arrays = any_kind.encode_batch_ordinary(texts, num_threads)
    assert [ids.tolist() for ids in arrays] == [ids[1:] for ids in expected]
    assert any_kind.encode_batch([]) == []


@pytest.mark.parametrize("encode", ["encode_batch", "encode_batch_ordinary"])
def test_batches_are_encoded_on_all_cores_at_once(bpe, corpus, monkeypatch, encode):
    monkeypatch.setattr(os, "cpu_count", lambda: 3)
    all_three = threading.Barrier(3, timeout=5)
    encode_ordinary = bpe.encode_ordinary

    def encode_when_all_are_here(text):
        all_three.wait()
        return encode_ordinary(text)

    expected = getattr(bpe, encode)(corpus[:12], num_threads=1)
    monkeypatch.setattr(bpe, "encode_ordinary", encode_when_all_are_here)
    found = getattr(bpe, encode)(corpus[:12])
    assert [list(ids) for ids in found] == [list(ids) for ids in expected]


def test_other_threads_run_while_one_encodes(bpe):
    text = " ".join(f"word{n} größe" for n in range(200_000))
    with ThreadPoolExecutor(1) as pool:
        encoded = pool.submit(bpe.encode_ordinary, text)
        turns = 0
        while not encoded.done():
            time.sleep(0.001)
            turns += 1
    # The one who sleeps gets no turn as long as the encoder holds Python's lock.
    assert turns > 20


def test_pickled_it_is_the_same(any_kind, corpus):
    state = pickle.dumps(any_kind)
    copy = pickle.loads(state)  # noqa: S301 - its own
    assert copy.fingerprint() == any_kind.fingerprint()
    assert copy.encode_batch(corpus) == any_kind.encode_batch(corpus)
    assert pickle.dumps(any_kind) == state


def test_another_process_can_use_it(any_kind, corpus):
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        assert pool.submit(any_kind.encode_batch, corpus).result() == any_kind.encode_batch(corpus)


def test_datasets_map_takes_it(bpe, corpus):
    rows = datasets.Dataset.from_dict({"text": corpus})
    mapped = rows.map(lambda row: {"ids": bpe.encode(row["text"])}, keep_in_memory=True)
    assert mapped["ids"] == [bpe.encode(text) for text in corpus]


def test_all_are_of_one_interface(any_kind):
    assert isinstance(any_kind, Tokenizer)


def test_progress_is_shown_on_a_terminal(corpus):
    def shown(show, **options):
        console = Console(file=io.StringIO(), **options)
        with reading_progress(show, console) as report:
            report.add(2_000_000)
            report.done()
        return console.file.getvalue()

    assert shown(None) == ""
    assert shown(False, force_terminal=True) == ""
    assert "merging 1 texts, 2.0M characters" in shown(None, force_terminal=True, color_system=None)


MEMORY = """
import resource, sys
from llm_trainer.tokenizer import BPETokenizer, CharTokenizer
kind, megabytes = {"bpe": BPETokenizer, "char": CharTokenizer}[sys.argv[1]], int(sys.argv[2])
words = "".join(f"word{n} " for n in range(2000)) + "żółw\\n"
text = words * (1_000_000 // len(words))
kind().train((text for _ in range(megabytes)), vocab_size=300)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
"""


@pytest.mark.parametrize("kind", ["bpe", "char"])
def test_training_takes_bounded_memory(kind):
    def peak_mib(megabytes):
        command = [sys.executable, "-c", MEMORY, kind, str(megabytes)]
        return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)

    # A stream of 70 MB takes no more than one of 20, but for the allocator's whims.
    assert peak_mib(70) < peak_mib(20) + 25


def test_training_on_a_dataset(corpus, tmp_path):
    texts = corpus + FOREIGN_WORDS
    expected = BPETokenizer()
    expected.train(texts, vocab_size=320)
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"body": text}) + "\n" for text in texts))
    datasets.Dataset.from_dict({"text": texts}).save_to_disk(tmp_path / "saved")
    from_rows, from_folder = BPETokenizer(), BPETokenizer()
    from_rows.train_from_dataset(
        dataset_name=str(tmp_path / "rows.jsonl"), dataset_config=None, vocab_size=320, text_column="body"
    )
    from_folder.train_from_dataset(str(tmp_path / "saved"), vocab_size=320, show_progress=False)
    assert from_rows.fingerprint() == from_folder.fingerprint() == expected.fingerprint()
    characters = CharTokenizer()
    characters.train_from_dataset(str(tmp_path / "saved"))
    assert "漢" in [characters.decode([index]) for index in range(256, characters.vocab_size)]


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("min_frequency", "known keys: dataset_config, vocab_size"),
        ("text_colum", "did you mean 'text_column'"),
    ],
)
def test_unknown_options_of_a_dataset(option, message):
    with pytest.raises(TokenizerError, match=f"no option '{option}'; {message}"):
        BPETokenizer().train_from_dataset("python-stdlib", **{option: 2})
