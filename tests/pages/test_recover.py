"""The page Recover on a tiny model: trained, paused, found again, refused."""

import json
import math
import re
import threading
from importlib.util import find_spec

import pytest
import torch
from safetensors.torch import load_file

from benchmarks.gguf_frontier import trained_cuts
from pages.parts.trained_cuts import trained_frame
from pages.server import trainings
from pages.server.request import Cut, Request
from pages.server.settings import read_settings
from pages.server.trainings import TrainingRun
from pages.server.visitors import Visit, Visitor
from tests.conftest import KINDS, make_model
from tests.pages.conftest import ended, exchange, workbench_inline
from tests.pages.test_pages import button, texts, work_of
from tests.trust.installed import require_llama_cpp_installed
from transact_core.base.errors import Cancelled, TransActError, silent
from transact_core.data.corpus import read_corpus
from transact_core.experiments import tasks as tasks_module
from transact_core.experiments.side_by_side import TEXT
from transact_core.forward.perplexity import token_losses
from transact_core.models.load import load_model
from transact_core.training import loop, teacher_cache
from transact_core.training.loop import Pace
from transact_core.workers import work
from transact_core.workers.tasks import WorkerDied

pytestmark = pytest.mark.usefixtures("links_in_words", "short_texts")
CUT = Cut(0.34, 0.5)
STEP = 4 * 32
"""Tokens of a step."""


@pytest.fixture(scope="module")
def place(tokenizer, tmp_path_factory):
    """A folder with a model and a text."""
    folder = tmp_path_factory.mktemp("recover")
    make_model(**KINDS["gqa-tied"]).save_pretrained(folder / "dense")
    tokenizer.save_pretrained(folder / "dense")
    (folder / "mine.txt").write_text(read_corpus("builtin").text[:60_000])
    return folder


@pytest.fixture
def request_of_page(place) -> Request:
    text = str(place / "mine.txt")
    return Request(str(place / "dense"), "auto", "auto", text, text, 512, 256, 32)


@pytest.fixture
def opened(own_workbench, monkeypatch, place, request_of_page, tmp_path):
    monkeypatch.setenv("TRANSACT_CACHE", str(tmp_path / "cache"))
    folders = {
        "TRANSACT_READ_FOLDERS": str(place),
        "TRANSACT_WRITE_FOLDERS": str(tmp_path),
    }
    allowed = read_settings(folders, "localhost")
    exchange(monkeypatch, "settings", lambda: allowed)
    ended(own_workbench.open(request_of_page).dense)
    return own_workbench


@pytest.fixture
def visitor_with_a_cut(opened, request_of_page):
    """Makes a visitor who has measured the cut."""

    def make(visitor: Visitor | None = None) -> Visit:
        visit = Visit(visitor)
        visit.request, visit.cut = request_of_page, CUT
        point = opened.run(request_of_page, work.cut, silent, CUT.ratios, CUT.choices)
        visit.visitor.of(request_of_page).points[:] = [point]
        return visit

    return make


@pytest.fixture
def mine(visitor_with_a_cut) -> Visit:
    return visitor_with_a_cut()


def choose(page, steps: int = 6):
    """A training on the text of the test, of so many steps."""
    page.multiselect(key="recover_text").set_value(["mine.txt"])
    page.number_input(key="recover_tokens").set_value(steps * STEP)
    page.number_input(key="recover_rate").set_value(3e-3)
    page.number_input(key="recover_watched").set_value(64)
    page.run()
    assert not page.exception
    return page


def last_run(page) -> TrainingRun:
    visit = page.session_state["visit"]
    runs = visit.visitor.of(visit.request).found["trainings"].values()
    return max(runs, key=lambda run: run.began)


def said(page) -> str:
    return "\n".join(
        [texts(page), *(each.value for each in (*page.success, *page.warning, *page.error))]
    )


def charts(page) -> list[dict]:
    return [json.loads(chart.proto.spec) for chart in page.get("plotly_chart")]


