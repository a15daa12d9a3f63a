"""Curves of the Perplexity page where TRANSACT_RAY names a cluster; the workers are in this process."""

from dataclasses import replace

import pytest
from streamlit.testing.v1 import AppTest

import pages.server.start_jobs as start_jobs
from pages.server.jobs import CANCELLED, DONE, FAILED
from pages.server.request import Request
from pages.server.settings import Settings, read_settings
from pages.server.visitors import Visit
from tests.pages.conftest import ended, exchange
from tests.workers.fake_ray import FakeRay
from transact_core.base.errors import TransActError
from transact_core.workers import on_ray


@pytest.fixture
def cluster(monkeypatch, opened, gqa_bench):
    """A cluster of two nodes, to which the pages send curves, and the names of its functions."""
    made = FakeRay({"one": 64, "two": 64})
    monkeypatch.setattr(on_ray, "require_ray", lambda: made)
    monkeypatch.setattr("transact_core.workers.open_models.load_model", lambda *_: gqa_bench.loaded)
    exchange(monkeypatch, "settings", lambda: replace(Settings("localhost", (), ()), ray="auto"))
    return made


def measure(page: AppTest, points: int = 3):
    page.selectbox(key="curve").set_value("MLP only").run()
    page.number_input(key="count").set_value(points)
    page.selectbox(key="curve_recovery").set_value("least-squares").run()
    (button,) = [each for each in page.button if each.label == "Measure the curve"]
    button.click().run()
    return page.session_state["visit"].visitor.jobs[-1]


def points(page: AppTest):
    return page.session_state["visit"].visitor.of(Request()).points


def captions(page: AppTest) -> str:
    return " ".join(each.value for each in page.caption).replace("\\", "")


def test_a_curve_goes_to_the_cluster_and_the_page_says_so(opened, open_page, cluster):
    cluster.differing["two"] = {"torch": "1.0"}
    page = open_page("perplexity")
    assert "are measured on the Ray cluster at `auto`" in captions(page)
    job = ended(measure(page))
    assert (job.state, job.result) == (DONE, 3)
    asked = [function for _, function in cluster.asked]
    assert asked.count("curve_point") == 3
    page.run()
    assert not page.exception
    assert len(page.dataframe[0].value) == 3
    assert "two (192.0.2.1) takes no part: it has torch 1.0 in place of" in captions(page)
    # The same points are not measured again, there or here.
    cluster.asked.clear()
    other = open_page("perplexity", Visit())
    other.selectbox(key="curve").set_value("MLP only").run()
    other.number_input(key="count").set_value(3).run()
    next(each for each in other.button if each.label == "Measure the curve").click().run()
    assert len(points(other)) == 3
    assert not cluster.asked


def test_cancelled_it_keeps_the_points_that_came(opened, open_page, cluster):
    page = open_page("perplexity")
    mine = points(page)
    # Asked where it stands while it measures, a worker sees the job cancelled by the page.
    cluster.dies = lambda actor, asked: cancel_after(1)

    def cancel_after(count):
        if len(mine) >= count:
            page.session_state["visit"].visitor.jobs[-1].cancel()
        return False

    job = ended(measure(page, 6))
    assert job.state == CANCELLED
    assert 0 < len(mine) < 6
    assert all(actor.killed for actor in cluster.actors)


def test_without_ray_the_job_says_what_to_do(opened, open_page, cluster, monkeypatch):
    def missing():
        raise TransActError("Ray is not installed here: run `make ray`.")

    monkeypatch.setattr(on_ray, "require_ray", missing)
    page = open_page("perplexity")
    assert ended(measure(page)).state == FAILED
    page.run()
    said = " ".join(each.value for each in [*page.error, *page.warning]).replace("\\", "")
    assert "Ray is not installed here" in said


def test_a_curve_makes_way_for_another_visitor_s(opened, open_page, cluster, monkeypatch):
    """After its time, between two points; what has come in stays, and it goes on later."""
    monkeypatch.setattr(start_jobs, "CLUSTER_TURN_SECONDS", 0)
    page = open_page("perplexity")
    mine, jobs = points(page), []
    other = open_page("perplexity", Visit())

    def other_begins(actor, asked):
        if mine and not jobs:
            jobs.append(opened.cluster().queue.submit("another's", lambda _: len(mine)))
        return False

    cluster.dies = other_begins
    job = ended(measure(page, 6))
    assert (job.state, len(mine)) == (DONE, 6)
    assert 0 < ended(jobs[0]).result < 6
    assert not points(other)


@pytest.mark.parametrize("address", ["auto", "local", "192.0.2.1:6379", "[::1]:6379", "head.lan:1"])
def test_addresses_of_a_cluster_are_read(address):
    assert read_settings({"TRANSACT_RAY": address}, "localhost").ray == address


@pytest.mark.parametrize("address", ["", "ray://head:10001", "head", "head:6379 --now"])
def test_other_addresses_keep_the_app_from_starting(address):
    with pytest.raises(TransActError, match=r"TRANSACT_RAY is .*it takes auto"):
        read_settings({"TRANSACT_RAY": address}, "localhost")
