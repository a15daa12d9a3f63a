"""The method page: nothing that the engine takes from a paper is without formula and source."""

import inspect
import re

import pytest

from pages.parts import figure, formulas
from pages.parts.formulas import FORMULAS, SOURCES
from tests.pages.conftest import ROOT
from transact_core import ROOMS
from transact_core.importance.scores import IMPORTANCES, register

CITED = re.compile(r"arXiv\s+(\d{4}\.\d{5})")


def cited_in(text: str) -> set[str]:
    return set(CITED.findall(text))


def page_text(page) -> str:
    return "\n".join(block.value for block in (*page.markdown, *page.caption, *page.text))


def test_the_page_is_whole(opened, open_app):
    page = open_app("method")
    assert not page.exception
    assert page.title[0].value == "Method"
    formulas_shown = [each.value for each in page.latex]
    for name, formula in FORMULAS.items():
        assert f"**`{name}`**" in page_text(page)
        assert any(formula.channel in each for each in formulas_shown)
        for source in formula.sources:
            assert formulas.cited(source) in page_text(page)
    for words in SOURCES.values():
        assert words in page_text(page)


def test_every_importance_has_its_formula_and_the_sources_of_its_docstring():
    assert set(FORMULAS) == set(IMPORTANCES)
    for name, function in IMPORTANCES.items():
        assert cited_in(function.__doc__) <= set(FORMULAS[name].sources), name


def test_sources_are_those_that_the_engine_names():
    named = {
        each
        for path in (ROOT / "transact_core").rglob("*.py")
        for each in cited_in(path.read_text())
    }
    assert {key for key in SOURCES if "." in key} == named


def test_an_importance_without_a_formula_is_shown_by_its_docstring(opened, open_app, monkeypatch):
    monkeypatch.setitem(IMPORTANCES, "added", None)

    @register("added")
    def added(evidence):
        """The phase of the moon, by Kepler."""

    page = open_app("method")
    assert not page.exception
    assert "by Kepler" in page_text(page)


def test_every_room_of_the_library_is_listed(opened, open_app):
    folders = {path.parent.name for path in (ROOT / "transact_core").glob("*/__init__.py")}
    assert set(ROOMS) == folders
    page = open_app("method")
    table = next(block.value for block in page.markdown if "| sub-package | |" in block.value)
    listed = dict(re.findall(r"^\| `([a-z]+)` \| (.+) \|$", table, re.MULTILINE))
    assert list(listed) == list(ROOMS)
    assert all(listed.values())


def test_captions_name_files_that_exist(opened, open_app):
    files = {f"{path.parent.name}/{path.name}" for path in (ROOT / "transact_core").rglob("*.py")}
    page = open_app("method")
    captions = [each.value for each in page.caption if each.value.startswith("Computed by")]
    named = {name for words in captions for name in re.findall(r"`([\w/]+\.py)`", words)}
    assert named
    assert named <= files


@pytest.mark.parametrize("part", ["channel", "head"])
def test_formulas_are_balanced(part):
    for formula in FORMULAS.values():
        latex = getattr(formula, part).replace(r"\{", "").replace(r"\}", "")
        assert latex.count("{") == latex.count("}")
        assert len(re.findall(r"\\left\b", latex)) == len(re.findall(r"\\right\b", latex))


def test_no_chart_is_drawn_without_a_sentence_on_how_to_read_it():
    reading = inspect.signature(figure.show).parameters["reading"]
    assert reading.default is inspect.Parameter.empty
    for path in (ROOT / "pages").rglob("*.py"):
        if path != ROOT / "pages" / "parts" / "figure.py":
            assert "plotly_chart(" not in path.read_text(), path