def stop_at(step: int, monkeypatch):
    """As if the worker had been stopped in the middle of a step."""
    take = loop.take_step

    def stopped(*arguments):
        if arguments[-1] == step:
            raise Cancelled
        return take(*arguments)

    monkeypatch.setattr(loop, "take_step", stopped)
    return lambda: monkeypatch.setattr(loop, "take_step", take)


def test_a_cut_is_trained_shown_and_taken_away(open_page, mine, tmp_path):
    page = choose(open_page("recover", mine))
    assert "How long it takes is known after the first steps" in said(page)
    assert "MB of memory" in said(page)
    work_of(page, "Train")
    run = last_run(page)
    assert (run.step, run.steps) == (6, 6)
    page.run()
    assert not page.exception
    _, trained, figures = run.outcome
    assert trained.sentence in said(page).replace("\\", "")
    assert len(charts(page)) == 2
    (table,) = page.dataframe
    assert table.value["trained"].tolist() == [text.trained for text in figures]
    assert "python -m transact_core tune" in page.code[0].value
    # Both held-out texts have their share; the other kind is Python's reference.
    assert {metric.label for metric in page.metric} == {
        "Back on mine.txt",
        "Back on Python's reference",
    }
    # The same again is shown and not trained; the speed is told from the last one.
    assert button(page, "Train").disabled
    page.number_input(key="recover_tokens").set_value(12 * STEP).run()
    assert not button(page, "Train").disabled
    assert "as your last training went here" in said(page)
    folder = tmp_path / "taken"
    next(box for box in page.text_input if box.label.startswith("Folder on")).set_value(str(folder))
    work_of(page.run(), "Write the checkpoint")
    assert (folder / "model.safetensors").read_bytes() == (
        run.trained_folder / "model.safetensors"
    ).read_bytes()
    # It stands beside the cut on the page Perplexity.
    page = open_page("perplexity", mine)
    assert not page.exception
    assert "trained" in page.dataframe[-1].value


def test_another_visitor_sees_nothing_of_it(open_page, mine, visitor_with_a_cut):
    work_of(choose(open_page("recover", mine), 2), "Train")
    other = open_page("recover", visitor_with_a_cut())
    assert not other.exception
    assert "not finished" not in said(other)
    assert not other.metric
    assert not other.session_state["visit"].visitor.of(mine.request).found["trainings"]


def test_a_stopped_training_is_found_again_after_a_restart_and_goes_on(
    open_page, mine, visitor_with_a_cut, request_of_page, monkeypatch
):
    go_on = stop_at(5, monkeypatch)
    page = choose(open_page("recover", mine), 8)
    button(page, "Train").click().run()
    job = ended(mine.visitor.jobs[-1])
    assert job.state == "cancelled"
    page.run()
    assert "Paused after step 5 of 8" in said(page)
    before = list(last_run(page).curve.losses)

    # A new server knows nothing but what is on disk, and that it is the same browser.
    again = workbench_inline()
    exchange(monkeypatch, "workbench", lambda: again)
    visit = Visit(Visitor(key=mine.visitor.key))
    visit.request, visit.cut = request_of_page, CUT
    ended(again.open(request_of_page).dense)
    page = open_page("recover", visit)
    assert not page.exception
    assert "Paused after step 5 of 8" in said(page)
    assert len(charts(page)) == 2
    assert page.number_input(key="recover_tokens").value == 8 * STEP
    assert "go on with it below" in said(page)
    go_on()
    work_of(page, "Go on")
    run = last_run(page)
    assert run.step == 8
    assert run.curve.losses[:5] == before
    assert again.stop(10)


