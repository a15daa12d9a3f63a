import errno
import os

import pytest
import torch

from transact_core.base.cache import remembered
from transact_core.base.errors import TransActError
from transact_core.base.files import (
    STAGING_SUFFIX,
    remove_leftovers,
    require_disk_space,
    require_free_output,
    staged_file,
    staged_folder,
)


def test_what_was_measured_is_not_measured_again(cache):
    calls = []

    def compute():
        calls.append(1)
        return {"values": torch.arange(3.0)}

    first = remembered({"what": "test"}, compute)
    second = remembered({"what": "test"}, compute)
    assert torch.equal(first["values"], second["values"])
    assert len(calls) == 1
    remembered({"what": "another"}, compute)
    assert len(calls) == 2


def test_a_damaged_measurement_is_measured_again(cache):
    remembered({"what": "damaged"}, lambda: {"values": torch.zeros(2)})
    for path in (cache / "measured").iterdir():
        path.write_bytes(b"damaged")
    again = remembered({"what": "damaged"}, lambda: {"values": torch.ones(2)})
    assert again["values"].tolist() == [1, 1]


def test_a_cache_that_cannot_be_written_is_done_without(tmp_path, monkeypatch):
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    monkeypatch.setenv("TRANSACT_CACHE", str(blocked))
    assert remembered({"what": "x"}, lambda: {"values": torch.ones(1)})["values"].item() == 1


def test_a_folder_appears_whole(tmp_path):
    final = tmp_path / "parent" / "final"
    with staged_folder(final) as staging:
        (staging / "file").write_text("content")
        assert not final.exists()
    assert (final / "file").read_text() == "content"
    assert os.listdir(final.parent) == ["final"]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), ValueError("x")])
def test_nothing_is_left_when_writing_fails(tmp_path, error):
    def write() -> None:
        with staged_folder(tmp_path / "final") as staging:
            (staging / "file").write_text("half")
            raise error

    with pytest.raises(type(error)):
        write()
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        RuntimeError("I/O error: No space left on device (os error 28)"),
    ],
)
def test_a_full_disk_is_reported_in_words(tmp_path, error):
    with (
        pytest.raises(TransActError, match="the disk is full; nothing was left behind"),
        staged_folder(tmp_path / "final"),
    ):
        raise error
    assert os.listdir(tmp_path) == []


def test_folders_made_on_the_way_go_too_when_writing_fails(tmp_path):
    with pytest.raises(ValueError, match="x"), staged_folder(tmp_path / "new" / "deep" / "final"):
        raise ValueError("x")
    assert os.listdir(tmp_path) == []


def test_leftovers_of_the_dead_are_removed_and_those_of_the_living_kept(tmp_path):
    dead_file = tmp_path / f".points.csv.abcdefgh{STAGING_SUFFIX}"
    dead_file.write_text("half")
    dead_folder = tmp_path / f".out.abcdefgh{STAGING_SUFFIX}"
    dead_folder.mkdir()
    (dead_folder / "model.safetensors").write_text("half")
    mine = tmp_path / ".out.mine"
    mine.write_text("precious")
    with staged_folder(tmp_path / "out") as living, staged_file(tmp_path / "points.csv") as file:
        assert not dead_file.exists()
        assert not dead_folder.exists()
        remove_leftovers(tmp_path)
        assert living.is_dir()
        file.write_text("whole")
    assert sorted(os.listdir(tmp_path)) == [".out.mine", "out", "points.csv"]
    assert (tmp_path / "points.csv").read_text() == "whole"


def test_what_another_process_wrote_meanwhile_is_kept(tmp_path):
    final = tmp_path / "final"

    def write() -> None:
        with staged_folder(final):
            final.mkdir()
            (final / "file").write_text("theirs")

    with pytest.raises(TransActError, match="filled by another process"):
        write()
    assert os.listdir(tmp_path) == ["final"]
    assert (final / "file").read_text() == "theirs"


def test_outputs_that_hold_something_are_refused(tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("mine")
    with pytest.raises(TransActError, match="not empty"):
        require_free_output(tmp_path / "full")
    with pytest.raises(TransActError, match="is a file"):
        require_free_output(tmp_path / "full" / "file")
    (tmp_path / "empty").mkdir()
    require_free_output(tmp_path / "empty")
    require_free_output(tmp_path / "new" / "deep")
    assert not (tmp_path / "new").exists()
    for path in ("x" * 300, "full/file/below"):
        with pytest.raises(TransActError, match="cannot be written"):
            require_free_output(tmp_path / path)


def test_a_link_stands_for_where_it_leads(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "target")
    require_free_output(tmp_path / "link")
    with staged_folder(tmp_path / "link") as staging:
        (staging / "file").write_text("content")
    assert (tmp_path / "target" / "file").read_text() == "content"


def test_more_than_the_disk_holds_is_refused(tmp_path):
    with pytest.raises(TransActError, match="MB free"):
        require_disk_space(tmp_path / "new", 10**18)
    require_disk_space(tmp_path / "new", 1)
