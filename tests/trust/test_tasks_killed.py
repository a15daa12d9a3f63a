"""A run of tasks is killed in the middle and started again: no block is scored twice."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("lm_eval")

from transact_core.cli import main
from transact_core.experiments import tasks as tasks_module

ROOT = Path(__file__).parents[2]
KILLED_AFTER = 3
"""Blocks that the first run keeps, of four."""
SCORED = """
import sys
from transact_core.cli import main
from transact_core.experiments import tasks

score, scored = tasks.score_continuations, 0

def told(*arguments):
    global scored
    scored += 1
    print("scoring", scored, flush=True)
    if scored > {kept}:
        # In the middle of this block: the next forward pass waits for the kill.
        sys.stdin.read()
    return score(*arguments)

tasks.score_continuations = told
main(sys.argv[1:])
"""


def test_no_block_is_scored_twice(checkpoint, text_file, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TRANSACT_CACHE", str(tmp_path / "cache"))
    command = ["tasks", "--model", str(checkpoint), "--text", str(text_file), "--limit", "40"]
    # Results are kept by the number of threads.
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    killed = subprocess.Popen(
        [sys.executable, "-c", SCORED.format(kept=KILLED_AFTER), *command],
        cwd=ROOT,
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    for number in range(1, KILLED_AFTER + 2):
        assert killed.stdout.readline() == f"scoring {number}\n"
    killed.kill()
    assert killed.wait(30) == -9

    scored = []
    score = tasks_module.score_continuations

    def counted(*arguments):
        scored.append(len(arguments[1]))
        return score(*arguments)

    monkeypatch.setattr(tasks_module, "score_continuations", counted)
    assert main([*command, "--json"]) == 0
    interrupted = json.loads(capsys.readouterr().out)
    # Of four blocks three were kept; only the one that the kill interrupted is scored now.
    assert scored == [15]
    # And nothing of what was kept is damaged: an undisturbed run gives the same figures.
    monkeypatch.setenv("TRANSACT_CACHE", str(tmp_path / "another"))
    assert main([*command, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == interrupted
    assert scored == [15, 25, 25, 15, 15]
