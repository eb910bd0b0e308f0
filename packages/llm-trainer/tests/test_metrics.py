import math

import pytest
import sacrebleu
import torch
from hypothesis import given
from hypothesis import strategies as st
from llm_trainer.data import LanguageModelingDataset, create_dataloader
from llm_trainer.exceptions import ConfigurationError, DataError, ModelInputError
from llm_trainer.utils.metrics import (
    bits_per_byte,
    compute_bleu_score,
    compute_diversity_metrics,
    compute_perplexity,
    compute_repetition_metrics,
    evaluate_generation_quality,
)

SENTENCES = [
    "The quick brown fox jumps over the lazy dog.",
    "It is raining, and the dog (a lazy one) sleeps on the mat.",
    "Rain falls mainly on the plain; the fox is quick.",
]
OTHERS = [
    "A quick brown fox jumped over the lazy dog.",
    "It rains, and a lazy dog sleeps on the mat.",
    "In the plain the rain falls mainly, said the quick fox.",
]


# BLEU


def test_bleu_by_hand():
    # Found in the reference: 5 of 6 words, 3 of 5 pairs, 2 of 4 triples, 1 of 3 quadruples; equal lengths.
    found = compute_bleu_score(["the cat sat on the mat"], ["the cat sat on a mat"])
    assert found == pytest.approx(100 * (5 / 6 * 3 / 5 * 2 / 4 * 1 / 3) ** 0.25)
    # Every n-gram is found, but 4 words stand for 6.
    found = compute_bleu_score(["the cat sat on"], ["the cat sat on the mat"])
    assert found == pytest.approx(100 * math.exp(1 - 6 / 4))


def test_bleu_is_of_the_corpus_and_not_a_mean():
    # 1 of 5 and 5 of 5 words make 6 of 10, and so for all n-grams; unlike the mean of the two scores.
    texts, references = ["a v w x y", "f g h i j"], ["a b c d e", "f g h i j"]
    expected = 100 * (6 / 10 * 4 / 8 * 3 / 6 * 2 / 4) ** 0.25
    assert compute_bleu_score(texts, references) == pytest.approx(expected)


def test_bleu_takes_several_references_of_each_text():
    # Words 6 of 6, pairs 4 of 5, triples 2 of 4, quadruples 0 of 3, which smoothing takes as one half.
    texts = ["the cat sat on the mat"]
    assert compute_bleu_score(texts, [["the cat lay on the mat", "the cat sat by the mat"]]) == pytest.approx(
        100 * (6 / 6 * 4 / 5 * 2 / 4 * 0.5 / 3) ** 0.25
    )
    # A text with fewer references than another.
    assert compute_bleu_score([*texts, "x y z w"], [["no", *texts], "x y z w"]) == pytest.approx(100)


def test_bleu_is_sacrebleus():
    assert compute_bleu_score(SENTENCES, OTHERS) == sacrebleu.corpus_bleu(SENTENCES, [OTHERS]).score
    both = [[first, second] for first, second in zip(OTHERS, reversed(SENTENCES), strict=True)]
    streams = [OTHERS, list(reversed(SENTENCES))]
    options = {"lowercase": True, "tokenize": "intl", "smooth_method": "floor"}
    expected = sacrebleu.corpus_bleu(SENTENCES, streams, **options).score
    assert compute_bleu_score(SENTENCES, both, **options) == expected
    assert expected != compute_bleu_score(SENTENCES, both)


def test_bleu_of_nothing_and_of_everything():
    assert compute_bleu_score(SENTENCES, SENTENCES) == pytest.approx(100)
    assert compute_bleu_score(["", ""], ["", "a"]) == 0
    assert compute_bleu_score(["word"], ["word"]) == 0
    assert compute_bleu_score(["word"], ["word"], effective_order=True) == pytest.approx(100)
    assert compute_bleu_score(["猫が座った", "\ud800 é"], ["猫が座った", "\ud800 é"], tokenize="char") > 99


@pytest.mark.parametrize(
    ("predictions", "references", "message"),
    [
        ([], [], "predictions is empty"),
        (["a"], [], "1 predictions and 0 references"),
        (["a"], ["a", "b"], "1 predictions and 2 references"),
        ("a", ["a"], "one string"),
        (["a"], "a", "one string"),
        (["a", None], ["a", "b"], r"predictions\[1\] is a NoneType"),
        (["a"], [3], r"references\[0\] is a int"),
        (["a"], [[]], r"references\[0\] is empty"),
        (["a"], [["a", 3]], r"references\[0\]\[1\] is a int"),
    ],
)
def test_what_bleu_refuses(predictions, references, message):
    with pytest.raises(DataError, match=message):
        compute_bleu_score(predictions, references)


