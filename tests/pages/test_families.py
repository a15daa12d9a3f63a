"""Every page works on a model of each family."""

import pytest

from tests.conftest import bench_of
from tests.models.families.made import make_member

PAGES = (
    "activations",
    "premise",
    "importance",
    "heads",
    "redundancy",
    "compress",
    "perplexity",
    "compare",
    "latency",
    "export",
)


@pytest.fixture(params=["mistral, sliding", "qwen2", "qwen3", "smollm3", "granite"])
def gqa_bench(request, tokenizer, windows):
    return bench_of(make_member(request.param), tokenizer, windows)


def test_every_page_is_drawn(open_page, gqa_bench):
    for name in PAGES:
        page = open_page(name)
        assert not page.exception, (name, page.exception)
        assert not page.error, (name, page.error)


def test_what_a_family_does_not_allow_is_said_on_the_pages(open_page, gqa_bench):
    narrow = gqa_bench.loaded.model.config.model_type in ("qwen2", "granite")
    page = open_page("compress", granularity="head-dims")
    assert not page.exception
    said = "\n".join(each.value for each in (*page.error, *page.warning, *page.info))
    assert ("granularity head-dims cannot be had here" in said) != narrow
    page = open_page("compress", recovery="bias")
    assert not page.exception
    said = [each.value for each in page.error]
    assert bool(said) == (not narrow or "qwen2" in gqa_bench.loaded.model.config.model_type)
