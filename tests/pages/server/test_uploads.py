"""Uploads stay in their folder, whatever they are called, and all of them within their total."""

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pages.server.settings import uploads_folder
from pages.server.uploads import KINDS, harmless_name, keep_upload
from transact_core.base.errors import TransActError


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("TRANSACT_CACHE", str(tmp_path / "cache"))


@pytest.mark.parametrize(
    ("name", "kept"),
    [
        ("notes.txt", "notes.txt"),
        ("../../../etc/cron.d/x.txt", "x.txt"),
        ("..\\..\\x.MD", "x.md"),
        ("/abs/olute.parquet", "olute.parquet"),
        ("...txt", "text.txt"),
        (".txt", "text.txt"),
        ("<img src=x onerror=alert(1)>.txt", "img-src-x-onerror-alert-1.txt"),
        ("[a](javascript:b).jsonl", "a-javascript-b.jsonl"),
        ("a\0b\n.txt", "a-b.txt"),
        ("наука.txt", "text.txt"),
        ("a" * 5000 + ".txt", "a" * 80 + ".txt"),
    ],
)
def test_hostile_names(name, kept):
    path = Path(keep_upload(name, b"text", total_mb=1))
    assert path.name == kept
    assert path.parent.parent == uploads_folder()
    assert path.read_bytes() == b"text"


@pytest.mark.parametrize("name", ["", ".", "..", "x", "x.exe", "x.txt/", "x.txt/..", "x.txt\0"])
def test_what_is_no_text_by_its_name_is_refused(name):
    with pytest.raises(TransActError, match="none of"):
        keep_upload(name, b"text", total_mb=1)
    assert not uploads_folder().exists()


@given(st.text(max_size=300), st.sampled_from(KINDS))
def test_any_name_becomes_one_harmless_part(name, kind):
    kept = harmless_name(f"{name}.{kind}")
    assert Path(kept).name == kept
    assert not kept.startswith((".", "-"))
    assert len(kept) < 100
    assert harmless_name(kept) == kept


def test_the_same_upload_is_kept_once():
    assert keep_upload("a.txt", b"same", 1) == keep_upload("a.txt", b"same", 1)
    assert len(list(uploads_folder().rglob("*.txt"))) == 1


def test_the_longest_unused_make_room():
    size = 300_000
    paths = [Path(keep_upload(f"{n}.txt", bytes([n]) * size, 1)) for n in range(3)]
    for age, path in enumerate(paths):
        os.utime(path.parent, (age, age))
    keep_upload("0.txt", bytes([0]) * size, 1)  # used again, so it is no longer the oldest
    newest = Path(keep_upload("3.txt", bytes([3]) * size, 1))
    assert [path.exists() for path in paths] == [True, False, True]
    assert newest.exists()
    assert sum(path.stat().st_size for path in uploads_folder().rglob("*.txt")) <= 1_000_000


def test_one_that_is_larger_than_the_total_is_refused():
    with pytest.raises(TransActError, match="larger than the 1 MB"):
        keep_upload("a.txt", bytes(1_000_001), 1)
    assert not uploads_folder().exists()


def test_a_folder_that_takes_nothing_is_said(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TRANSACT_CACHE", str(tmp_path / "file"))
    with pytest.raises(TransActError, match="The upload was not stored"):
        keep_upload("a.txt", b"text", 1)