def test_a_killed_worker_is_told_and_the_training_goes_on(opened, open_page, mine, monkeypatch):
    worker = opened.only_lane.worker
    run, go_on = worker.run, stop_at(5, monkeypatch)
    # A look after every second step: the fifth one is not kept.
    monkeypatch.setattr(loop, "EVALUATIONS", 4)

    def die(task, report, received):
        outcome = run(task, report, received)
        if task.function.endswith(":train_cut"):
            raise WorkerDied("The process that did the work was ended from outside (SIGKILL).")
        return outcome

    monkeypatch.setattr(worker, "run", die)
    page = choose(open_page("recover", mine), 8)
    button(page, "Train").click().run()
    assert ended(mine.visitor.jobs[-1]).state == "failed"
    page.run()
    assert "ended from outside (SIGKILL)" in said(page)
    assert "Paused after step 4 of 8" in said(page)
    monkeypatch.setattr(worker, "run", run)
    go_on()
    work_of(page, "Go on")
    assert last_run(page).step == 8


def test_stopped_it_keeps_the_best(open_page, mine, monkeypatch):
    reached, go_on, take = threading.Event(), threading.Event(), loop.take_step

    def wait_at_the_third(*arguments):
        if arguments[-1] == 3:
            reached.set()
            go_on.wait(10)
        return take(*arguments)

    monkeypatch.setattr(loop, "take_step", wait_at_the_third)
    page = choose(open_page("recover", mine), 12)
    button(page, "Train").click().run()
    assert reached.wait(20)
    page.run()
    assert "384 of 1,536 tokens" in page.get("progress")[0].proto.text
    # In another tab too, while it runs.
    tab = open_page("recover", Visit(mine.visitor))
    assert button(tab, "Pause") is not None
    button(tab, "Stop and keep the best").click().run()
    go_on.set()
    job = ended(mine.visitor.jobs[-1])
    assert job.error is None
    record, trained, _ = last_run(page).outcome
    assert record.trained_tokens == 4 * STEP
    assert "before its tokens were used up" in trained.why
    page.run()
    assert not page.exception
    assert button(page, "Go on") is None


def test_trainings_of_two_visitors_take_turns(open_page, mine, visitor_with_a_cut, monkeypatch):
    monkeypatch.setattr(trainings, "TURN_SECONDS", -1)
    trained, take, both = [], loop.take_step, threading.Event()

    def noted(*arguments):
        both.wait(10)
        trained.append(arguments[6].seed)
        return take(*arguments)

    monkeypatch.setattr(loop, "take_step", noted)
    jobs = []
    for seed, visit in ((0, mine), (1, visitor_with_a_cut())):
        page = choose(open_page("recover", visit), 3)
        page.number_input(key="recover_seed").set_value(seed).run()
        button(page, "Train").click().run()
        jobs.append(visit.visitor.jobs[-1])
    both.set()
    assert [ended(job).error for job in jobs] == [None, None]
    assert sorted(trained) == [0, 0, 0, 1, 1, 1]
    assert trained not in ([0, 0, 0, 1, 1, 1], [1, 1, 1, 0, 0, 0])


def test_a_budget_of_minutes_is_planned_by_the_first_steps(open_page, mine, monkeypatch):
    def pace(models, report, spec, training):
        return Pace(trained=STEP / 14, watched=1e9)

    pace.__module__, pace.__qualname__ = work.__name__, "training_pace"
    monkeypatch.setattr(work, "training_pace", pace)
    page = open_page("recover", mine)
    page.segmented_control(key="recover_unit").set_value("Minutes").run()
    page.multiselect(key="recover_text").set_value(["mine.txt"])
    page.number_input(key="recover_minutes").set_value(1.0).run()
    assert "The first steps are timed" in said(page)
    work_of(page, "Train")
    # 14 seconds a step.
    assert last_run(page).tokens == 4 * STEP
    assert last_run(page).step == 4


def test_a_cut_that_is_not_measured_leads_to_compress(opened, open_page, request_of_page):
    visit = Visit()
    visit.request, visit.cut = request_of_page, CUT
    page = open_page("recover", visit)
    assert not page.exception
    assert "only measured cuts are trained" in said(page)
    assert "link to compress" in said(page)
    assert button(page, "Train") is None


