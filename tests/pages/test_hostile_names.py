"""Names and sentences that hold markup come to the page as words."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from pages.charts.text import NO_BREAK, plain, plain_in_chart
from pages.server import open_models
from pages.server.request import Request
from pages.server.visitors import Visit
from tests.pages.conftest import ended
from transact_core.base.errors import TransActError
from transact_core.workers import work

HOSTILE = (
    "x<img src=https://evil.test/a onerror=alert(1)>![i](https://evil.test/b)[l](https://evil.test)"
    "<script>evil()</script>$\\evil$ :red[evil] **evil** `evil` www.evil.test"
)
MARKUP = {
    "image",
    "link_open",
    "html_inline",
    "html_block",
    "code_inline",
    "strong_open",
    "em_open",
}


def markup(text: str) -> set[str]:
    """Kinds of markup that a text renders to."""
    blocks = MarkdownIt("commonmark").parse(text)
    return MARKUP & {token.type for block in blocks for token in (block, *(block.children or []))}


def shown(text: str) -> str:
    """The words that a text renders to."""
    (block,) = [block for block in MarkdownIt("commonmark").parse(text) if block.children]
    return "".join(token.content for token in block.children)


def test_plain_words_show_as_they_are():
    assert markup(HOSTILE) >= {"image", "link_open", "html_inline"}
    assert markup(plain(HOSTILE)) == set()
    assert shown(plain(HOSTILE)).replace(NO_BREAK, "") == HOSTILE
    assert "https://" not in plain(HOSTILE)
    assert ":red[" not in plain(HOSTILE)
    sentence = "The output folder /tmp/out-1.5 is not empty; name a new or empty one."
    assert plain(sentence) == sentence


@given(st.text(st.characters(codec="ascii", exclude_categories=["Cc"]), min_size=1))
def test_no_words_become_markup(words):
    sentence = f"It is {words}."
    assert markup(plain(sentence)) == set()
    assert shown(plain(sentence)).replace(NO_BREAK, "") == sentence


def test_words_in_a_chart_are_no_html():
    assert plain_in_chart("<a href='x'>&lt;\n") == "&lt;a href='x'&gt;&amp;lt; "


def all_markdown(page) -> list[str]:
    kinds = ("markdown", "caption", "info", "warning", "error", "success", "title", "subheader")
    return [element.value for kind in kinds for element in getattr(page, kind)]


def charts(page) -> str:
    return "".join(element.proto.spec for element in page.get("plotly_chart"))


def harmless(page) -> None:
    assert not page.exception
    for text in all_markdown(page):
        rendered = MarkdownIt("commonmark").render(text)
        assert "<img" not in rendered
        assert "<script" not in rendered
        assert 'href="https://evil' not in rendered
    assert "evil" not in charts(page)


@pytest.mark.parametrize("name", ["activations", "importance", "compress", "perplexity", "export"])
def test_a_hostile_model_name_is_words_on_every_page(open_page, gqa_bench, name):
    gqa_bench.loaded = replace(gqa_bench.loaded, source=HOSTILE)
    harmless(open_page(name))


def test_a_refusal_that_holds_a_hostile_name_is_words(own_workbench, open_page, monkeypatch):
    def refuse(models, report, spec):
        raise TransActError(f"There is no model at {HOSTILE!r}.")

    monkeypatch.setattr(open_models, "require_readable_source", lambda *_: None)
    monkeypatch.setattr(work, "open_bench", refuse)
    # As a function that a worker is asked for is found by its name.
    refuse.__module__, refuse.__qualname__ = work.__name__, "open_bench"
    request = Request(model=HOSTILE)
    ended(own_workbench.open(request).bench)
    visit = Visit()
    visit.request = request
    page = open_page("compress", visit)
    harmless(page)
    assert len(page.error) == 1
    assert "evil" in page.error[0].value
    assert markup(page.error[0].value) == set()
