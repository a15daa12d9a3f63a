import json
import time

import pandas as pd
import pytest

from transact_core.base.errors import TransActError
from transact_core.base.files import sha256_of_text
from transact_core.data import corpus as corpus_module
from transact_core.data.corpus import (
    BUILTIN_CODE,
    BUILTIN_TEXT,
    corpus_from_text,
    file_and_column,
    of_one_kind,
    read_corpus,
    short_name,
)

ROWS = ["one fish", "two fish", "red fish"]


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
        ("half.txt", b"\xef\xbb\xbfab\0cd", "binary"),
        ("wide.txt", "fish".encode("utf-16-le"), "UTF-16 without a byte-order mark"),
        ("pair.txt", b"\xff\xfe\x00\xd8a\x00", "is not UTF-16 text"),
        ("mark.txt", b"\xef\xbb\xbf\r\n", "empty"),
        ("rows.jsonl", b'{"text": "caf\xe9"}', "not UTF-8 text"),
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


@pytest.mark.parametrize("name", ["text.txt", "rows.jsonl"])
def test_a_file_that_may_not_be_read_is_refused(tmp_path, monkeypatch, name):
    def forbidden(path, *_, **__):
        raise PermissionError(13, "Permission denied", str(path))

    (tmp_path / name).write_text('"one fish"')
    monkeypatch.setattr("pathlib.Path.open", forbidden)
    with pytest.raises(TransActError, match="cannot be read: Permission denied"):
        read_corpus(str(tmp_path / name))


def test_a_missing_file_is_refused():
    with pytest.raises(TransActError, match="There is no text"):
        read_corpus("no/such/file.txt")


