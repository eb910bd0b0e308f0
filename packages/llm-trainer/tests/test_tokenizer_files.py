import json
import random
import sysconfig
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from llm_trainer.exceptions import FormatError
from llm_trainer.tokenizer import BPETokenizer, HFTokenizer, load_tokenizer
from llm_trainer.tokenizer._byte_level import UnsupportedTokenizerError
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

LIBRARY = Path(sysconfig.get_paths()["stdlib"])
TEXTS = [
    (LIBRARY / name).read_text() for name in ("argparse.py", "json/decoder.py", "typing.py", "ast.py")
] + [
    "Zażółć gęślą jaźń; 漢字かな交じり文。 Привет, мир! 👩‍👩‍👧 مرحبا\u00a0بالعالم",
    "\n\n\t x  \r\n'S 'LL 1234567 ½²",
    "  " * 40 + "aaaaaaaaaaaaa" * 3 + "\n" * 7 + "--------" * 9,
]
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
WITH_GAPS = r"\p{L}+|\p{N}{2}(?=x)"


def split_at(pattern):
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def trained(pre_tokenizer, special):
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        TEXTS,
        trainers.BpeTrainer(
            vocab_size=1200,
            special_tokens=special,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return tokenizer


def gpt2():
    tokenizer = trained(pre_tokenizers.ByteLevel(add_prefix_space=False), ["<|endoftext|>"])
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    return tokenizer.to_str(), {"bos_token": {"content": "<|endoftext|>"}, "eos_token": "<|endoftext|>"}


def llama3():
    names = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>"]
    tokenizer = trained(split_at(LLAMA3), names)
    begin = names[0]
    tokenizer.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=True),
            processors.TemplateProcessing(
                single=f"{begin} $A", special_tokens=[(begin, tokenizer.token_to_id(begin))]
            ),
        ]
    )
    content = json.loads(tokenizer.to_str())
    content["model"]["ignore_merges"] = True
    # A token that no merge makes, and that is only ever a whole piece.
    spelled = pre_tokenizers.ByteLevel(add_prefix_space=False).pre_tokenize_str(" gęślą")[0][0]
    content["model"]["vocab"][spelled] = len(content["model"]["vocab"])
    return json.dumps(content), {"bos_token": begin, "eos_token": names[1]}


def shuffled():
    # As where the vocabulary was sorted after training: ids say nothing about the order of the merges.
    text, config = gpt2()
    content = json.loads(text)
    names = sorted(content["model"]["vocab"])
    random.Random(3).shuffle(names)
    content["model"]["vocab"] = {name: index for index, name in enumerate(names)}
    for token in content["added_tokens"]:
        token["id"] = names.index(token["content"])
    content["model"]["merges"] = [" ".join(pair) for pair in content["model"]["merges"]]
    return json.dumps(content), config


def with_gaps():
    return trained(split_at(WITH_GAPS), []).to_str(), {}


@pytest.fixture(scope="module", params=[gpt2, llama3, shuffled, with_gaps], ids=lambda make: make.__name__)
def foreign(request, tmp_path_factory):
    """A folder of other people's, what reads it here, and the library's reading."""
    folder = tmp_path_factory.mktemp("foreign")
    text, config = request.param()
    (folder / "tokenizer.json").write_text(text)
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    theirs = tokenizers.Tokenizer.from_str(text)
    theirs.encode_special_tokens = True
    return folder, BPETokenizer.from_pretrained(folder), theirs


def test_real_text_has_the_library_s_ids(foreign):
    _, ours, theirs = foreign
    for text in TEXTS:
        ids = theirs.encode(text).ids
        assert ours.encode(text) == ids
        assert ours.decode(ids) == text


AWKWARD = st.lists(
    st.one_of(
        st.text(max_size=12),
        st.text(alphabet=" \t\r\n\u3000\u2028a1'!é", max_size=12),
        st.sampled_from(["'ſ", "'LL", "12x", "1234", " def ", "aaaa", "----", "<|endoftext|>"]),
    )
).map("".join)


@settings(max_examples=150, deadline=None)
@given(text=AWKWARD)
def test_any_text_has_the_library_s_ids(foreign, text):
    _, ours, theirs = foreign
    assert ours.encode(text) == theirs.encode(text).ids
    assert ours.decode(ours.encode(text)) == text


def test_saved_again_it_is_the_same(foreign, tmp_path):
    _, ours, theirs = foreign
    ours.save_pretrained(tmp_path)
    again, library = (
        load_tokenizer(tmp_path),
        tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json")),
    )
    assert type(again) is BPETokenizer
    assert again.fingerprint() == ours.fingerprint()
    assert again.special_tokens == ours.special_tokens
    for text in TEXTS:
        assert library.encode(text).ids == again.encode(text) == theirs.encode(text).ids


