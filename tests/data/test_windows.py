from dataclasses import replace

import pytest
from transformers import LlamaConfig

from tests.conftest import VOCAB_SIZE
from transact_core.base.errors import TransActError
from transact_core.data.corpus import corpus_from_text, read_corpus
from transact_core.data.windows import (
    WindowSpec,
    context_length_of,
    evaluation_windows,
    make_windows,
    read_texts,
    tokenise,
)


def windows(tokenizer, calibration, evaluation, tokens=(64, 64), length=16, vocab_size=VOCAB_SIZE):
    spec = WindowSpec("", "", *tokens, length)
    return make_windows(spec, tokenizer, vocab_size, texts=(calibration, evaluation))


def test_one_text_gives_evaluation_the_beginning_and_calibration_the_rest(tokenizer):
    corpus = corpus_from_text("text", read_corpus("builtin").text[:5000])
    calibration, evaluation = windows(tokenizer, corpus, corpus, (40, 50))
    ids = tokenizer(corpus.text)["input_ids"]
    assert evaluation.ids.flatten().tolist() == ids[:48]
    assert calibration.ids.flatten().tolist() == ids[48:80]
    assert (evaluation.tokens, calibration.tokens) == (48, 32)


def test_two_texts_are_each_taken_from_the_beginning(tokenizer):
    text = read_corpus("builtin").text
    one, other = corpus_from_text("one", text[:3000]), corpus_from_text("other", text[3000:6000])
    calibration, evaluation = windows(tokenizer, one, other)
    assert calibration.ids.flatten().tolist() == tokenizer(one.text)["input_ids"][:64]
    assert evaluation.ids.flatten().tolist() == tokenizer(other.text)["input_ids"][:64]


def test_fewer_tokens_than_asked_are_used_and_that_is_said(tokenizer):
    corpus = corpus_from_text("short", read_corpus("builtin").text[:400])
    calibration, evaluation = windows(tokenizer, corpus, corpus, (100_000, 16))
    assert 0 < calibration.tokens < 100_000
    assert "where 100,000 were asked" in calibration.notices[0]
    assert evaluation.notices == ()


@pytest.mark.parametrize(
    ("tokens", "length", "complaint"),
    [
        ((64, 64), 5000, "fewer than one window"),
        ((64, 4000), 32, "calibration|gives .* tokens here"),
        ((64, 64), 1, "at least 2"),
    ],
)
def test_text_that_fills_no_window_is_refused(tokenizer, tokens, length, complaint):
    corpus = corpus_from_text("short", read_corpus("builtin").text[:400])
    with pytest.raises(TransActError, match=complaint):
        windows(tokenizer, corpus, corpus, tokens, length)


def test_a_tokenizer_of_another_model_is_refused(tokenizer):
    text = corpus_from_text("text", read_corpus("builtin").text[:3000])
    with pytest.raises(TransActError, match="do not belong together"):
        windows(tokenizer, text, text, vocab_size=100)


def test_a_specification_reads_its_own_texts(tokenizer, tmp_path):
    texts = {name: read_corpus("builtin").text[at : at + 3000] for at, name in enumerate("ab")}
    for name, text in texts.items():
        (tmp_path / f"{name}.txt").write_text(text)
    spec = WindowSpec(str(tmp_path / "a.txt"), str(tmp_path / "b.txt"), 64, 48, 16)
    calibration, evaluation = make_windows(spec, tokenizer, VOCAB_SIZE)
    assert calibration.ids.flatten().tolist() == tokenizer(texts["a"])["input_ids"][:64]
    assert evaluation.ids.flatten().tolist() == tokenizer(texts["b"])["input_ids"][:48]


# --- the model's context ----------------------------------------------------------------------


def test_windows_beyond_the_context_are_said_to_be(tokenizer):
    spec = WindowSpec(calibration_tokens=64, evaluation_tokens=64, sequence_length=16)
    text = corpus_from_text("text", read_corpus("builtin").text[:3000])
    for context_length, said in ((16, False), (15, True)):
        for found in make_windows(spec, tokenizer, VOCAB_SIZE, context_length, (text, text)):
            assert ("longer than the 15 that the model was" in "".join(found.notices)) == said
    alone = evaluation_windows(text, tokenizer, VOCAB_SIZE, 64, 16, 15)
    assert "longer than the 15" in alone.notices[0]


@pytest.mark.parametrize(
    ("rope", "length"),
    [
        ({"rope_type": "default"}, 64),
        ({"rope_type": "linear", "factor": 4.0}, 256),
        ({"rope_type": "dynamic", "factor": 2.0}, 128),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}, 256),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}, 64),
        (
            {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8,
            },
            64,
        ),
    ],
)
def test_the_context_counts_what_the_frequencies_were_stretched_to(rope, length):
    config = LlamaConfig(max_position_embeddings=64, rope_parameters={"rope_theta": 1e4, **rope})
    assert context_length_of(config) == length


def test_calibration_shares_no_token_with_any_text_that_is_evaluated_on(tokenizer, tmp_path):
    text = read_corpus("builtin").text
    for name, part in (("a", text[:4000]), ("b", text[4000:8000])):
        (tmp_path / f"{name}.txt").write_text(part)
    a, b = (str(tmp_path / f"{name}.txt") for name in "ab")
    spec = WindowSpec(b, a, 64, 48, 16, (b, "builtin"))
    calibration, evaluation, *others = make_windows(spec, tokenizer, VOCAB_SIZE)
    assert [windows.source for windows in (evaluation, *others)] == [a, b, "builtin"]
    assert [windows.tokens for windows in (evaluation, *others)] == [48] * 3
    whole = tokenise(read_corpus(b), tokenizer, VOCAB_SIZE)
    assert others[0].ids.flatten().tolist() == whole[:48].tolist()
    assert calibration.ids.flatten().tolist() == whole[48:112].tolist()
    with pytest.raises(TransActError, match="named once"):
        read_texts(replace(spec, others=(b, a)))
