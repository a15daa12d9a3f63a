"""How a curve is handed out to workers, with workers in this process; see `test_ray_cluster`."""

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.conftest import make_model
from tests.workers.fake_ray import FakeRay
from transact_core.base.errors import Cancelled, TransActError
from transact_core.cli import main
from transact_core.data.windows import WindowSpec, read_texts
from transact_core.experiments.bench import Choices
from transact_core.experiments.cut_spec import BenchSpec, open_bench
from transact_core.experiments.sweep import known_points, sweep
from transact_core.models.load import fingerprint
from transact_core.workers import on_ray
from transact_core.workers.on_ray import TRIES, on_cluster

PAIRS = [(0.34, ratio) for ratio in (0.1, 0.2, 0.3, 0.5)]


@pytest.fixture(autouse=True)
def one_thread():
    """As many as the tests' nodes have CPUs."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def spec(checkpoint, text_file, tmp_path, monkeypatch):
    monkeypatch.setenv("TRANSACT_CACHE", str(tmp_path / "cache"))
    windows = WindowSpec(str(text_file), str(text_file), 512, 128, 32)
    return BenchSpec(str(checkpoint), "cpu", "float32", windows)


@pytest.fixture
def cluster(monkeypatch):
    """Of two nodes with a CPU each."""
    made = FakeRay({"one": 1, "two": 1})
    monkeypatch.setattr(on_ray, "require_ray", lambda: made)
    return made


def curve(spec, pairs=PAIRS, choices=None, threads=None, told=None, progress=lambda *_: None):
    """The points of a curve, and what was said."""
    choices, said = choices or Choices(), []
    threads = threads or torch.get_num_threads()
    with on_cluster("auto", threads, told or said.append) as opened:
        weights = fingerprint(spec.model)
        bench = opened.open(spec, read_texts(spec.windows), weights, choices, len(pairs), progress)
        points = list(sweep(bench, pairs, choices, progress, opened.measure))
    return {(point.plan.mha_ratio, point.plan.mlp_ratio): point for point in points}, said


@pytest.mark.parametrize("choices", [Choices(), Choices(steps=2), Choices("head-dims")])
def test_points_are_those_measured_here(spec, cluster, choices, tmp_path, monkeypatch):
    pairs = PAIRS if choices == Choices() else PAIRS[-2:]
    there, said = curve(spec, pairs, choices)
    assert (said, cluster.connected) == ([], None)
    assert all(actor.killed for actor in cluster.actors)
    # As a process that measures here would find them.
    bench = open_bench(spec)
    assert known_points(bench, pairs, choices).keys() == there.keys() == set(pairs)
    monkeypatch.setenv("TRANSACT_CACHE", str(tmp_path / "another"))
    bench = open_bench(spec)
    assert not known_points(bench, pairs, choices)
    for point in sweep(bench, pairs, choices):
        same = there[point.plan.mha_ratio, point.plan.mlp_ratio]
        assert point.evaluation.nll.equal(same.evaluation.nll)
        assert (point.perplexity, point.delta_nll) == (same.perplexity, same.delta_nll)
        assert point.decision == same.decision


def test_what_points_share_is_made_by_one_worker(spec, cluster):
    curve(spec)
    asked = [function for _, function in cluster.asked if function != "standing"]
    assert asked.count("load") == 2
    assert asked.count("share") == 1
    assert asked.count("take_over") == 1
    assert asked.count("curve_point") == len(PAIRS)
    assert {node for node, function in cluster.asked if function == "curve_point"} == {"one", "two"}


def test_kept_points_are_not_measured_again(spec, cluster):
    curve(spec, PAIRS[:3])
    cluster.asked.clear()
    points, _ = curve(spec)
    assert set(points) == set(PAIRS)
    assert [function for _, function in cluster.asked].count("curve_point") == 1


@pytest.mark.parametrize(
    ("differing", "words"),
    [
        ({"torch": "1.0"}, "it has torch 1.0 in place of"),
        ({"transact_core": "0.1", "engine": "1"}, "it has transact_core 0.1 in place of"),
        ({"instruction set": "AVX1"}, "it has instruction set AVX1 in place of"),
    ],
)
def test_a_node_with_other_versions_is_refused_by_name(spec, cluster, differing, words):
    cluster.differing["one"] = differing
    points, said = curve(spec)
    assert len(points) == len(PAIRS)
    assert said[0].startswith(f"one (192.0.2.1) takes no part: {words}")
    assert {node for node, function in cluster.asked if function == "curve_point"} == {"two"}


def test_without_a_node_that_can_take_part_the_reasons_are_told(spec, cluster):
    with pytest.raises(TransActError, match=r"has no worker left\. one .* has 1 CPUs.* two .*"):
        curve(spec, threads=2)
    other = replace(spec, model=str(spec.windows.calibration))
    with pytest.raises(TransActError, match="neither a checkpoint folder"):
        curve(other)


def test_other_weights_are_refused_by_name(spec, cluster, monkeypatch):
    monkeypatch.setattr(f"{__name__}.fingerprint", lambda _: {"model.safetensors": "0" * 64})
    with pytest.raises(TransActError, match=r"one \(192.0.2.1\) .* other weights .* two"):
        curve(spec)


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("config", "{}", "its model has another configuration"),
        (
            "device",
            "GPU B, CUDA 13.0",
            "it computes on another kind of device, another GPU or with",
        ),
    ],
)
def test_what_else_differs_is_refused_by_name(spec, cluster, monkeypatch, name, value, words):
    """The weights are the same."""
    really = on_ray.tasks.unpacked

    def of_second(packed):
        got = really(packed)
        if isinstance(getattr(got, "result", None), dict) and "config" in got.result:
            got.result[name] = value
        return got

    monkeypatch.setattr(on_ray.tasks, "unpacked", of_second)
    _, said = curve(spec)
    assert len(said) == 1
    assert said[0].startswith(f"two (192.0.2.1) takes no part: {words}")


def test_a_worker_that_dies_costs_only_its_point(spec, cluster):
    deaths = []

    def once(actor, asked):
        if asked == "curve_point" and len(deaths) < TRIES - 1:
            deaths.append(actor.node)
            return True
        return False

    cluster.dies = once
    points, said = curve(spec)
    assert set(points) == set(PAIRS)
    assert len(deaths) == TRIES - 1
    assert said[0] == "A worker on one (192.0.2.1) has ended; its point is measured again."
    asked = [function for _, function in cluster.asked]
    assert asked.count("share") == 1
    assert asked.count("curve_point") == len(PAIRS) + len(deaths)


def test_a_point_at_which_every_worker_dies_is_given_up(spec, cluster):
    cluster.dies = lambda actor, asked: asked == "curve_point"
    with pytest.raises(
        TransActError, match=r"at MHA 0\.34 and MLP 0\.5 was given up: each of the 3"
    ):
        curve(spec, PAIRS[-1:])
    assert all(actor.killed for actor in cluster.actors)


def test_a_node_whose_workers_always_die_takes_no_part(spec, cluster):
    cluster.dies = lambda actor, asked: asked == "load"
    words = r"one \(192.0.2.1\) takes no part: its workers end before they are done"
    with pytest.raises(TransActError, match=words):
        curve(spec)
    assert len(cluster.actors) == 2 * (TRIES + 1)


def test_a_point_that_is_refused_is_tried_elsewhere_and_then_told(spec, cluster, monkeypatch):
    def refuse(*_):
        raise TransActError("There is no memory for it.")

    monkeypatch.setattr("transact_core.workers.work.point_at", refuse)
    with pytest.raises(TransActError, match="There is no memory for it"):
        curve(spec, PAIRS[-1:])
    assert [function for _, function in cluster.asked].count("curve_point") == TRIES


def test_cancelled_it_ends_its_workers_and_keeps_its_points(spec, cluster):
    def stop(stage, done, total):
        if stage.startswith("Measuring on Ray") and done >= 100:
            raise Cancelled

    with pytest.raises(Cancelled):
        curve(spec, progress=stop)
    assert cluster.connected is None
    assert all(actor.killed for actor in cluster.actors)
    assert 0 < len(known_points(open_bench(spec), PAIRS, Choices())) < len(PAIRS)


def test_workers_are_spread_and_no_more_than_points(spec, monkeypatch):
    made = FakeRay({"driver": 0, "large": 8, "small": 2})
    monkeypatch.setattr(on_ray, "require_ray", lambda: made)
    curve(spec, PAIRS)
    assert [actor.node for actor in made.actors] == ["large", "small", "large", "small"]


def test_gpus_are_taken_where_there_are_any(spec, monkeypatch):
    made = FakeRay({"with": 4, "without": 4}, gpus=["with"])
    monkeypatch.setattr(on_ray, "require_ray", lambda: made)
    # There is none here, so that the one worker cannot load the model.
    monkeypatch.setattr(
        "transact_core.workers.open_models.load_model",
        lambda source, device, *_: (_ for _ in ()).throw(TransActError(f"on {device}.")),
    )
    words = r"without .* has no GPU\. with .* takes no part: on cuda\."
    with pytest.raises(TransActError, match=words):
        curve(replace(spec, device="auto"))
    assert [actor.node for actor in made.actors] == ["with"]


def test_its_threads_are_those_of_the_keys(cluster):
    before = torch.get_num_threads()
    with on_cluster("auto", before + 1, print):
        assert torch.get_num_threads() == before + 1
    assert torch.get_num_threads() == before


# --- the command line ------------------------------------------------------------------------


@pytest.fixture
def swept(spec, tmp_path):
    def run(name, *options):
        output, windows = tmp_path / name, spec.windows
        texts = ["--calibration", windows.calibration, "--evaluation", windows.evaluation]
        tokens = ["--calibration-tokens", "512", "--evaluation-tokens", "128"]
        chosen = ["--model", spec.model, "--mha-ratio", "0,0.34", "--mlp-ratio", "0.2,0.5"]
        chosen += [*texts, *tokens, "--sequence-length", "32", "--output", str(output)]
        return main(["sweep", *chosen, *options]), output

    return run


def test_sweep_writes_the_same_file_with_ray(swept, cluster, tmp_path, monkeypatch, capsys):
    threads = str(torch.get_num_threads())
    cluster.cpus = {"one": int(threads), "two": int(threads)}
    cluster.differing["two"] = {"torch": "1.0"}
    status, with_ray = swept("ray.csv", "--ray", "auto", "--ray-threads", threads)
    assert status == 0
    printed = capsys.readouterr()
    assert printed.out == f"4 points in {with_ray}\n"
    assert "Warning: two (192.0.2.1) takes no part: it has torch 1.0" in printed.err
    monkeypatch.setenv("TRANSACT_CACHE", str(tmp_path / "another"))
    status, without = swept("plain.csv")
    assert status == 0

    def lines(path):
        return [line.rpartition(",")[0] for line in path.read_text().splitlines()]

    assert lines(with_ray) == lines(without)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--ray", "auto"), "Ray is not installed here: run `make ray`"),
        (("--ray-threads", "2"), "name one with --ray"),
    ],
)
def test_sweep_says_what_is_missing(swept, monkeypatch, capsys, options, words):
    monkeypatch.setitem(sys.modules, "ray", None)
    status, output = swept("points.csv", *options)
    assert (status, output.exists()) == (2, False)
    printed = capsys.readouterr()
    assert printed.out == ""
    assert words in printed.err


@pytest.mark.parametrize(
    ("address", "words"),
    [
        ("ray://somewhere:10001", "is no address of a Ray cluster as it is asked for here"),
        ("127.0.0.1:1", "Nothing answers at 127.0.0.1:1"),
    ],
)
def test_wrong_addresses_are_told(swept, cluster, capsys, address, words):
    status, output = swept("points.csv", "--ray", address)
    assert (status, output.exists()) == (2, False)
    assert words in capsys.readouterr().err


# --- tasks -----------------------------------------------------------------------------------


@pytest.fixture
def asked(spec, text_file, tmp_path, capsys, monkeypatch):
    """Runs `tasks` for a model against another one; what it printed, and what it told."""
    pytest.importorskip("lm_eval")
    # Blocks of three questions, so that there are several of each task.
    monkeypatch.setattr("transact_core.experiments.tasks.BLOCK", 3)
    other = tmp_path / "other"
    make_model(num_key_value_heads=3, initializer_range=0.1).save_pretrained(other)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(Path(spec.model) / name, other / name)

    def run(*options):
        models = ["--model", spec.model, "--against", str(other)]
        made_of = ["--text", str(text_file), "--limit", "8", "--dtype", "float32"]
        status = main(["tasks", *models, *made_of, *options, "--json"])
        printed = capsys.readouterr()
        return (json.loads(printed.out) if status == 0 else status), printed.err

    return run


def counted(cluster, name):
    return [function for _, function in cluster.asked].count(name)


def test_tasks_are_answered_as_here_and_kept(asked, cluster, tmp_path, monkeypatch):
    dies = []

    def once(actor, function):
        if function == "answer_block" and not dies:
            dies.append(actor.node)
            return True
        return False

    cluster.dies = once
    there, err = asked("--ray", "auto")
    assert "has ended; its questions are put again" in err
    # Two tasks of eight questions in blocks of three, put to two models; and one that died.
    assert counted(cluster, "answer_block") == 2 * 3 * 2 + 1
    nodes = {node for node, function in cluster.asked if function == "answer_block"}
    assert nodes == {"one", "two"}
    assert cluster.connected is None
    assert all(actor.killed for actor in cluster.actors)
    cluster.asked.clear()
    # Kept as this process itself would have kept them.
    assert asked("--ray", "auto")[0] == asked()[0] == there
    assert counted(cluster, "answer_block") == 0
    monkeypatch.setenv("TRANSACT_CACHE", str(tmp_path / "another"))
    assert asked()[0] == there


def test_a_node_with_another_model_answers_no_questions(asked, cluster, monkeypatch):
    really, seen = on_ray.tasks.unpacked, []

    def of_second(packed):
        got = really(packed)
        if isinstance(getattr(got, "result", None), tuple):
            seen.append(got.result)
            if len(seen) == 2:
                got.result[1].identity["device"] = "GPU B, CUDA 13.0"
        return got

    monkeypatch.setattr(on_ray.tasks, "unpacked", of_second)
    _, err = asked("--ray", "auto")
    assert "takes no part: it computes on another kind of device" in err
    assert len({node for node, function in cluster.asked if function == "answer_block"}) == 1


def test_answers_that_cannot_be_kept_are_told(asked, cluster, monkeypatch):
    monkeypatch.setattr(on_ray, "keep_answers", lambda *_: None)
    status, err = asked("--ray", "auto")
    assert status == 2
    assert "What the cluster answered could not be kept" in err