def test_options_that_bleu_does_not_have():
    with pytest.raises(ConfigurationError, match=r"'lower'.*lowercase"):
        compute_bleu_score(["a"], ["a"], lower=True)
    with pytest.raises(ConfigurationError, match="tokenize"):
        compute_bleu_score(["a"], ["a"], tokenize="none of them")
    with pytest.raises(ConfigurationError, match="cannot be computed"):
        compute_bleu_score(["a"], ["a"], smooth_method="none of them")


# Variety


def test_distinct_by_hand():
    found = compute_diversity_metrics(["a b a b", "a c"])
    # Words: a b a b a c; pairs: ab ba ab, ac; triples: aba bab.
    assert found == {"distinct_1": 3 / 6, "distinct_2": 3 / 4, "distinct_3": 2 / 2}
    assert compute_diversity_metrics(["", " \n"]) == {"distinct_1": 0, "distinct_2": 0, "distinct_3": 0}
    assert compute_diversity_metrics(["one"]) == {"distinct_1": 1, "distinct_2": 0, "distinct_3": 0}


def test_words_are_cut_at_unicodes_blanks_and_normalised():
    # An ideographic space, a no-break space, and one word in two spellings.
    assert compute_diversity_metrics(["é\u3000e\u0301\u00a0猫"])["distinct_1"] == 2 / 3
    assert compute_diversity_metrics(["end. end"])["distinct_1"] == 1


def test_self_bleu():
    texts = ["a b c d e", "a b c d f", "p q r s t"]
    expected = [
        sacrebleu.sentence_bleu(text, [other for other in texts if other is not text]).score for text in texts
    ]
    found = compute_diversity_metrics(texts, self_bleu=True)["self_bleu"]
    assert found == pytest.approx(sum(expected) / 3)
    assert compute_diversity_metrics(["same old song here"] * 3, self_bleu=True)["self_bleu"] > 99
    with pytest.raises(DataError, match="at least two"):
        compute_diversity_metrics(["alone"], self_bleu=True)


# Repetition


def test_repetition_by_hand():
    found = compute_repetition_metrics(["a b a b a", "c d"])
    # Pairs: ab ba ab ba, and cd: 2 of 4 and 1 of 1 differ. Triples: aba bab aba. Quadruples: abab baba.
    assert found == {
        "seq_rep_2": pytest.approx((1 / 2 + 0) / 2),
        "repeated_2": pytest.approx(4 / 5),
        "seq_rep_3": pytest.approx(1 / 3),
        "repeated_3": pytest.approx(2 / 3),
        "seq_rep_4": 0.0,
        "repeated_4": 0.0,
        "longest_loop_words": 4.0,
        "most_repeats": 2.0,
    }


@pytest.mark.parametrize(
    ("text", "words", "repeats"),
    [
        ("so it goes so it goes on", 6, 2),
        ("no no no no", 4, 4),
        ("x no no no y", 3, 3),
        ("a b c d", 0, 1),
        ("a b a", 0, 1),
        ("word", 0, 1),
        ("", 0, 0),
        # Ten of one word, then a longer unit twice: more words, fewer repeats.
        ("n " * 10 + "a b c d e f " * 2, 12, 10),
    ],
)
def test_loops_by_hand(text, words, repeats):
    found = compute_repetition_metrics([text])
    assert (found["longest_loop_words"], found["most_repeats"]) == (words, repeats)


@given(st.lists(st.sampled_from("abc"), max_size=24))
def test_loops_by_trying_all(words):
    longest, most = 0, min(len(words), 1)
    for start in range(len(words)):
        for unit in range(1, len(words) - start + 1):
            times = 1
            while words[start + times * unit :][:unit] == words[start : start + unit]:
                times += 1
            most = max(most, times)
            if times > 1:
                longest = max(longest, times * unit)
    found = compute_repetition_metrics([" ".join(words)])
    assert (found["longest_loop_words"], found["most_repeats"]) == (longest, most)


@pytest.mark.parametrize("function", [compute_diversity_metrics, compute_repetition_metrics])
def test_what_is_no_list_of_texts(function):
    with pytest.raises(DataError, match="give at least one"):
        function([])
    with pytest.raises(DataError, match=r"\[text\]"):
        function("one text")
    with pytest.raises(DataError, match=r"texts\[1\] is a bytes"):
        function(["a", b"b"])


# All together


