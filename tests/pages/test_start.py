"""The start page and the recorded example that it shows."""

import threading
from urllib.parse import parse_qs

import pytest

from pages.charts import waist_chart
from pages.parts.example import FILE, Example, example
from pages.parts.navigation import SECTIONS
from pages.server.request import Cut, Request
from pages.server.visitors import Visit
from scripts import record_example
from tests.pages.conftest import ROOT, ended
from transact_core.data.corpus import BUILTIN_TEXT
from transact_core.experiments.bench import Choices
from transact_core.importance.scores import IMPORTANCES
from transact_core.models.load import BUILTIN, BUILTIN_NAME
from transact_core.pruning.closed_form import RECOVERIES
from transact_core.workers import work


def words(page) -> str:
    blocks = [*page.caption, *page.markdown, *page.success]
    return "\n".join(block.value for block in blocks)


def links(page) -> dict[str, str]:
    """The pages that are linked to, with what their addresses hold."""
    return {each.proto.page: each.proto.query_string for each in page.get("page_link")}


def charts(page) -> int:
    return len(page.get("plotly_chart"))


def test_every_page_is_in_the_navigation():
    files = {path.stem for path in (ROOT / "pages").glob("*.py")} - {"__init__"}
    assert {name for members in SECTIONS.values() for name in members} == files


def test_the_bare_address_shows_the_example(opened, open_app):
    page = open_app()
    assert not page.exception
    assert page.title[0].value == "Start here"
    told = example()
    assert charts(page) == 3
    assert f"{told.recorded:%d %B %Y}" in words(page)
    assert told.processor in words(page)
    shown = {metric.label: metric.value for metric in page.metric}
    assert shown["Parameters (M)"] == f"{told.cut.footprint.parameters / 1e6:,.1f}"
    assert shown["Perplexity, measured"] == f"{told.cut.perplexity:.2f}"
    assert "You measured" not in words(page)


def test_it_is_there_while_the_model_is_being_opened(own_workbench, open_app, monkeypatch):
    gate = threading.Event()

    def wait(models, report, spec):
        gate.wait(10)
        report("Loading", 0, 1)

    wait.__module__, wait.__qualname__ = work.__name__, "open_bench"
    monkeypatch.setattr(work, "open_bench", wait)
    page = open_app()
    assert not page.exception
    assert charts(page) == 3
    (cancel,) = (each for each in page.button if each.label == "Cancel")
    cancel.click().run()
    gate.set()
    ended(own_workbench.open(Request()).bench)
    page.run()
    assert not page.exception
    assert charts(page) == 3
    assert [each.label for each in page.button if each.label == "Try again"]


def test_every_step_leads_to_the_pages_that_do_it(opened, open_app):
    pages = {name for members in SECTIONS.values() for name in members}
    assert set(links(open_app())) == pages - {"start"}


def test_the_link_opens_the_examples_cut(opened, open_app, open_page):
    address = {key: each for key, (each,) in parse_qs(links(open_app())["compress"]).items()}
    assert address == {key: str(value) for key, value in example().address.items()}
    changed = Visit()
    changed.cut = Cut(0.6, 0.1, "kv-groups", "magnitude", "none", 2, 8)
    page = open_page("compress", changed, **address)
    assert not page.exception
    assert changed.cut == Cut(**example().asked)


def test_the_visitors_own_measurement_of_the_cut_is_told(opened, open_app, open_page):
    visit = Visit()
    page = open_page("compress", visit, **{k: str(v) for k, v in example().address.items()})
    next(b for b in page.button if b.label == "Prune and measure perplexity").click().run()
    point = ended(visit.visitor.jobs[-1]).result
    start = open_app(visit=visit)
    assert f"You measured this cut on this machine: {point.perplexity:.2f}" in words(start)


def test_what_is_recorded_is_what_the_app_begins_with():
    told = Example.model_validate_json(FILE.read_bytes())
    request = Request()
    cut = Cut(**told.asked)
    assert (cut, cut.choices) == (Cut(), Choices())
    assert (told.model.source, told.name) == (BUILTIN, BUILTIN_NAME)
    assert told.calibration.source == told.evaluation.source == BUILTIN_TEXT
    assert told.calibration.tokens == request.calibration_tokens
    assert told.evaluation.tokens == request.evaluation_tokens
    assert told.sequence_length == request.sequence_length
    assert told.command == record_example.COMMAND


def test_the_record_is_sound():
    told = example()
    layers = told.architecture.num_hidden_layers
    assert len(told.concentration.mha) == len(told.concentration.mlp) == layers
    assert told.cut in told.points
    assert told.bare.recovery == "none"
    assert told.bare.footprint == told.cut.footprint
    assert told.cut.footprint.mha_width == told.left.mha_width
    assert told.cut.footprint.mlp_width == told.left.intermediate_size
    assert told.predicted.low < told.predicted.mid < told.predicted.high
    for point in told.points:
        assert point.plan.importance in IMPORTANCES
        assert point.recovery in RECOVERIES
        assert point.delta_nll_se > 0
        assert set(point.row()) >= {"mha_ratio", "perplexity", "delta_nll_se"}
        assert point.footprint.parameters < told.dense.footprint.parameters


def test_recording(gqa_bench):
    cut = Cut()
    told = record_example.record(gqa_bench, cut)
    assert Example.model_validate_json(told.model_dump_json()) == told
    point = gqa_bench.plan(*cut.ratios, cut.choices).applied_to(told.architecture)
    assert told.left == point
    assert told.dense.perplexity == gqa_bench.dense().perplexity
    kinds = {(bool(p.plan.mha_ratio), bool(p.plan.mlp_ratio)) for p in told.points}
    assert kinds == {(True, False), (False, True), (True, True)}


@pytest.mark.parametrize("is_cut", [True, False])
def test_a_section_is_to_scale(is_cut):
    told = example()
    left = told.left if is_cut else told.architecture
    figure = waist_chart.section(told.architecture, left, "")
    widths = {"MHA": left.mha_width, "MLP": left.intermediate_size}
    for name, width in widths.items():
        (outline,) = (trace for trace in figure.data if trace.name == name)
        waist = (min(outline.x) + max(outline.x)) / 2
        top, bottom = (y for x, y in zip(outline.x, outline.y, strict=True) if x == waist)
        assert top - bottom == pytest.approx(width)
        outer = max(width, told.architecture.hidden_size)
        assert max(outline.y) - min(outline.y) == pytest.approx(outer)
    assert ("removed" in {trace.name for trace in figure.data}) == is_cut
