"""Tasks on small random models: the harness' own scores, pairing, and what is kept."""

import json
import logging
import math
import random

import numpy as np
import pytest
import torch

pytest.importorskip("lm_eval")

from benchmarks.tasks import stock_scores
from tests.conftest import bench_of, loaded_from, make_model
from transact_core.base.errors import Cancelled, TransActError
from transact_core.data.corpus import corpus_from_text, read_corpus
from transact_core.experiments import tasks as tasks_module
from transact_core.experiments.bench import Choices, compress
from transact_core.experiments.harness import stock_config
from transact_core.experiments.task_data import (
    DEFAULT_SUITE,
    PAPER_SUITE,
    chosen_tasks,
    draw,
    open_tasks,
    read_task,
    task_of,
)
from transact_core.experiments.tasks import (
    aggregate,
    contestant_of,
    contestant_of_cut,
    run_tasks,
    tasks_report,
    tasks_table,
)

WORDS = read_corpus("builtin").text[:20_000].split()


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TRANSACT_CACHE", str(tmp_path / "cache"))


def phrase(generator, least=1, most=8):
    return " ".join(generator.choices(WORDS, k=generator.randint(least, most)))


def made_rows(task, count, seed=0):
    """Rows with the columns of a stock task, of words drawn at random."""
    draw = random.Random(f"{task} {seed}")
    text = lambda most=8: phrase(draw, 2, most)  # noqa: E731
    letters = ["A", "B", "C", "D"]

    def choices():
        return {"text": [text() for _ in letters], "label": letters}

    make = {
        "piqa": lambda: {
            "goal": text(),
            "sol1": text(),
            "sol2": text(),
            "label": draw.randrange(2),
        },
        "arc_easy": lambda: {
            "question": text(),
            "choices": choices(),
            "answerKey": draw.choice(letters),
        },
        "openbookqa": lambda: {
            "question_stem": text(),
            "choices": choices(),
            "answerKey": draw.choice(letters),
        },
        "boolq": lambda: {
            "passage": text(20),
            "question": text(),
            "label": draw.randrange(2),
        },
        "winogrande": lambda: {
            "sentence": f"{text()} _ {text()}",
            "option1": text(2),
            "option2": text(2),
            "answer": draw.choice("12"),
        },
        "hellaswag": lambda: {
            "query": text(15),
            "choices": [text() for _ in letters],
            "label": draw.randrange(4),
        },
        "lambada_openai": lambda: {"text": text(20)},
        "blimp_some": lambda: {
            "UID": draw.choice(["passive_1", "wh_island", "npi_present_2"]),
            "sentence_good": text(),
            "sentence_bad": text(),
        },
        "truthfulqa_mc2": lambda: {
            "question": text(),
            "mc1_targets": {"choices": [text() for _ in range(3)], "labels": [1, 0, 0]},
            "mc2_targets": {"choices": [text() for _ in range(4)], "labels": [1, 1, 0, 0]},
        },
    }[task]
    return [make() for _ in range(count)]


@pytest.fixture
def folder(tmp_path):
    """Writes rows as files of task data."""
    place = tmp_path / "data"
    place.mkdir()

    def write(**files):
        for name, rows in files.items():
            path = place / f"{name.replace('__', '.')}.jsonl"
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return place

    return write


@pytest.fixture
def loaded(tokenizer):
    # Longer than most: a prompt of TruthfulQA takes many tokens of a small vocabulary.
    return loaded_from(make_model(max_position_embeddings=2048), tokenizer)


