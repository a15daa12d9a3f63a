import pytest

from transact_core.base.errors import TransActError
from transact_core.data.corpus import corpus_from_text, read_corpus
from transact_core.data.own_text import (
    CHOICES,
    CONTEXT_WORDS,
    CONTINUATION_WORDS,
    OWN_TEXT_TASKS,
    own_text_rows,
)


@pytest.fixture(scope="module")
def corpus():
    return read_corpus("builtin")


@pytest.mark.parametrize("kind", OWN_TEXT_TASKS)
def test_questions_depend_on_text_and_seed_alone(kind, corpus):
    rows = own_text_rows(kind, corpus, 0)
    assert rows == own_text_rows(kind, corpus, 0)
    assert (rows == own_text_rows(kind, corpus, 1)) == (kind == "last_word")
    assert len(rows) > 500


def test_the_true_continuation_is_the_one_that_follows_in_the_text(corpus):
    flat = " ".join(corpus.text.split())
    rows = own_text_rows("continuation", corpus, 0)
    answers = [0] * CHOICES
    for row in rows:
        continuations, answer = row["continuations"], row["answer"]
        assert f"{row['context']} {continuations[answer]}" in flat
        assert len(row["context"].split()) == CONTEXT_WORDS
        assert len(set(continuations)) == CHOICES
        for continuation in continuations:
            assert len(continuation.split()) == CONTINUATION_WORDS
            assert continuation in flat
        answers[answer] += 1
    assert min(answers) > len(rows) / CHOICES * 0.8


def test_the_last_word_ends_a_sentence_of_the_text(corpus):
    flat = " ".join(corpus.text.split())
    for row in own_text_rows("last_word", corpus, 0):
        start = flat.index(f"{row['context']} {row['word']}")
        assert flat[start + len(row["context"]) + 1 + len(row["word"])] in ".!?"


@pytest.mark.parametrize("kind", OWN_TEXT_TASKS)
def test_the_first_half_is_left_to_calibration_and_evaluation(kind):
    sentence = "{} and eleven other words stand here so that {} is asked for {}.\n"
    halves = [
        "".join(sentence.format(word.title(), number, word) for number in range(100))
        for word in ("first", "second")
    ]
    rows = own_text_rows(kind, corpus_from_text("text", "".join(halves)), 0)
    assert "second" in str(rows)
    assert "first" not in str(rows)


@pytest.mark.parametrize("kind", OWN_TEXT_TASKS)
def test_a_short_text_is_refused(kind):
    with pytest.raises(TransActError, match="name a longer text"):
        own_text_rows(kind, corpus_from_text("note.txt", "Only a few words. " * 10), 0)