def test_a_hub_dataset_without_network_is_refused(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    started = time.monotonic()
    with pytest.raises(TransActError, match="could not be read from the hub"):
        read_corpus("hub:nobody/nothing:config:test:text")
    assert time.monotonic() - started < 10


# --- texts from Windows -----------------------------------------------------------------------

UNIX = "one fish\n\ntwo fish: \u00e9\n"
MARKED = ("utf-8-sig", "utf-16", "utf-32")


def encoded(text, encoding):
    """The text with a byte-order mark, in both orders where there are two."""
    if encoding == "utf-8-sig":
        return [text.encode(encoding)]
    little, big = f"{encoding}-le", f"{encoding}-be"
    return [("\ufeff" + text).encode(little), ("\ufeff" + text).encode(big)]


@pytest.mark.parametrize("suffix", [".txt", ".md"])
@pytest.mark.parametrize("line_end", ["\r\n", "\r"])
@pytest.mark.parametrize("encoding", MARKED)
def test_a_file_from_windows_is_the_same_text(tmp_path, suffix, line_end, encoding):
    path = tmp_path / f"text{suffix}"
    for content in encoded(UNIX.replace("\n", line_end), encoding):
        path.write_bytes(content)
        corpus = read_corpus(str(path))
        assert corpus.text == UNIX
        assert corpus.sha256 == sha256_of_text(UNIX)
        assert any("carriage returns" in notice for notice in corpus.notices)


def test_a_usual_file_has_no_notices(tmp_path):
    for encoding in ("utf-8", "utf-8-sig"):
        (tmp_path / "text.txt").write_bytes(UNIX.encode(encoding))
        corpus = read_corpus(str(tmp_path / "text.txt"))
        assert (corpus.text, corpus.notices) == (UNIX, ())


@pytest.mark.parametrize("line_end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("encoding", MARKED)
def test_json_lines_from_windows_are_the_same_text(tmp_path, line_end, encoding):
    lines = [json.dumps({"text": row.replace(" ", "\r\n")}) for row in ROWS]
    path = tmp_path / "rows.jsonl"
    for content in encoded(line_end.join(lines) + line_end, encoding):
        path.write_bytes(content)
        corpus = read_corpus(str(path))
        assert corpus.text == "one\nfish\n\ntwo\nfish\n\nred\nfish"
        assert "carriage returns" in corpus.notices[0]


def test_rows_of_parquet_from_windows_are_the_same_text(tmp_path):
    rows = ["\ufeffone\r\nfish", "\ufefftwo\rfish"]
    pd.DataFrame({"text": rows}).to_parquet(tmp_path / "rows.parquet")
    corpus = read_corpus(str(tmp_path / "rows.parquet"))
    assert corpus.text == "one\nfish\n\ntwo\nfish"
    assert "carriage returns" in corpus.notices[0]


def test_files_that_were_appended_to_each_other_leave_no_marks(tmp_path):
    path = tmp_path / "text.txt"
    path.write_bytes("one\r\n".encode("utf-8-sig") + "two\r\n".encode("utf-8-sig"))
    assert read_corpus(str(path)).text == "one\ntwo\n"


def test_a_text_of_two_characters_a_line_end_is_cut_where_others_are(tmp_path, monkeypatch):
    monkeypatch.setattr("transact_core.data.corpus.MAX_CHARACTERS", 10)
    for encoding in ("utf-8", "utf-16", "utf-32"):
        (tmp_path / "text.txt").write_bytes(("a" + "\r\n" * 50).encode(encoding))
        corpus = read_corpus(str(tmp_path / "text.txt"))
        assert corpus.text == "a" + "\n" * 9
        assert "first 10 characters" in corpus.notices[-1]


def test_a_character_cut_in_two_where_the_reading_stops_is_no_error(tmp_path, monkeypatch):
    monkeypatch.setattr("transact_core.data.corpus.MAX_CHARACTERS", 10)
    (tmp_path / "text.txt").write_bytes(("a" + "\u20ac" * 60).encode())
    assert read_corpus(str(tmp_path / "text.txt")).text == "a" + "\u20ac" * 9


# --- columns by name --------------------------------------------------------------------------


@pytest.fixture
def answers(tmp_path):
    """A function that writes rows of two columns as `.jsonl` or `.parquet`; gives the path."""

    def write(name):
        path = tmp_path / name
        rows = [{"text": "a", "answer": "one"}, {"text": "b", "answer": "two"}]
        if path.suffix == ".jsonl":
            path.write_text("\n".join(json.dumps(row) for row in rows))
        else:
            pd.DataFrame(rows).to_parquet(path)
        return path

    return write


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.parquet", "rows:of:mine.jsonl"])
def test_a_column_of_a_file_is_named_behind_a_colon(answers, name):
    path = answers(name)
    assert read_corpus(str(path)).text == "a\n\nb"
    corpus = read_corpus(f"{path}:answer")
    assert (corpus.text, corpus.source) == ("one\n\ntwo", f"{path}:answer")
    with pytest.raises(TransActError, match="has no column 'reply'; it has text, answer"):
        read_corpus(f"{path}:reply")


def test_a_path_that_exists_wins_over_a_column(answers):
    answers("rows.jsonl")
    other = answers("rows.jsonl:answer").with_name("rows.jsonl:answer")
    assert file_and_column(str(other)) == (other, None)


def test_colons_that_name_no_column_stay_in_the_path(tmp_path, answers):
    path = answers("rows.jsonl")
    for source in (r"C:\texts\rows.jsonl", f"{path}:", f"{path}:../rows.jsonl", f"{path}.gz:a"):
        assert file_and_column(source)[1] is None
        with pytest.raises(TransActError, match="There is no text at"):
            read_corpus(source)


def test_columns_of_a_plain_text_are_refused(text_file):
    with pytest.raises(TransActError, match="has no columns"):
        read_corpus(f"{text_file}:text")


def test_rows_that_are_no_objects_have_no_columns(tmp_path):
    (tmp_path / "rows.jsonl").write_text('"a"')
    with pytest.raises(TransActError, match=r"Line 1 .* has no columns"):
        read_corpus(f"{tmp_path / 'rows.jsonl'}:text")


# --- kinds of text ---------------------------------------------------------------------------


def test_the_second_builtin_text_is_code():
    code = read_corpus(BUILTIN_CODE)
    assert len(code.text) > 400_000
    assert code.text.count("\ndef ") > 100
    assert code.sha256 == read_corpus(BUILTIN_CODE).sha256 != read_corpus(BUILTIN_TEXT).sha256


def test_python_without_its_source_code_is_said(monkeypatch):
    monkeypatch.setattr(corpus_module, "CODE_MODULES", ("argparse", "sys"))
    with pytest.raises(TransActError, match="without the source code"):
        read_corpus(BUILTIN_CODE)


@pytest.mark.parametrize(
    ("one", "other", "alike"),
    [
        ("builtin", "builtin ", True),
        ("builtin", "builtin-code", False),
        ("hub:wikitext:wikitext-2-raw-v1", "hub:wikitext:wikitext-103-v1:test", True),
        ("hub:wikitext", "hub:c4", False),
        ("a.txt", "a.txt", True),
        ("a.txt", "b.txt", False),
    ],
)
def test_texts_of_one_kind(one, other, alike):
    assert of_one_kind(one, other) is alike


def test_columns_of_one_file_are_of_one_kind_and_named(tmp_path):
    path = tmp_path / "chat.jsonl"
    path.write_text('{"question": "a", "answer": "b"}\n')
    assert of_one_kind(f"{path}:question", f"{path}:answer")
    assert short_name(f"{path}:answer") == "chat.jsonl:answer"
    assert short_name("hub:owner/data:config:test") == "owner/data"
