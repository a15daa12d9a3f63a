import json
import time

import pandas as pd
import pytest

from tests.conftest import VOCAB_SIZE
from transact_core.base.errors import TransActError
from transact_core.base.files import sha256_of_text
from transact_core.data.corpus import corpus_from_text, read_corpus
from transact_core.data.windows import calibration_and_evaluation

ROWS = ["one fish", "two fish", "red fish"]


def windows(tokenizer, calibration, evaluation, tokens=(64, 64), length=16):
    return calibration_and_evaluation(
        calibration, evaluation, tokenizer, VOCAB_SIZE, *tokens, length
    )


def write_json_lines(path):
    path.write_text("\n".join(json.dumps({"id": 1, "text": row}) for row in ROWS))


def write_parquet(path):
    pd.DataFrame({"id": range(3), "text": ROWS}).to_parquet(path)


@pytest.mark.parametrize(
    ("name", "write"), [("rows.jsonl", write_json_lines), ("rows.parquet", write_parquet)]
)
def test_tables_are_joined_by_blank_lines(tmp_path, name, write):
    write(tmp_path / name)
    corpus = read_corpus(str(tmp_path / name))
    assert corpus.text == "one fish\n\ntwo fish\n\nred fish"
    assert corpus.sha256 == sha256_of_text(corpus.text)


def test_missing_texts_of_a_table_are_passed_over(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}\n{"text": null}\n{"text": "b"}')
    pd.DataFrame({"text": ["a", None, "b"]}).to_parquet(tmp_path / "rows.parquet")
    for name in ("rows.jsonl", "rows.parquet"):
        assert read_corpus(str(tmp_path / name)).text == "a\n\nb"


def test_a_column_of_numbers_is_refused(tmp_path):
    pd.DataFrame({"text": [1, 2]}).to_parquet(tmp_path / "rows.parquet")
    with pytest.raises(TransActError, match="holds int where text is expected"):
        read_corpus(str(tmp_path / "rows.parquet"))


def test_the_builtin_text_is_there():
    assert len(read_corpus("builtin").text) > 100_000


def test_long_texts_are_cut_and_that_is_said(monkeypatch):
    monkeypatch.setattr("transact_core.data.corpus.MAX_CHARACTERS", 10)
    corpus = corpus_from_text("long", "0123456789abc")
    assert corpus.text == "0123456789"
    assert "first 10 characters" in corpus.notices[0]


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("empty.txt", b"", "empty"),
        ("blank.txt", b" \n\n ", "empty"),
        ("zeros.txt", b"ab\0cd", "binary"),
        ("latin.txt", "caf\u00e9 society".encode("latin-1"), "UTF-8"),
        ("table.csv", b"a,b", "none of"),
        ("rows.jsonl", b'{"text": "a"}\n{oops', "Line 2"),
        ("rows.jsonl", b"[1, 2]", "neither text nor an object"),
        ("rows.jsonl", b'{"body": "a"}', "no column"),
        ("rows.jsonl", b'{"text": 3}', "Line 1 .* holds int where text is expected"),
        ("rows.jsonl", b'{"text": "\\ud800"}', "surrogate"),
        ("end.txt", "it ends in caf\u00e9".encode("latin-1"), "not UTF-8"),
        ("rows.parquet", b"PAR1 but not really", "not a Parquet"),
    ],
)
def test_unusable_text_is_refused(tmp_path, name, content, complaint):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(TransActError, match=complaint):
        read_corpus(str(path))


def test_a_missing_file_is_refused():
    with pytest.raises(TransActError, match="There is no text"):
        read_corpus("no/such/file.txt")


def test_a_hub_dataset_without_network_is_refused(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    started = time.monotonic()
    with pytest.raises(TransActError, match="could not be read from the hub"):
        read_corpus("hub:nobody/nothing:config:test:text")
    assert time.monotonic() - started < 10


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
    corpus = read_corpus("builtin")
    with pytest.raises(TransActError, match="do not belong together"):
        calibration_and_evaluation(corpus, corpus, tokenizer, 100, 64, 64, 16)
