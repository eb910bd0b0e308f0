import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from llm_trainer.data import LanguageModelingDataset
from llm_trainer.data._packing import best_fit, concatenate, one_document_a_row
from llm_trainer.exceptions import ConfigurationError

FORMS = [best_fit, concatenate, one_document_a_row]
documents = st.lists(st.integers(1, 40), min_size=1, max_size=60)


def offsets_of(lengths):
    return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)


def rows_of(layout):
    return [
        [
            (int(layout.starts[piece]), int(layout.lengths[piece]))
            for piece in range(layout.firsts[row], layout.firsts[row + 1])
        ]
        for row in range(len(layout.firsts) - 1)
    ]


@pytest.mark.parametrize("form", FORMS)
@given(lengths=documents, max_length=st.integers(2, 17))
@settings(max_examples=200, deadline=None)
def test_every_token_is_in_one_row_and_no_piece_spans_documents(form, lengths, max_length):
    offsets = offsets_of(lengths)
    rows = rows_of(form(offsets, max_length))
    tokens = [token for row in rows for start, length in row for token in range(start, start + length)]
    assert sorted(tokens) == list(range(sum(lengths)))
    document_of = np.repeat(np.arange(len(lengths)), lengths)
    for row in rows:
        assert 0 < sum(length for _, length in row) <= max_length
        for start, length in row:
            assert len(set(document_of[start : start + length])) == 1


def naive_best_fit(lengths, max_length):
    """Best-fit decreasing as the textbook has it: one piece at a time, every open row looked at."""
    pieces = []
    for length in lengths:
        pieces += [max_length] * (length // max_length) + [length % max_length] * (length % max_length > 0)
    room, rows = [], []
    for piece in sorted(pieces, reverse=True):
        fitting = [row for row in range(len(rows)) if room[row] >= piece]
        if not fitting:
            rows.append([])
            room.append(max_length)
            fitting = [len(rows) - 1]
        best = min(fitting, key=lambda row: room[row])
        rows[best].append(piece)
        room[best] -= piece
    return sorted(map(sum, rows))


@given(lengths=documents, max_length=st.integers(2, 17))
@settings(max_examples=300, deadline=None)
def test_best_fit_is_the_textbooks(lengths, max_length):
    rows = rows_of(best_fit(offsets_of(lengths), max_length))
    # Which of two rows of equal room takes a piece is a matter of taste; how full all rows get is not.
    assert sorted(sum(length for _, length in row) for row in rows) == naive_best_fit(lengths, max_length)


def test_best_fit_by_hand():
    # Rows of 10: the 13 becomes a full row and a rest of 3; 7 takes the rest (3), 6 takes 4, 5 takes 5.
    offsets = offsets_of([5, 13, 6, 4, 7, 5])
    layout = best_fit(offsets, 10)
    assert sorted(rows_of(layout)) == [
        [(0, 5), (35, 5)],
        [(5, 10)],
        [(18, 6), (24, 4)],
        [(28, 7), (15, 3)],
    ]
    again = best_fit(offsets, 10)
    assert np.array_equal(layout.starts, again.starts)
    assert np.array_equal(layout.firsts, again.firsts)


def test_many_documents_fill_rows():
    lengths = np.random.default_rng(0).lognormal(5, 1.2, 100_000).astype(np.int64) + 1
    layout = best_fit(offsets_of(lengths), 1024)
    assert lengths.sum() / (1024 * (len(layout.firsts) - 1)) > 0.99


class Letters:
    """A tokenizer whose ids are code points, so that rows can be read."""

    vocab_size, bos_token_id, eos_token_id, pad_token_id = 128, ord("<"), ord(">"), ord("_")

    def encode_ordinary(self, text):
        return np.frombuffer(text.encode(), dtype=np.uint8).astype(np.uint32)

    def fingerprint(self):
        return "letters"


def test_a_best_fit_row_by_hand():
    dataset = LanguageModelingDataset(["abcdef", "xy", "z"], Letters(), max_length=7)
    rows = {"".join(map(chr, row["input_ids"].tolist())): row for row in dataset}
    # The rest of the first document is ">"; <xy> and <z> are whole.
    assert rows.keys() == {"<abcdef", "<xy><z>", ">______"}
    first = rows["<abcdef"]
    assert first["attention_mask"].tolist() == [1] * 7
    assert first["labels"].tolist() == [-100, *map(ord, "abcdef")]
    second = rows["<xy><z>"]
    assert second["attention_mask"].tolist() == [1, 1, 1, 1, 2, 2, 2]
    assert second["labels"].tolist() == [-100, *map(ord, "xy>"), -100, *map(ord, "z>")]
    assert dataset.get_stats()["num_cut_documents"] == 1
    assert dataset.get_stats()["fill"] == 15 / 21


def test_a_rest_behind_another_document_is_not_predicted_from_it():
    dataset = LanguageModelingDataset(["abcdefgh", "xy"], Letters(), max_length=7)
    rows = {"".join(map(chr, row["input_ids"].tolist())): row for row in dataset}
    row = rows["<xy>gh>"]
    assert row["labels"].tolist() == [-100, *map(ord, "xy>"), -100, *map(ord, "h>")]
    assert row["attention_mask"].tolist() == [1, 1, 1, 1, 2, 2, 2]


@pytest.mark.parametrize("packing", ["best_fit", "concatenate"])
@pytest.mark.parametrize("packed", [True, False])
def test_several_rows_at_once_are_those_rows(tokenizer, corpus, packing, packed):
    dataset = LanguageModelingDataset(corpus, tokenizer, 16, packed, packing=packing)
    chosen = [3, 0, -1, len(dataset) // 2, 3]
    for together, alone in zip(
        dataset.__getitems__(chosen), (dataset[index] for index in chosen), strict=True
    ):
        assert together.keys() == alone.keys()
        for name in together:
            assert torch.equal(together[name], alone[name])
    assert dataset.__getitems__([]) == []
    with pytest.raises(IndexError):
        dataset.__getitems__([0, len(dataset)])


def test_fingerprints_tell_forms_apart(tokenizer, corpus):
    def fingerprint(texts=corpus, **changes):
        return LanguageModelingDataset(texts, tokenizer, **({"max_length": 16} | changes)).fingerprint()

    different = [
        fingerprint(),
        fingerprint(max_length=17),
        fingerprint(packing="concatenate"),
        fingerprint(pack_sequences=False),
        fingerprint(corpus[1:]),
        # The same tokens, cut into documents elsewhere.
        fingerprint(["ab", "c"]),
        fingerprint(["a", "bc"]),
    ]
    assert len(set(different)) == len(different)
    assert fingerprint() == different[0]


def test_an_unknown_packing_is_refused(tokenizer):
    with pytest.raises(ConfigurationError, match="best_fit"):
        LanguageModelingDataset(["text"], tokenizer, packing="tight")
