"""What the test processes share is made again where the first attempt failed."""

import pytest

from tests.conftest import made_once


def test_a_folder_that_could_not_be_made_is_made_by_the_next(tmp_path):
    def fail(folder):
        raise OSError("the disk is full")

    made = []
    with pytest.raises(OSError, match="the disk is full"):
        made_once(tmp_path / "shared", fail)
    for _ in range(2):
        assert made_once(tmp_path / "shared", made.append) == tmp_path / "shared"
    assert made == [tmp_path / "shared"]