def test_what_cannot_be_trained_is_refused_in_a_sentence(open_page, mine, monkeypatch):
    page = choose(open_page("recover", mine))
    page.number_input(key="recover_tokens").set_value(STEP - 1).run()
    assert "fewer than one step of 4 windows of 32" in said(page)
    assert button(page, "Train").disabled
    choose(page)
    with monkeypatch.context() as patched:
        patched.setattr(trainings, "free_memory", lambda device: 1000)
        page.run()
        assert "free some memory, choose LoRA" in said(page)
        assert button(page, "Train").disabled
    with monkeypatch.context() as patched:
        patched.setattr(
            "importlib.util.find_spec",
            lambda name, *rest: None if name == "peft" else find_spec(name, *rest),
        )
        page.segmented_control(key="recover_method").set_value("lora").run()
        assert "run `make tune`" in said(page).replace("\\", "")
        assert button(page, "Train").disabled


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("builtin+/etc/passwd", "may not be read from the browser"),
        ("generated:many", "is not of the form generated"),
    ],
)
def test_a_text_that_cannot_be_trained_on_is_refused_before_anything_is_written(
    open_page, mine, source, words
):
    page = choose(open_page("recover", mine))
    page.session_state["recover_text"] = source.split("+")  # as typed
    page.run()
    button(page, "Train").click().run()
    job = ended(mine.visitor.jobs[-1])
    assert words in job.error
    page.run()
    assert words in said(page).replace("\\", "")
    assert not last_run(page).cut_folder.exists()


def test_without_a_training_that_is_done_the_table_has_no_rows():
    assert trained_frame([]).empty


def test_predictions_are_written_down_once_for_all_trainings_on_a_text(
    open_page, mine, monkeypatch
):
    page = choose(open_page("recover", mine), 2)
    page.toggle(key="recover_written_down").set_value(True).run()
    told = float(re.search(r"at most ([\d.,]+) MB of disk", said(page))[1])
    work_of(page, "Train")
    first = last_run(page)
    assert first.outcome[0].teacher_top == teacher_cache.TOP
    assert any("are written down for" in notice for notice in first.notices)
    (store,) = teacher_cache.folder_in_cache().iterdir()
    taken = sum(path.stat().st_size for path in store.iterdir())
    assert 0 < taken <= 1e6 * told + 5e4

    def refuse(*_):
        pytest.fail("the dense model was asked")

    for name in ("scored_states", "top_of"):
        monkeypatch.setattr(teacher_cache, name, refuse)
    page = open_page("recover", mine)
    assert page.toggle(key="recover_written_down").value
    page.number_input(key="recover_rate").set_value(1e-3).run()
    work_of(page, "Train")
    second = last_run(page)
    assert second is not first
    assert second.step == 2
    assert any("is written down already" in notice for notice in second.notices)
    assert sum(path.stat().st_size for path in store.iterdir()) == taken


def pick_trained(page):
    """Chooses the trained cut, which stands last."""
    (box,) = (each for each in page.selectbox if each.label == "Cut")
    assert "trained on 256 tokens of mine.txt" in box.options[-1]
    return box.set_value(len(box.options) - 1).run()


