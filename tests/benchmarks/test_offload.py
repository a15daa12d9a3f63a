"""The parts of the benchmark of layers on disk; running it takes minutes."""

import os

import torch
from safetensors.torch import save_file

from benchmarks import offload
from transact_core.cli import _parser


def test_memory_that_belongs_to_no_file_is_counted(tmp_path):
    before = offload.memory_of(os.getpid())["RssAnon"]
    ballast = torch.ones(50_000_000)
    assert offload.memory_of(os.getpid())["RssAnon"] > before + 0.9 * ballast.nbytes
    save_file({"ballast": ballast}, tmp_path / "model.safetensors")
    assert offload.plain_reading(tmp_path) > 0
    assert len(offload.fingerprint(tmp_path)) == 64


def test_a_process_that_has_ended_takes_no_memory():
    assert offload.memory_of(2**22 + 1) == {}


def test_a_command_runs_in_a_process_of_its_own(tmp_path):
    done = offload.run(["evaluate", "--help"], tmp_path)
    assert "--offload" in done.printed
    assert done.cpu_seconds > 0
    assert done.anonymous_bytes > 10_000_000


def test_the_command_lines_are_ones_that_the_library_takes(tmp_path, monkeypatch):
    told = []
    monkeypatch.setattr(offload, "write_random_model", lambda *_, **__: _Small())
    monkeypatch.setattr(offload, "plain_reading", lambda _: 1.0)

    def run(words, cache):
        told.append(_parser().parse_args(words))
        return offload.Run(1.0, 2.0, 3, 4, "{}")

    monkeypatch.setattr(offload, "run", run)
    monkeypatch.setattr("sys.argv", ["offload", "--folder", str(tmp_path)])
    offload.main()
    assert [(each.command, each.offload) for each in told] == [
        (command, offloaded)
        for command in ("prune", "apply", "evaluate")
        for offloaded in ("auto", "always")
    ]


class _Small:
    """Sizes of a model."""

    parameters = 1000

    def layer_parameters(self, _: int) -> int:
        return 100