@pytest.mark.parametrize(
    "name",
    [
        "piqa",
        "arc_easy",
        "openbookqa",
        "boolq",
        "winogrande",
        "hellaswag",
        "lambada_openai",
        "blimp_some",
        "truthfulqa_mc2",
    ],
)
def test_scores_are_those_of_the_stock_harness_item_by_item(name, folder, loaded):
    rows = made_rows(name, 14)
    task = task_of(read_task(name, 0, folder(**{name: rows})), 0, 9, 3)
    *_, last = run_tasks([task], contestant_of(loaded))
    numbers = [item.number for item in task.items]
    assert len(set(numbers)) == 9
    stock = stock_scores(name, rows, numbers, loaded.model, loaded.tokenizer)
    for number, question in zip(numbers, last.questions[0], strict=True):
        assert question.values == pytest.approx(stock.scores[number], abs=1e-3)
        likelihoods = [answer.log_likelihood for answer in question.answers]
        assert likelihoods == pytest.approx(stock.likelihoods[number], abs=1e-3)
    if "acc" in last.model.values:
        values = [stock.scores[number]["acc"] for number in numbers]
        assert last.model.values["acc"] == pytest.approx(np.mean(values))
        stderr = np.std(values, ddof=1) / math.sqrt(9)
        assert last.model.errors["acc"] == pytest.approx(stderr)


def test_a_text_that_is_scored_whole_is_cut_into_windows_as_the_harness_does(folder, tokenizer):
    from datasets import Dataset
    from lm_eval import evaluate
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.models.huggingface import HFLM

    loaded = loaded_from(make_model(max_position_embeddings=64), tokenizer)
    draw_from = random.Random(0)
    rows = [{"page": phrase(draw_from, 30, 90)} for _ in range(4)]
    task = task_of(read_task("wikitext", 0, folder(wikitext=rows)), 0, None, 0)
    *_, last = run_tasks([task], contestant_of(loaded))
    config = stock_config("wikitext")
    dataset = Dataset.from_list(rows)
    config["custom_dataset"] = lambda **_: dict.fromkeys(("train", "validation", "test"), dataset)
    stock = evaluate(
        HFLM(loaded.model, tokenizer=tokenizer),
        {"wikitext": ConfigurableTask(config=config)},
        bootstrap_iters=0,
    )["results"]["wikitext"]
    for metric in ("word_perplexity", "byte_perplexity", "bits_per_byte"):
        assert last.model.values[metric] == pytest.approx(stock[f"{metric},none"], rel=1e-5)
        assert last.model.errors[metric] > 0


def test_examples_are_those_that_the_stock_harness_draws(folder, loaded):
    from datasets import Dataset
    from lm_eval.api.task import ConfigurableTask

    rows, train = made_rows("arc_easy", 8), made_rows("arc_easy", 12, seed=1)
    place = folder(arc_easy=rows, arc_easy__train=train)
    task = task_of(read_task("arc_easy", 3, place), 3, 5, 7)
    order = [rows[item.number] for item in task.items]
    config = stock_config("arc_easy")
    splits = {"train": train, "validation": order, "test": order}
    config["custom_dataset"] = lambda **_: {
        split: Dataset.from_list(given) for split, given in splits.items()
    }
    config["num_fewshot"] = 3
    stock = ConfigurableTask(config=config)
    stock.set_fewshot_seed(7)
    stock.build_all_requests()
    made = [request.args for item in task.items for request in item.requests]
    assert made == [request.args for request in stock.instances]
    assert all(context.count("Answer:") == 4 for context, _ in made)
    assert len({context.rpartition("\n\n")[0] for context, _ in made}) == 5


# --- pairs -----------------------------------------------------------------------------------


def other_model(tokenizer):
    model = make_model(max_position_embeddings=2048)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for weight in model.parameters():
            weight += 0.05 * torch.randn(weight.shape, generator=generator)
    return loaded_from(model, tokenizer)


def test_differences_are_paired(folder, loaded, tokenizer):
    rows = made_rows("piqa", 60)
    (task,) = open_tasks("piqa", folder=folder(piqa=rows))
    other = other_model(tokenizer)
    *_, last = run_tasks([task], contestant_of(loaded), contestant_of(other))
    alone = [
        [question.values["acc"] for question in list(run_tasks([task], who))[-1].questions[0]]
        for who in (contestant_of(loaded), contestant_of(other))
    ]
    difference = np.subtract(*alone)
    assert 0 < np.abs(difference).sum() < 60
    assert last.difference.values["acc"] == pytest.approx(difference.mean())
    assert last.difference.errors["acc"] == pytest.approx(difference.std(ddof=1) / math.sqrt(60))
    assert last.difference.errors["acc"] < math.hypot(
        last.model.errors["acc"], last.against.errors["acc"]
    )
    assert last.chance == 0.5
    assert last.at_chance(last.model)


