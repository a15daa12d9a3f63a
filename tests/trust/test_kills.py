"""A small campaign of kills and failing disks; `python -m tests.trust.kills` is the full one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.skipif(os.name != "posix", reason="processes are forked and killed by signals")
def test_nothing_is_lost_by_kills_and_failing_disks():
    # In a process of its own: forks of one that has computed may hang in its thread pools.
    done = subprocess.run(
        [sys.executable, "-m", "tests.trust.kills", "--trials", "4", "--disks", "2"],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
    )
    assert done.stdout, done.stderr
    result = json.loads(done.stdout)
    assert result["failures"] == []
    ended = [how.split(": ")[1] for how in result["counts"]]
    assert {"killed", "refused"} <= set(ended)
    assert sum(result["counts"].values()) == 6