@pytest.mark.parametrize("make", [gpt2, llama3], ids=["gpt2", "llama3"])
@pytest.mark.parametrize("blank", [" ", "\n", "\u3000"])
def test_a_long_run_of_blanks_has_the_library_s_ids(make, blank, tmp_path):
    text, config = make()
    (tmp_path / "tokenizer.json").write_text(text)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    ours, theirs = BPETokenizer.from_pretrained(tmp_path), tokenizers.Tokenizer.from_str(text)
    # tiktoken's regular expressions give up at a few hundred thousand.
    long = f"a!\n{blank * 400_000}\n {blank * 400_000}b"
    assert ours.decode(ours.encode(long)) == long
    short = f"a!\n{blank * 1500}\n {blank * 1500}b"
    assert ours.encode(short) == theirs.encode(short).ids


def test_missing_roles_are_filled(tmp_path):
    text, config = gpt2()
    (tmp_path / "tokenizer.json").write_text(text)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    size = tokenizers.Tokenizer.from_str(text).get_vocab_size()
    for kind in (BPETokenizer, HFTokenizer):
        tokenizer = kind.from_pretrained(tmp_path)
        end = tokenizer.token_to_id("<|endoftext|>")
        assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (end, end, size)
        assert tokenizer.vocab_size == size + 1
        assert tokenizer.id_to_token(size) == "<|pad|>"
    (tmp_path / "tokenizer_config.json").write_text("{}")
    (tmp_path / "special_tokens_map.json").write_text(json.dumps(config))
    assert BPETokenizer.from_pretrained(tmp_path).eos_token_id == 0
    (tmp_path / "special_tokens_map.json").unlink()
    for kind in (BPETokenizer, HFTokenizer):
        tokenizer = kind.from_pretrained(tmp_path / "tokenizer.json")
        ids = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
        assert ids == (size, size + 1, size + 2)
        assert tokenizer.vocab_size == size + 3


def change(content, path, value):
    *way, last = path
    for key in way:
        content = content[key]
    content[last] = value


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (["normalizer"], json.loads(normalizers.NFC().__getstate__()), "normalizer 'NFC'"),
        (["model", "type"], "Unigram", "Unigram"),
        (["model", "byte_fallback"], True, "byte_fallback"),
        (["model", "end_of_word_suffix"], "</w>", "end_of_word_suffix"),
        (["pre_tokenizer", "add_prefix_space"], True, "add_prefix_space"),
        (["pre_tokenizer"], {"type": "Whitespace"}, "Whitespace"),
        (["pre_tokenizer"], None, "pre-tokenizers"),
        (["decoder"], {"type": "WordPiece"}, "decoder"),
        (["post_processor"], {"type": "BertProcessing"}, "BertProcessing"),
    ],
)
def test_what_tiktoken_cannot_do_is_refused(path, value, message, tmp_path):
    content = json.loads(gpt2()[0])
    change(content, path, value)
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(FormatError, match=rf"{message}.*create_tokenizer\('hf'"):
        BPETokenizer.from_pretrained(tmp_path)