def test_a_model_that_is_sure_is_not_at_chance(folder, loaded):
    (task,) = open_tasks("piqa", folder=folder(piqa=made_rows("piqa", 30)))
    *_, last = run_tasks([task], contestant_of(loaded))
    figures = tasks_module.Figures(30, {"acc": 0.9}, {"acc": 0.05})
    assert not last.at_chance(figures)
    assert last.at_chance(tasks_module.Figures(30, {"acc": 0.59}, {"acc": 0.05}))
    assert last.at_chance(tasks_module.Figures(30, {"acc": 0.2}, {"acc": 0.05}))


@pytest.mark.parametrize(
    "aggregation", ["mean", "perplexity", "weighted_perplexity", "bits_per_byte"]
)
def test_the_influence_of_a_question_is_what_leaving_it_out_would_say(aggregation):
    """The infinitesimal jackknife beside the real one, on many questions."""
    generator = np.random.default_rng(0)
    values = generator.normal(-2, 0.5, 400)
    if "perplexity" != aggregation != "mean":
        values = np.stack([values * 5, generator.integers(3, 9, 400)], axis=1)
    value, influences = aggregate(aggregation, list(values))
    left_out = np.array(
        [aggregate(aggregation, list(np.delete(values, place, 0)))[0] for place in range(400)]
    )
    assert influences == pytest.approx((value - left_out) * 399, rel=0.05, abs=0.02 * abs(value))
    from lm_eval.api.registry import get_aggregation

    stock = get_aggregation(aggregation)(list(map(tuple, values)) if values.ndim > 1 else values)
    assert value == pytest.approx(stock)


# --- kept ------------------------------------------------------------------------------------


@pytest.fixture
def scored(monkeypatch):
    """The numbers of questions of the blocks that were really scored."""
    blocks, score = [], tasks_module.score_continuations

    def counting(model, groups, *rest):
        answers = score(model, groups, *rest)
        blocks.append(len(groups))
        return answers

    monkeypatch.setattr(tasks_module, "score_continuations", counting)
    return blocks


def test_no_block_is_scored_twice_after_a_run_that_ended_in_the_middle(
    folder, loaded, tokenizer, scored
):
    place = folder(piqa=made_rows("piqa", 80), arc_easy=made_rows("arc_easy", 30))
    other = other_model(tokenizer)

    def begin():
        tasks = open_tasks("piqa,arc_easy", folder=place)
        return run_tasks(tasks, contestant_of(loaded), contestant_of(other), stop)

    shown = []

    def stop(stage, done, total):
        shown.append((done, total))
        if len(scored) == 5:
            raise Cancelled

    with pytest.raises(Cancelled):
        list(begin())
    assert scored == [25] * 5
    assert {total for _, total in shown} == {220}
    assert [done for done, _ in shown] == sorted(done for done, _ in shown)
    scored.append(0)  # so that `stop` lets the rest pass

    standings = list(begin())
    # Four blocks of the one task and two of the other, for two models, but for the five above.
    assert sum(scored[6:]) == 2 * (80 + 30) - 5 * 25
    assert [standing.asked for standing in standings if standing.task == "piqa"] == [25, 50, 75, 80]
    assert [standing.task for standing in standings[:4]] == ["piqa", "arc_easy"] * 2
    again = len(scored)
    assert [repr(standing) for standing in begin()] == [repr(standing) for standing in standings]
    assert len(scored) == again


