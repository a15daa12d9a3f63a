"""A curve on a real cluster of two nodes on this machine. Needs `make ray`."""

import os
import signal
import time
from importlib.util import find_spec
from pathlib import Path

import psutil
import pytest
import torch

from tests.conftest import make_model
from tests.workers.ray_nodes import ray_nodes, ray_workers
from transact_core.base.errors import Cancelled
from transact_core.data.windows import WindowSpec, read_texts
from transact_core.experiments.bench import Choices
from transact_core.experiments.cut_spec import BenchSpec, open_bench
from transact_core.experiments.sweep import known_points, sweep
from transact_core.models.load import fingerprint
from transact_core.workers.on_ray import on_cluster

# Not imported here: Ray reads the cluster's token from the environment when it is.
pytestmark = pytest.mark.skipif(
    find_spec("ray") is None, reason="Ray is not installed here: run `make ray`"
)

PAIRS = [(mha, mlp) for mha in (0.0, 0.34) for mlp in (0.1, 0.2, 0.3, 0.5)]


@pytest.fixture(scope="module")
def homes(tmp_path_factory, tokenizer):
    """Two home folders; each has its own model in `own`, and only the first one has `other`."""
    made = tmp_path_factory.mktemp("homes")
    for home, seed in (("first", 0.2), ("second", 0.1)):
        model = make_model(num_key_value_heads=3, initializer_range=seed)
        model.save_pretrained(made / home / "own")
        tokenizer.save_pretrained(made / home / "own")
    return made / "first", made / "second"


@pytest.fixture(scope="module")
def address(homes):
    """Of a cluster whose first node has two CPUs and whose second one has one."""
    with ray_nodes([2, 1], homes) as address:
        yield address


@pytest.fixture
def spec(homes, text_file, tmp_path, monkeypatch):
    monkeypatch.setenv("TRANSACT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HOME", str(homes[0]))
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    windows = WindowSpec(str(text_file), str(text_file), 512, 128, 32)
    yield BenchSpec("~/own", "cpu", "float32", windows)
    torch.set_num_threads(before)


def home_of(process):
    """The home folder that a process was started with, which tells its node."""
    return Path(process.environ()["HOME"])


def opened(cluster, spec, progress):
    texts, weights = read_texts(spec.windows), fingerprint(spec.model)
    return cluster.open(spec, texts, weights, Choices(), len(PAIRS), progress)


def refused(said):
    """Whether the worker of the second node takes no part."""
    return any(sentence.endswith("its model has other weights (SHA-256).") for sentence in said)


def test_a_curve_is_that_of_one_process_though_a_worker_is_killed(
    spec, homes, address, tmp_path, monkeypatch, capfd
):
    said, points, stages, waiting = [], [], [], []

    def progress(stage, *_):
        stages.append(stage)
        if waiting and refused(said):
            waiting.pop().resume()

    with on_cluster(address, 1, said.append) as cluster:
        bench = opened(cluster, spec, progress)
        # Of the two that go on one is held at its first point, and the other one until the worker
        # of the second node is refused: it may start late.
        deadline = time.monotonic() + 60
        while len(first := [each for each in ray_workers() if home_of(each) == homes[0]]) < 2:
            assert time.monotonic() < deadline, "the first node's workers do not come up"
            time.sleep(0.1)
        held, other = first
        for process in (held, other):
            process.suspend()
        waiting.append(other)
        for point in sweep(bench, PAIRS, Choices(), progress, cluster.measure):
            points.append(point)
            if len(points) == 3:
                os.kill(held.pid, signal.SIGKILL)
    assert {(point.plan.mha_ratio, point.plan.mlp_ratio) for point in points} == set(PAIRS)
    assert len(points) == len(PAIRS)
    assert refused(said)
    assert [each for each in said if each.endswith("has ended; its point is measured again.")]
    assert stages[-1].startswith("Measuring on Ray")
    assert not psutil.wait_procs(ray_workers(), timeout=30)[1]
    # Nothing of Ray's own is printed.
    assert capfd.readouterr() == ("", "")

    # A process that measures for itself finds them, and measures the same.
    here = open_bench(spec)
    assert len(known_points(here, PAIRS, Choices())) == len(PAIRS)
    monkeypatch.setenv("TRANSACT_CACHE", str(tmp_path / "another"))
    there = {point.identity: point for point in points}
    for point in sweep(open_bench(spec), PAIRS, Choices()):
        same = there[point.identity]
        assert point.evaluation.nll.equal(same.evaluation.nll)
        assert (point.perplexity, point.delta_nll) == (same.perplexity, same.delta_nll)


def test_cancelled_it_leaves_no_worker(spec, address):
    def stop(stage, *_):
        if ray_workers():
            raise Cancelled

    with pytest.raises(Cancelled), on_cluster(address, 1, print) as cluster:
        opened(cluster, spec, stop)
    assert not psutil.wait_procs(ray_workers(), timeout=30)[1]