def test_quality_holds_every_measure():
    found = evaluate_generation_quality(SENTENCES, OTHERS)
    assert found == evaluate_generation_quality(generated_texts=SENTENCES, reference_texts=OTHERS)
    expected = {
        "num_texts": 3,
        "mean_words": (9 + 13 + 10) / 3,
        "empty_share": 0,
        "bleu": sacrebleu.corpus_bleu(SENTENCES, [OTHERS]).score,
        "chrf": sacrebleu.corpus_chrf(SENTENCES, [OTHERS]).score,
    }
    expected |= compute_diversity_metrics(SENTENCES) | compute_repetition_metrics(SENTENCES)
    ratio = found.pop("length_ratio")
    assert found == pytest.approx(expected)
    assert ratio == pytest.approx(sum(map(tokens_13a, SENTENCES)) / sum(map(tokens_13a, OTHERS)))
    alone = evaluate_generation_quality(iter(["", "a a"]))
    assert (alone["empty_share"], alone["mean_words"]) == (0.5, 1.0)
    assert "bleu" not in alone
    with pytest.raises(DataError, match="3 predictions and 2 references"):
        evaluate_generation_quality(SENTENCES, OTHERS[:2])


def tokens_13a(text: str) -> int:
    """Words and marks of punctuation; enough for `SENTENCES` and `OTHERS`."""
    return len(text.split()) + sum(text.count(mark) for mark in ".,;()")


# Likelihood


class Fixed(torch.nn.Module):
    """Gives every token of a row the loss that stands in the row's first place."""

    def forward(self, input_ids, attention_mask=None, labels=None, return_logits=True):
        counts = (labels[:, 1:] != -100).sum(1)
        loss = (input_ids[:, 0] * counts).sum() / counts.sum()
        return type("Output", (), {"loss": loss})


def test_perplexity_weighs_tokens_and_not_batches():
    batches = [
        {"input_ids": torch.tensor([[1, 0, 0, 0]]), "labels": torch.tensor([[1, 0, 0, 0]])},
        {"input_ids": torch.tensor([[5, 0]]), "labels": torch.tensor([[5, 0]])},
    ]
    assert compute_perplexity(Fixed(), batches, "cpu") == pytest.approx(math.exp((3 * 1 + 1 * 5) / 4))
    with pytest.raises(DataError, match="no token"):
        compute_perplexity(Fixed(), [], "cpu")


def test_rows_longer_than_the_model_are_refused(build):
    rows = torch.zeros(1, 25, dtype=torch.long)
    with pytest.raises(ModelInputError, match=r"25 tokens, more than max_seq_len \(24\)"):
        compute_perplexity(build(), [{"input_ids": rows, "labels": rows}], "cpu")


class Letters:
    """Ids 0 to 4 stand for 0 to 4 bytes."""

    def token_byte_lengths(self):
        return torch.arange(5).numpy()


def test_bits_per_byte_by_hand():
    # The first label of a row is not predicted, -100 is none: left are 2, 3 and 0, 4, 4.
    rows = [{"labels": torch.tensor([1, 2, -100, 3])}, {"labels": torch.tensor([4, 0, 4, 4])}]
    expected = 0.7 * 5 / (math.log(2) * 13)
    assert bits_per_byte(0.7, rows, Letters()) == pytest.approx(expected)
    batch = {"labels": torch.stack([row["labels"] for row in rows])}
    assert bits_per_byte(0.7, [batch], Letters()) == pytest.approx(expected)


@pytest.mark.parametrize("packed", [False, True])
def test_bits_per_byte_of_a_dataset(tokenizer, corpus, packed):
    # One row a document, or one of all documents: each token but the first of a document is predicted.
    data = LanguageModelingDataset(corpus[:6], tokenizer, max_length=1000, pack_sequences=packed)
    expected = sum(len(tokenizer.encode(text)) for text in corpus[:6]) / (
        math.log(2) * len("".join(corpus[:6]).encode())
    )
    assert bits_per_byte(1.0, data) == pytest.approx(expected)
    assert bits_per_byte(1.0, data, tokenizer) == pytest.approx(expected)
    loader = create_dataloader(data, batch_size=2, shuffle=False, num_workers=0)
    assert bits_per_byte(1.0, loader, tokenizer) == pytest.approx(expected)


def test_bits_per_byte_refuses():
    rows = [{"labels": torch.tensor([1, 0])}]
    with pytest.raises(DataError, match="no byte"):
        bits_per_byte(1.0, rows, Letters())
    with pytest.raises(DataError, match="tokenizer has 5"):
        bits_per_byte(1.0, [{"labels": torch.tensor([1, 5])}], Letters())
    with pytest.raises(DataError, match="give the tokenizer"):
        bits_per_byte(1.0, rows)