def test_more_questions_cost_only_the_new_ones(folder, loaded, scored):
    place = folder(piqa=made_rows("piqa", 80))
    for limit in (50, 75):
        list(run_tasks(open_tasks("piqa", limit, folder=place), contestant_of(loaded)))
    assert scored == [25] * 3
    # Other questions, another order, examples or rows are other blocks.
    list(run_tasks(open_tasks("piqa", 25, folder=place, seed=1), contestant_of(loaded)))
    assert scored == [25] * 4
    folder(piqa=made_rows("piqa", 80, seed=1))
    list(run_tasks(open_tasks("piqa", 25, folder=place), contestant_of(loaded)))
    assert scored == [25] * 5


def test_a_cut_is_made_only_where_a_block_is_not_kept(
    folder, gqa_model, tokenizer, windows, scored
):
    bench = bench_of(gqa_model, tokenizer, windows)
    plan = bench.plan(0.5, 0.3, Choices())
    (task,) = open_tasks("piqa", folder=folder(piqa=made_rows("piqa", 30)))
    model, _ = compress(bench, plan, "least-squares")
    *_, given = run_tasks([task], contestant_of_cut(bench, plan, "least-squares", model))
    assert scored == [25, 5]
    kept = contestant_of_cut(bench, plan, "least-squares")
    assert list(run_tasks([task], kept))[-1].model == given.model
    assert scored == [25, 5]
    *_, bare = run_tasks([task], contestant_of_cut(bench, plan, "none"))
    assert scored == [25, 5, 25, 5]
    dense = contestant_of(bench.loaded)
    assert list(run_tasks([task], dense))[-1].questions != bare.questions


# --- which questions -------------------------------------------------------------------------


def test_fewer_questions_are_the_first_of_more():
    assert draw(100, 10, 0) == draw(100, None, 0)[:10]
    assert sorted(draw(100, None, 0)) == list(range(100))
    assert draw(100, 10, 0) != draw(100, 10, 1)


def test_without_names_or_data_the_tasks_are_from_ones_own_text(folder, loaded):
    assert [spec.name for spec in chosen_tasks(None)] == ["continuation", "last_word"]
    text = corpus_from_text("mine", read_corpus("builtin").text[:60_000])
    tasks = open_tasks(None, 30, text=text)
    results = {standing.task: standing for standing in run_tasks(tasks, contestant_of(loaded))}
    assert results["continuation"].chance == 0.25
    assert results["continuation"].asked == results["last_word"].asked == 30
    assert results["last_word"].chance is None
    assert results["last_word"].model.values["perplexity"] > 1


def test_suites(folder):
    place = folder(piqa=made_rows("piqa", 3), boolq=made_rows("boolq", 3))
    assert [spec.name for spec in chosen_tasks(None, place)] == ["piqa"]
    assert [spec.name for spec in chosen_tasks("default")] == list(DEFAULT_SUITE)
    paper = {spec.name: spec.shots for spec in chosen_tasks("paper")}
    assert paper == PAPER_SUITE
    assert {spec.shots for spec in chosen_tasks("paper", shots=2)} == {2}


@pytest.mark.parametrize(
    ("names", "complaint"),
    [
        ("piqa,piqa", "none twice"),
        (",", "at least one task"),
        ("no_such_task", "has no no_such_task.jsonl; it has data of mmlu, piqa"),
        ("mmlu", "no single task named 'mmlu'"),
        ("../piqa", "has no ../piqa.jsonl"),
    ],
)
def test_tasks_that_are_none_are_refused(names, complaint, folder):
    place = folder(piqa=made_rows("piqa", 3), mmlu=[{"question": "?"}])
    with pytest.raises(TransActError, match=complaint.replace("?", r"\?").replace("..", r"\.\.")):
        open_tasks(names, folder=place)


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"{", "Line 1 of .* is not JSON"),
        (b'{"a": 1}\n\xff\n', "is not JSON in UTF-8"),
        (b"[1]\n", "Line 1 of .* is no object"),
        (b"\n", "holds no rows"),
        (b'{"goal": "x"}\n', "do not have the columns that the stock task reads"),
        (b'{"goal": 1}\n{"goal": {"a": []}}\n', "do not have the columns"),
    ],
)
def test_files_that_are_no_task_data_are_refused(content, complaint, folder):
    place = folder()
    (place / "piqa.jsonl").write_bytes(content)
    with pytest.raises(TransActError, match=complaint):
        open_tasks("piqa", folder=place)


