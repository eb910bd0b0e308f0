import json
import re

import pytest
import tiktoken
from hypothesis import given, settings
from hypothesis import strategies as st
from llm_trainer.exceptions import FormatError, TokenizerError
from llm_trainer.tokenizer import BPETokenizer, _long_blanks
from transformers import PreTrainedTokenizerFast

AWKWARD = st.lists(
    st.one_of(
        st.text(max_size=20),
        st.sampled_from(["<|bos|>", "<|eos|>", "<|pad|>", "\r\n", "  \t ", "'LL", "'ſ", "123456", "é",
        "👩‍👩‍👧", "\x85", "\u180e"]),
        st.sampled_from(["def function_3(value):", "    return value", "# the first function"]),
    )
).map("".join)  # fmt: skip


@settings(max_examples=200, deadline=None)
@given(text=AWKWARD)
def test_every_text_comes_back(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert ids[0] == tokenizer.bos_token_id
    # Text that spells a special token does not become one.
    assert max(ids[1:], default=0) < tokenizer.vocab_size - 3


@pytest.fixture(scope="module")
def fast(tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save_pretrained(folder)
    return PreTrainedTokenizerFast.from_pretrained(folder)


@settings(max_examples=200, deadline=None)
@given(text=AWKWARD)
def test_transformers_reads_the_same_ids(tokenizer, fast, text):
    assert fast(text, split_special_tokens=True)["input_ids"] == tokenizer.encode(text)


BLANKS = st.lists(
    st.sampled_from(
        [" ", "  ", "   ", "\n", "\r\n", "\t", "\x1c", "\x85", "\u3000", "a", "7", "!", "'s", "é", "_"]
    ),
    max_size=12,
).map("".join)


@settings(max_examples=300, deadline=None)
@given(text=BLANKS)
def test_cutting_around_blanks_changes_no_id(tokenizer, text):
    ranks = tokenizer._model.ranks
    whole = tiktoken.Encoding("whole", pat_str="(?s:.+)", mergeable_ranks=ranks, special_tokens={})
    with pytest.MonkeyPatch.context() as patch:
        pattern = _long_blanks._LONG_RUN.pattern.replace("1024", "2")
        patch.setattr(_long_blanks, "_LONG_RUN", re.compile(pattern))
        parts = list(_long_blanks.cut_around_long_blanks(text))
    ids = [
        token
        for part, is_piece in parts
        for token in (whole if is_piece else tokenizer._encoding).encode(part, disallowed_special=())
    ]
    assert ids == tokenizer.encode(text, add_special_tokens=False)


@pytest.mark.parametrize("blank", [" ", "\t", "\n"])
def test_a_million_blanks_come_back(tokenizer, blank):
    run = blank * 1_000_000
    for text in (run, f"value{run}return", f"value!\n{run}\n 7"):
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_transformers_reads_the_same_special_tokens(tokenizer, fast):
    assert fast.bos_token_id == tokenizer.bos_token_id
    assert fast.eos_token_id == tokenizer.eos_token_id
    assert fast.pad_token_id == tokenizer.pad_token_id
    assert len(fast) == tokenizer.vocab_size
    assert fast.get_vocab() == tokenizer.vocab
    assert fast.decode(tokenizer.encode("the value"), skip_special_tokens=True) == "the value"


def test_merges_follow_frequency():
    # "ab" is the commonest pair, then "ab" + "c" the commonest of what remains.
    tokenizer = BPETokenizer()
    tokenizer.train(["abc\nabc\nabc\nab"], vocab_size=256 + 3 + 2)
    assert tokenizer.encode("abc", add_special_tokens=False) == [257]
    assert tokenizer.encode("ab", add_special_tokens=False) == [256]
    assert tokenizer.encode("c", add_special_tokens=False) == [ord("c")]
    assert tokenizer.get_vocab_stats()["num_merges"] == 2


def test_saving_and_loading(tokenizer, tmp_path, corpus):
    tokenizer.save_pretrained(tmp_path)
    loaded = BPETokenizer.from_pretrained(tmp_path)
    assert loaded.vocab == tokenizer.vocab
    assert loaded.special_tokens == ["<|bos|>", "<|eos|>", "<|pad|>"]
    assert [loaded.encode(text) for text in corpus] == tokenizer.encode_batch(corpus)


def test_sizes(tokenizer):
    stats = tokenizer.get_vocab_stats()
    assert stats["vocab_size"] == tokenizer.vocab_size == len(tokenizer.vocab) == 320
    assert stats["num_bytes"] + stats["num_merges"] + stats["num_special_tokens"] == 320
    lengths = tokenizer.token_byte_lengths()
    text = "def function_3(value): é"
    assert lengths[tokenizer.encode(text)].sum() == len(text.encode())


def test_bad_encoding_input(tokenizer):
    with pytest.raises(TokenizerError, match=r"U\+D800.*position 1"):
        tokenizer.encode("a\ud800")
    with pytest.raises(TokenizerError, match="one string"):
        tokenizer.encode_batch("abc")
    with pytest.raises(TokenizerError, match="not a NoneType"):
        tokenizer.encode(None)
    with pytest.raises(TokenizerError, match="Token id 320"):
        tokenizer.decode([320])


def test_a_cut_character_is_replaced(tokenizer):
    assert tokenizer.decode(tokenizer.encode("é", add_special_tokens=False)[:1]) == "�"


def test_damaged_files_are_refused(tokenizer, tmp_path):
    with pytest.raises(FormatError, match="does not exist"):
        BPETokenizer.from_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    path, config = tmp_path / "tokenizer.json", tmp_path / "tokenizer_config.json"
    good, good_config = path.read_text(), config.read_text()

    config.write_text(good_config.replace('version": 2', 'version": 3'))
    with pytest.raises(FormatError, match=r"version 3.*upgrade"):
        BPETokenizer.from_pretrained(tmp_path)
    config.write_text(good_config)

    path.write_text(good[: len(good) // 2])
    with pytest.raises(FormatError, match="not valid JSON"):
        BPETokenizer.from_pretrained(tmp_path)

    content = json.loads(good)
    del content["model"]["vocab"]["a"]
    path.write_text(json.dumps(content))
    with pytest.raises(FormatError, match="not consecutive"):
        BPETokenizer.from_pretrained(tmp_path)
