import base64
import dataclasses
from datetime import UTC, datetime
from html.parser import HTMLParser

import pytest
from plotly.offline import get_plotlyjs

from pages.charts import common as charts
from pages.report import LIMITS, make_report
from pages.server.request import Cut
from pages.server.side_by_side import LatencyRun
from tests.pages.conftest import ended
from tests.pages.test_pages import button
from transact_core.experiments.bench import Choices, compress
from transact_core.export.compression import parse_compression
from transact_core.forward.latency import LatencyPoint, Timing
from transact_core.pruning.plan import Decision

PLOTLY = get_plotlyjs()
VOID = {"meta", "br", "img", "link", "hr", "input"}
MADE = datetime(2026, 5, 4, 12, 30, tzinfo=UTC)


class Page(HTMLParser):
    """A document whose tags must close in order; its text without scripts, its tags, its links."""

    def __init__(self, document: str) -> None:
        super().__init__()
        self.open, self.tags, self.text, self.links, self.sources = [], [], "", [], []
        # Plotly's own script is long to read, and checked to be there as it is.
        self.feed(document.replace(PLOTLY, ""))
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        attributes = dict(attributes)
        self.links += [attributes["href"]] if "href" in attributes else []
        self.sources += [attributes["src"]] if "src" in attributes else []
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if not {"script", "style"} & set(self.open):
            self.text += data


def report(
    bench,
    granularity="query-heads",
    recovery="none",
    ratios=(0.5, 0.5),
    measured=True,
    latency=None,
):
    plan = bench.plan(*ratios, Choices(granularity=granularity))
    points = [compress(bench, plan, recovery)[1]] if measured else []
    return make_report(
        bench, Decision(plan), recovery, points[0] if points else None, points, latency, MADE
    )


@pytest.fixture(params=["query-heads", "head-dims"])
def document(request, gqa_bench):
    return report(gqa_bench, request.param, "least-squares")


def figures(document: str) -> int:
    return document.replace(PLOTLY, "").count("Plotly.newPlot(")


def test_it_is_one_page_with_its_figures_and_needs_nothing_from_elsewhere(document):
    page = Page(document)
    assert document.count(PLOTLY) == 1
    # What is cut in MHA and in MLP, the curve, two frontiers, the repair.
    assert figures(document) == page.tags.count("figure") == 6
    assert page.sources == []
    assert [link[:29] for link in page.links] == ["data:application/json;base64,"]
    for sentence in LIMITS:
        assert sentence in page.text
    assert "04 May 2026, 12:30 UTC" in page.text


def test_the_numbers_are_the_measured_ones(gqa_bench):
    plan = gqa_bench.plan(0.5, 0.5, Choices())
    point = compress(gqa_bench, plan, "none")[1]
    page = Page(make_report(gqa_bench, Decision(plan), "none", point, [point], None, MADE))
    dense = gqa_bench.dense()
    assert f"Perplexity is {point.perplexity:.2f}, " in page.text
    assert f"the dense model's {dense.perplexity:.2f}." in page.text
    assert f"{point.footprint.mha_width}" in page.text
    for digest in (
        gqa_bench.calibration.sha256,
        gqa_bench.evaluation.sha256,
        *gqa_bench.loaded.weight_files.values(),
    ):
        assert digest in page.text
    assert "--mha-ratio 0.5 --mlp-ratio 0.5" in page.text
    stored = base64.b64decode(page.links[0].partition(",")[2]).decode()
    assert parse_compression(stored).plan == plan


def test_a_cut_that_is_not_measured_is_said_to_be(gqa_bench):
    document = report(gqa_bench, measured=False)
    page = Page(document)
    assert "not measured yet" in page.text
    assert "Nothing is measured on these texts yet." in page.text
    assert figures(document) == page.tags.count("figure") == 2


def test_a_cut_of_nothing_is_said_to_be(gqa_bench):
    assert (
        "the model is the dense one" in Page(report(gqa_bench, ratios=(0, 0), measured=False)).text
    )


def test_a_cut_measured_beside_others_stands_among_them(gqa_bench):
    plans = [
        gqa_bench.plan(0.5, 0.5, Choices(importance=each)) for each in ("activation", "random")
    ]
    points = sorted(
        (compress(gqa_bench, plan, "none")[1] for plan in plans), key=lambda p: p.perplexity
    )
    for point, words in zip(
        points,
        ("None of them has no more parameters", "1 of them has no more parameters"),
        strict=True,
    ):
        page = Page(make_report(gqa_bench, point.decision, "none", point, points, None, MADE))
        assert words in page.text


def test_latency_is_told_where_it_was_timed(gqa_bench):
    timing = Timing((0.5,))
    timed = [LatencyPoint(name, 16, timing, timing, None) for name in ("dense", "pruned")]
    run = LatencyRun(Cut(), 1, 16, 1, plan=gqa_bench.plan(0.5, 0.5, Choices()), points=timed)
    document = report(gqa_bench, latency=run)
    assert "Time on the machine that measured" in Page(document).text
    assert r"takes 1.00 \u00d7 (within the spread) the dense one" in document


@pytest.mark.parametrize(
    "hostile", ["<script>alert(1)</script>", '"><img src=x onerror=alert(1)>', "{{ 7 * 7 }}"]
)
def test_hostile_names_stay_text(gqa_bench, hostile):
    plain = Page(report(gqa_bench))
    loaded = dataclasses.replace(
        gqa_bench.loaded,
        source=hostile.replace("/", "∕"),
        weight_files={hostile: "0" * 64},
    )
    gqa_bench.loaded = loaded
    gqa_bench.evaluation = dataclasses.replace(gqa_bench.evaluation, source=hostile, uses=())
    gqa_bench.calibration = dataclasses.replace(
        gqa_bench.calibration, source=f"hub:{hostile}", uses=()
    )
    page = Page(report(gqa_bench))
    assert page.tags == plain.tags
    assert page.text.count(hostile) >= 3
    assert hostile.replace("/", "∕") in page.text


def test_figures_cannot_end_their_script(gqa_bench, monkeypatch):
    real = charts.head_map
    monkeypatch.setattr(
        charts, "head_map", lambda scores, plan, title: real(scores, plan, "</script><b>x</b>")
    )
    document = report(gqa_bench)
    assert "b" not in Page(document).tags


def test_the_export_page_offers_it_before_and_after_measuring(open_page):
    page = open_page("export")
    assert not page.exception
    offered = [each for each in page.get("download_button") if each.proto.label == "Report"]
    assert "not measured yet" in offered[0].proto.help
    compress_page = open_page("compress")
    button(compress_page, "Prune and measure perplexity").click().run()
    ended(compress_page.session_state["visit"].visitor.jobs[-1])
    page = open_page("export")
    offered = [each for each in page.get("download_button") if each.proto.label == "Report"]
    assert "not measured yet" not in offered[0].proto.help