@pytest.mark.parametrize("pattern", [r"^a", r"\w+", r"(a)\1", r"[a&&b]", r"a{2}+", r"(?<=a)b", "."])
def test_patterns_that_engines_read_differently_are_refused(pattern, tmp_path):
    content = json.loads(with_gaps()[0])
    content["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = pattern
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(FormatError, match=r"split pattern.*create_tokenizer\('hf'"):
        BPETokenizer.from_pretrained(tmp_path)


def written(folder, merges, *, whole_pieces=False):
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = list(dict.fromkeys(alphabet + ["".join(pair) for pair in merges]))
    tokenizer = tokenizers.Tokenizer(
        models.BPE({token: i for i, token in enumerate(tokens)}, merges, ignore_merges=whole_pieces)
    )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.save(str(folder / "tokenizer.json"))
    return tokenizer


WORDS = st.text(alphabet="abc", min_size=1, max_size=9)
MERGES = st.lists(st.tuples(st.integers(0, 12), st.integers(0, 12)), max_size=8)


@settings(max_examples=200, deadline=None)
@given(
    choices=MERGES, words=st.lists(WORDS, min_size=8, max_size=30), order=st.randoms(use_true_random=False)
)
def test_any_merges_are_exact_or_refused(choices, words, order, tmp_path_factory):
    """Merges that no training would give: each of two tokens there are, in any order."""
    tokens, merges = ["a", "b", "c"], []
    for left, right in choices:
        pair = (tokens[left % len(tokens)], tokens[right % len(tokens)])
        if pair not in merges:
            merges.append(pair)
            tokens.append("".join(pair))
    if order.random() < 0.3:
        order.shuffle(merges)
    folder = tmp_path_factory.mktemp("merges")
    theirs = written(folder, merges, whole_pieces=order.random() < 0.5)
    try:
        ours = BPETokenizer.from_pretrained(folder)
    except UnsupportedTokenizerError:
        return
    for word in words:
        assert ours.encode(word, add_special_tokens=False) == theirs.encode(word).ids


def test_merges_that_ranks_cannot_express(tmp_path):
    # "bc" joins before "ab", so "ab" + "c" never happens, and "a" + "bc", which tiktoken would join, is not
    # listed.
    written(tmp_path, [("b", "c"), ("a", "b"), ("ab", "c")])
    ours = BPETokenizer.from_pretrained(tmp_path)
    assert len(ours.encode("abc", add_special_tokens=False)) == 2
    # Listed before its right part is: whatever is to its left joins first.
    written(tmp_path, [("a", "bc"), ("b", "c")])
    with pytest.raises(FormatError, match="order that tiktoken"):
        BPETokenizer.from_pretrained(tmp_path)


HOSTILE = {
    "nested": ("[" * 100_000, "not valid JSON"),
    "many digits": ('{"model": {"vocab": {"a": ' + "9" * 5000 + "}}}", "not valid JSON"),
    "no object": ("[1]", "JSON object"),
    "nothing": ("{}", "byte-level BPE, or is damaged"),
    "vocabulary of lists": (
        '{"pre_tokenizer": {"type": "ByteLevel"}, "model": {"vocab": [1, 2], "merges": []}}',
        "damaged",
    ),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files_are_refused(name, tmp_path):
    text, message = HOSTILE[name]
    (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(FormatError, match=message):
        BPETokenizer.from_pretrained(tmp_path)
    with pytest.raises(FormatError):
        HFTokenizer.from_pretrained(tmp_path)
    with pytest.raises(FormatError):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("change_ids", "message"),
    [
        (lambda vocab: vocab.update({"!": 2}), "not consecutive"),
        (lambda vocab: vocab.update({"!": -1}), "not consecutive"),
        (lambda vocab: vocab.update({"!": 10**9}), "not consecutive"),
        (lambda vocab: vocab.update({"!": 1.0}), "the id of '!' is 1.0"),
        (lambda vocab: vocab.update({"!": "x"}), "the id of '!' is 'x'"),
        (lambda vocab: vocab.update({"": len(vocab)}), "the id of ''"),
        (lambda vocab: vocab.update({"漢": len(vocab)}), "spells no byte"),
        (lambda vocab: vocab.update({"ab" * 9: vocab.pop("!")}), "lacks bytes: 0x21"),
    ],
)
def test_impossible_ids_are_refused(change_ids, message, tmp_path):
    content = json.loads(gpt2()[0])
    change_ids(content["model"]["vocab"])
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(FormatError, match=message):
        BPETokenizer.from_pretrained(tmp_path)


@pytest.mark.parametrize("merge", [["a"], ["a", "b", "c"], "ab", ["漢", "a"], ["¡", "÷"], 7])
def test_impossible_merges_are_refused(merge, tmp_path):
    content = json.loads(gpt2()[0])
    content["model"]["merges"].append(merge)
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(FormatError, match="damaged"):
        BPETokenizer.from_pretrained(tmp_path)


def test_two_ids_of_one_added_token_are_refused(tmp_path):
    content = json.loads(gpt2()[0])
    content["added_tokens"].append(content["added_tokens"][0] | {"id": 5})
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(FormatError, match="has the ids 0 and 5"):
        BPETokenizer.from_pretrained(tmp_path)


def test_a_file_of_a_gigabyte_is_not_read(tmp_path):
    with (tmp_path / "tokenizer.json").open("wb") as file:
        file.truncate(1 << 30)
    for kind in (BPETokenizer, HFTokenizer):
        with pytest.raises(FormatError, match="1,073,741,824 bytes"):
            kind.from_pretrained(tmp_path)


def test_version_1_is_read(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    config = json.loads(path.read_text())
    del config["llm_trainer_tokenizer"]
    path.write_text(json.dumps(config | {"llm_trainer_format_version": 1}))
    assert load_tokenizer(tmp_path).fingerprint() == tokenizer.fingerprint()