def test_examples_need_a_file_of_their_own(folder):
    place = folder(piqa=made_rows("piqa", 3))
    with pytest.raises(TransActError, match=r"piqa\.train\.jsonl is not there"):
        open_tasks("piqa", folder=place, shots=2)
    folder(piqa__train=made_rows("piqa", 1, seed=1))
    with pytest.raises(TransActError, match="has 1 examples where 2 are to be shown"):
        open_tasks("piqa", folder=place, shots=2)
    with pytest.raises(TransActError, match="leave --few-shot out"):
        open_tasks("continuation", shots=1)
    with pytest.raises(TransActError, match="cannot be read"):
        open_tasks("piqa", folder=place / "nowhere")


def test_tasks_that_are_written_are_refused(folder):
    with pytest.raises(TransActError, match="has the model write its answer"):
        open_tasks("gsm8k", folder=folder(gsm8k=[{"question": "?", "answer": "1"}]))


def test_without_a_hub_the_refusal_is_one_sentence_at_once(monkeypatch):
    asked = []

    def unreachable(self, name, timeout):
        asked.append(name)
        raise ConnectionError("no route to host")

    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", unreachable)
    monkeypatch.setattr("datasets.load_dataset", None)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    with pytest.raises(
        TransActError, match=r"cannot be reached .*\(--task-data\) with piqa\.jsonl"
    ):
        open_tasks("piqa")
    assert asked == ["baber/piqa"]


def test_without_the_package_the_refusal_says_how_to_install_it(monkeypatch):
    monkeypatch.setattr("transact_core.experiments.harness.find_spec", lambda name: None)
    with pytest.raises(TransActError, match=r"--no-deps lm_eval==0\.4\.13 sacrebleu"):
        open_tasks(None)


# --- what is written -------------------------------------------------------------------------


def test_tasks_json_and_the_table(folder, loaded, tokenizer):
    place = folder(piqa=made_rows("piqa", 30), lambada_openai=made_rows("lambada_openai", 1))
    tasks = open_tasks("piqa,lambada_openai", folder=place)
    sides = contestant_of(loaded), contestant_of(other_model(tokenizer))
    standings = {standing.task: standing for standing in run_tasks(tasks, *sides)}
    report = json.loads(json.dumps(tasks_report(standings, 0, None), allow_nan=False))
    assert set(report) == {"tasks", "seed", "limit", "versions"}
    piqa = report["tasks"]["piqa"]
    for side in ("model", "against", "difference"):
        assert set(piqa[side]) == {"acc", "acc_stderr", "acc_norm", "acc_norm_stderr", "n"}
    difference = piqa["model"]["acc"] - piqa["against"]["acc"]
    assert piqa["difference"]["acc"] == pytest.approx(difference)
    # One question has no standard error.
    assert report["tasks"]["lambada_openai"]["model"]["acc_stderr"] is None
    assert report["versions"]["lm_eval"] == "0.4.13"
    table = tasks_table(standings.values())
    assert "* at chance" in table
    assert len(table.splitlines()) == 1 + 2 + 2 + 1


def test_nothing_of_the_process_is_changed(folder, loaded):
    """The harness would seed every generator and give the tokenizer a padding token."""
    random.seed(1)
    torch.manual_seed(1)
    before = random.getstate(), torch.get_rng_state(), logging.getLogger().level
    weights = {name: weight.clone() for name, weight in loaded.model.state_dict().items()}
    (task,) = open_tasks("piqa", folder=folder(piqa=made_rows("piqa", 5)))
    list(run_tasks([task], contestant_of(loaded)))
    assert random.getstate() == before[0]
    assert torch.equal(torch.get_rng_state(), before[1])
    assert logging.getLogger().level == before[2]
    for name, weight in loaded.model.state_dict().items():
        assert torch.equal(weight, weights[name])