def test_a_trained_cut_answers_tasks_and_is_compared_token_by_token(
    open_page, mine, tmp_path, monkeypatch
):
    pytest.importorskip("lm_eval")
    work_of(choose(open_page("recover", mine), 2), "Train")
    trained = last_run(open_page("recover", mine)).trained_cut
    blocks, score = [], tasks_module.score_continuations

    def scored(model, *rest):
        blocks.append({name: weight.clone() for name, weight in model.state_dict().items()})
        return score(model, *rest)

    monkeypatch.setattr(tasks_module, "score_continuations", scored)
    page = open_page("tasks", mine)
    page.number_input(key="tasks_limit_From a text").set_value(25)
    work_of(pick_trained(page), "Run the tasks")
    page.run()
    assert not page.exception
    assert "50 of 50 questions answered" in said(page)
    assert "trained on 256 tokens of mine" in said(page).replace("\\", "")
    run = mine.visitor.of(mine.request).found["tasks"]
    # Two tasks, answered by the weights in the folder of the training and by the dense ones.
    stored = load_file(trained.folder / "model.safetensors")
    assert len(blocks) == 4
    assert all(torch.equal(blocks[0][name], stored[name].float()) for name in stored)
    # The cut it came from has answers of its own; the dense model's are kept.
    (box,) = (each for each in page.selectbox if each.label == "Cut")
    work_of(box.set_value(0).run(), "Run the tasks")
    of_cut = mine.visitor.of(mine.request).found["tasks"]
    assert len(blocks) == 6
    assert of_cut.standings["continuation"].against == run.standings["continuation"].against
    assert not all(torch.equal(blocks[-1][name], blocks[0][name]) for name in stored)
    assert of_cut.is_of(trained.plan, trained.recovery)
    assert not run.is_of(trained.plan, trained.recovery)

    work_of(pick_trained(page), "Run the tasks")
    assert len(blocks) == 6
    page = open_page("recover", mine)
    assert "What it answered on the Tasks page" in said(page)
    folder = tmp_path / "taken"
    next(box for box in page.text_input if box.label.startswith("Folder on")).set_value(str(folder))
    work_of(page.run(), "Write the checkpoint")
    assert json.loads((folder / "report.json").read_text())["tasks"] == run.report()
    card = (folder / "README.md").read_text()
    assert card.index("## Trained after the cut") < card.index("| dense | trained |")

    page = pick_trained(open_page("damage", mine))
    page.multiselect(key="damage_texts").set_value([mine.request.evaluation])
    page.number_input(key="damage_tokens").set_value(256).run()
    work_of(page, "Compare the predictions")
    (text,) = mine.visitor.of(mine.request).found["damage"].texts
    nll = sum(piece.pruned_nll for piece in text.pieces) / sum(
        piece.tokens for piece in text.pieces
    )
    assert math.exp(nll) == pytest.approx(trained.perplexity, rel=1e-4)
    page.run()
    assert "trained on 256 tokens" in said(page)

    page = pick_trained(open_page("compare", mine))
    page.number_input(key="new_tokens").set_value(2).run()
    work_of(page, "Run both")
    losses = mine.visitor.of(mine.request).found["compare"].losses[TEXT].losses
    loaded = load_model(str(trained.folder))
    ids = loaded.tokenizer(page.text_area[0].value, return_tensors="pt")["input_ids"][0]
    torch.testing.assert_close(losses["pruned"], token_losses(loaded.model, ids))
    page.run()
    assert "trained on 256 tokens" in said(page)


def test_a_trained_cut_is_measured_as_a_file_beside_the_cut_and_the_dense_model(open_page, mine):
    require_llama_cpp_installed()
    work_of(choose(open_page("recover", mine), 2), "Train")
    trained = last_run(open_page("recover", mine)).trained_cut
    page = open_page("deploy", mine)
    page.multiselect(key="deploy_types").set_value(["F32"])
    page.toggle(key="deploy_timed").set_value(False).run()
    assert "trained on 256 tokens of mine" in page.multiselect(key="deploy_models").options[-1]
    work_of(page, "Measure 3 files")
    page.run()
    assert not page.exception
    assert button(page, "All of these are measured").disabled
    (table,) = (each.value for each in page.dataframe if "on_frontier" in each.value)
    rows = table.set_index("model")
    (name,) = (each for each in rows.index if each.endswith(", trained on 256 tokens"))
    assert set(rows.index) == {"dense", name, name.removesuffix(", trained on 256 tokens")}
    assert rows["trained on"].notna().sum() == 1
    assert rows.loc[name, "trained on"] == "mine.txt"
    assert rows.loc[name, "perplexity"] == pytest.approx(trained.perplexity, rel=1e-3)
    assert rows["perplexity"].nunique() == 3
    assert rows.loc[name, "MB"] == rows.loc[name.removesuffix(", trained on 256 tokens"), "MB"]
    with pytest.raises(TransActError, match="no cut of the built-in model"):
        trained_cuts([trained.folder])
