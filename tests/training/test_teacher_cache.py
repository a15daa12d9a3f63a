"""What the teacher says, written down and read again."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from tests.conftest import KINDS, VOCAB_SIZE, make_model
from transact_core.base.errors import TransActError
from transact_core.training import teacher_cache
from transact_core.training.objective import token_losses
from transact_core.training.teacher import LiveTeacher
from transact_core.training.teacher_cache import Shape, TeacherCache

WEIGHTS = {"model.safetensors": "a" * 64}


def store(folder, windows, top=16) -> TeacherCache:
    return TeacherCache(folder, WEIGHTS, "float32", Shape(windows.sequence_length, VOCAB_SIZE, top))


@pytest.fixture
def dense():
    return make_model(**KINDS["gqa"])


@pytest.fixture
def student():
    return make_model(**KINDS["gqa"], initializer_range=0.1)


@pytest.mark.parametrize("top", [16, VOCAB_SIZE])
def test_it_says_what_the_live_teacher_says(tmp_path, windows, dense, student, top):
    text = windows[1]
    cache = store(tmp_path, text, top)
    cache.write(dense, {"a": text})
    live = LiveTeacher(dense)
    for row in (0, 3):
        ids = text.ids[row][None]
        torch.testing.assert_close(
            cache.nll("a", [row], ids), live.nll("a", [row], ids), atol=1e-5, rtol=1e-5
        )
        whole = token_losses(student, ids, live.targets("a", [row], ids)).kl
        kept = token_losses(student, ids, cache.targets("a", [row], ids)).kl
        if top == VOCAB_SIZE:
            torch.testing.assert_close(kept, whole, atol=2e-3, rtol=1e-2)
        else:
            assert 0 < kept.mean() <= whole.mean() + 1e-3


def test_the_size_is_told_and_is_what_is_taken(tmp_path, windows, dense):
    cache = store(tmp_path, windows[1])
    told = cache.shape.bytes_of(cache.missing({"a": windows[1]}))
    cache.write(dense, {"a": windows[1]})
    assert sum(path.stat().st_size for path in cache.folder.iterdir()) == told


def test_known_windows_need_no_teacher(tmp_path, windows, dense):
    store(tmp_path, windows[1]).write(dense, {"a": windows[1]})
    again = store(tmp_path, windows[1])
    assert again.missing({"b": windows[1]}) == 0
    again.write(None, {"b": windows[1]})
    assert again.nll("b", [0], windows[1].ids[:1]).shape == (windows[1].sequence_length - 1,)


def test_two_processes_write_into_one_store(tmp_path, windows, dense):
    text, whole = windows[1], store(tmp_path / "whole", windows[1])
    whole.write(dense, {"a": text})
    one, other = store(tmp_path / "both", text), store(tmp_path / "both", text)
    first = replace(text, ids=text.ids[:3])

    def meanwhile(stage, done, total):
        """The first window is known to both when the second of them is about to be written."""
        if done == 1:
            other.write(dense, {"a": first})

    one.write(dense, {"a": text}, meanwhile)
    other.write(None, {"a": text})
    for path in whole.folder.iterdir():
        assert (one.folder / path.name).read_bytes() == path.read_bytes()


@pytest.mark.parametrize("torn", ["tokens", "windows"])
def test_it_goes_on_behind_a_row_that_was_not_finished(tmp_path, windows, dense, torn):
    text = windows[1]
    whole = store(tmp_path / "whole", text)
    whole.write(dense, {"a": text})
    cache, writes = store(tmp_path / "killed", text), []
    real = teacher_cache._write_at

    def killed(path, offset, content):
        if path.stem == torn:
            writes.append(path)
            if len(writes) == 4:
                real(path, offset, content[: len(content) // 2])
                raise KeyboardInterrupt
        real(path, offset, content)

    teacher_cache._write_at = killed
    try:
        with pytest.raises(KeyboardInterrupt):
            cache.write(dense, {"a": text})
    finally:
        teacher_cache._write_at = real
    again = store(tmp_path / "killed", text)
    assert again.missing({"a": text}) == len(text) - 3
    again.write(dense, {"a": text})
    for path in whole.folder.iterdir():
        assert (again.folder / path.name).read_bytes() == path.read_bytes()


def test_a_full_disk_is_told_before_and_meanwhile(tmp_path, windows, dense, monkeypatch):
    cache = store(tmp_path, windows[1])
    with monkeypatch.context() as patched:
        patched.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=10))
        with pytest.raises(TransActError, match="free some space"):
            cache.write(dense, {"a": windows[1]})

    def full(path, offset, content):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(teacher_cache, "_write_at", full)
    with pytest.raises(TransActError, match="the disk is full"):
        cache.write(dense, {"a": windows[1]})
