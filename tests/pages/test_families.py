"""Every page works on a model of each family."""

import pytest

from pages.server.request import Request
from tests.conftest import bench_of
from tests.models.families.made import make_member
from tests.pages.conftest import ended
from transact_core.experiments.bench import Choices

PAGES = (
    "activations",
    "premise",
    "importance",
    "heads",
    "redundancy",
    "compress",
    "recover",
    "perplexity",
    "tasks",
    "damage",
    "compare",
    "latency",
    "deploy",
    "export",
)


@pytest.fixture(params=["mistral, sliding", "qwen2", "qwen3", "smollm3", "granite", "gemma3"])
def gqa_bench(request, tokenizer, windows):
    return bench_of(make_member(request.param), tokenizer, windows)


def test_every_page_is_drawn(open_page, gqa_bench, links_in_words):
    for name in PAGES:
        page = open_page(name)
        assert not page.exception, (name, page.exception)
        assert not page.error, (name, page.error)


@pytest.mark.parametrize("gqa_bench", ["qwen3"], indirect=True)
def test_what_a_family_does_not_allow_is_said_on_the_pages(opened, open_page, gqa_bench):
    for choice, complaint in (
        ({"granularity": "head-dims"}, "The granularity head-dims cannot be had here"),
        ({"recovery": "bias"}, "Qwen3ForCausalLM has no bias for each of its projections"),
    ):
        page = open_page("compress", **choice)
        if "granularity" in choice:
            ended(opened.prepare(Request(), Choices(**choice)))
            page.run()
        assert not page.exception
        assert complaint in "\n".join(each.value for each in page.error)
