"""The pages Tasks and Token damage on a tiny model."""

import json

import pytest

pytest.importorskip("lm_eval")

from pages.server.request import Request
from pages.server.settings import read_settings
from pages.server.task_runs import TaskRun
from pages.server.visitors import Visit
from tests.pages.conftest import ended
from tests.pages.test_pages import button, texts, work_of
from transact_core.base.errors import Cancelled
from transact_core.data.corpus import corpus_from_text, read_corpus
from transact_core.data.own_text import OWN_TEXT_TASKS
from transact_core.experiments import tasks as tasks_module
from transact_core.workers import work


def last_run(page) -> TaskRun:
    visit = page.session_state["visit"]
    return visit.visitor.of(visit.request).found["tasks"]


def charts(page) -> list[dict]:
    return [json.loads(chart.proto.spec) for chart in page.get("plotly_chart")]


@pytest.fixture
def scored(monkeypatch):
    """The numbers of questions in each block that is scored."""
    blocks = []
    score = tasks_module.score_continuations

    def counted(model, groups, *rest):
        blocks.append(len(groups))
        return score(model, groups, *rest)

    monkeypatch.setattr(tasks_module, "score_continuations", counted)
    return blocks


def test_tasks_from_a_text_are_run_shown_and_not_scored_again(open_page, scored, monkeypatch):
    # Every block is a piece of its own, as where others wait.
    monkeypatch.setattr(work, "PIECE_SECONDS", 0)
    page = open_page("tasks")
    assert not page.exception
    work_of(page, "Run the tasks")
    run = last_run(page)
    assert set(run.history) == set(OWN_TEXT_TASKS)
    # Two tasks of two blocks by two models, and the interval narrows.
    assert scored == [25] * 8
    for after in run.history.values():
        assert [each.asked for each in after] == [25, 50]
        errors = [each.difference.errors["acc"] for each in after]
        assert errors[1] < errors[0] or errors == [0, 0]
    page.run()
    assert not page.exception
    assert len(charts(page)) == 2
    assert "100 of 100 questions answered" in texts(page)
    # A random model guesses.
    assert "at chance (25%)" in " ".join(each.value for each in page.warning)
    again = work_of(page, "Run the tasks")
    assert again.state == "done"
    assert len(scored) == 8
    assert last_run(page).standings == run.standings
    # The table as the command writes it: model is the cut, against is the dense model.
    report = json.loads(json.dumps(last_run(page).report()))
    entry = report["tasks"]["continuation"]
    assert entry["model"]["acc"] - entry["against"]["acc"] == pytest.approx(
        entry["difference"]["acc"]
    )
    assert (report["seed"], report["limit"]) == (0, 50)


def test_the_dense_model_alone_needs_no_cut(opened, open_page, scored):
    page = open_page("tasks")
    page.toggle(key="tasks_alone").set_value(True).run()
    work_of(page, "Run the tasks")
    page.run()
    assert not page.exception
    assert scored == [25] * 4
    assert not page.session_state["visit"].visitor.of(Request()).points
    (chart,) = charts(page)
    assert "of 1 tasks of choices" in chart["layout"]["title"]["text"]
    assert "The dense model alone" in texts(page)


def test_a_stopped_run_keeps_its_blocks_and_goes_on(opened, open_page, scored, monkeypatch):
    monkeypatch.setattr(work, "PIECE_SECONDS", 0)
    page = open_page("tasks")
    score = tasks_module.score_continuations

    def stop_at_the_fourth(*arguments):
        if len(scored) == 4:
            raise Cancelled
        return score(*arguments)

    monkeypatch.setattr(tasks_module, "score_continuations", stop_at_the_fourth)
    button(page, "Run the tasks").click().run()
    job = ended(page.session_state["visit"].visitor.jobs[-1])
    assert job.state == "cancelled"
    page.run()
    assert "50 of 100 questions answered" in texts(page)
    # A reload of the same visitor finds it again; another visitor does not.
    tab = open_page("tasks", Visit(page.session_state["visit"].visitor))
    assert "50 of 100 questions answered" in texts(tab)
    assert button(tab, "Go on") is not None
    assert "questions answered" not in texts(open_page("tasks", Visit()))
    monkeypatch.setattr(tasks_module, "score_continuations", score)
    work_of(tab, "Go on")
    assert scored == [25] * 8


def test_tasks_that_cannot_be_run_are_refused_before_a_cut_is_made(
    open_page, tmp_path, monkeypatch
):
    allowed = read_settings({"TRANSACT_READ_FOLDERS": str(tmp_path)}, "localhost")
    monkeypatch.setattr("pages.server.task_runs.settings", lambda: allowed)
    page = open_page("tasks")
    page.segmented_control(key="tasks_kind").set_value("By name").run()
    assert button(page, "Run the tasks").disabled
    page.text_input(key="tasks_names").set_value("piqa").run()
    page.selectbox(key="tasks_data").set_value("Folder").run()
    assert button(page, "Run the tasks").disabled
    for folder, words in (("/etc", "may not be read from the browser"), (tmp_path, "has no piqa")):
        page.text_input(key="tasks_folder").set_value(str(folder)).run()
        button(page, "Run the tasks").click().run()
        job = ended(page.session_state["visit"].visitor.jobs[-1])
        assert words in job.error
    assert not page.session_state["visit"].visitor.of(Request()).points


def test_damage_to_texts_is_shown_token_by_token(open_page, monkeypatch):
    # Shorter, as the whole text is tokenised.
    monkeypatch.setattr(
        work,
        "read_corpus",
        lambda source: corpus_from_text(source, read_corpus(source).text[:20_000]),
    )
    page = open_page("damage")
    assert not page.exception
    work_of(page, "Compare the predictions")
    page.run()
    assert not page.exception
    visit = page.session_state["visit"]
    first, second = visit.visitor.of(visit.request).found["damage"].texts
    assert (first.source, second.source) == ("builtin", "builtin-code")
    # All tokens but the first of each window.
    windows = first.pieces[-1].window + 1
    assert sum(piece.tokens for piece in first.pieces) == first.tokens - windows
    (chart,) = charts(page)
    assert "× as much as" in chart["layout"]["title"]["text"]
    assert "worst fifth of the tokens carries" in texts(page)
    table = page.dataframe[0].value
    assert table["damage_nats"].is_monotonic_decreasing
    assert table["damage_nats"].iloc[0] == max(piece.damage for piece in first.pieces)
