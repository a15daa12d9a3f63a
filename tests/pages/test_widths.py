"""What the pages say of the widths that a cut ends up with."""

import pytest

from pages.live import _possible_heads
from tests.conftest import bench_of, make_model
from tests.pages.test_pages import texts
from transact_core.experiments.bench import Bench


@pytest.fixture
def gqa_bench(tokenizer, windows) -> Bench:
    """Of a model of 16 heads over 4 groups; 12 do not divide its hidden_size of 64."""
    model = make_model(hidden_size=64, num_attention_heads=16, num_key_value_heads=4, head_dim=4)
    return bench_of(model, tokenizer, windows)


def test_a_ratio_that_removes_nothing_or_far_more_says_so_beside_the_slider(open_page):
    page = open_page("compress", mha="10", mlp="30")
    assert "The attention loses nothing where 10.0% of its width was asked for" in texts(page)
    assert "all 16 query heads by query-heads, the next one 12" in texts(page)
    page = open_page("compress", mha="15", mlp="30")
    assert "The attention loses 25.0% where 15.0% of its width was asked for" in texts(page)


def test_a_ratio_that_is_nearly_met_says_nothing(open_page):
    page = open_page("compress", mha="25", mlp="30")
    assert not page.exception
    assert "was asked for" not in texts(page)


@pytest.mark.parametrize(
    ("recovery", "name"),
    [("least-squares", "MistralForCausalLM"), ("bias", "SmolLM3ForCausalLM")],
)
def test_the_export_page_names_the_class_and_why(open_page, recovery, name):
    open_page("compress", mha="25", mlp="30", recovery=recovery)
    page = open_page("export")
    assert not page.exception
    assert f"Saved as a stock `{name}`, which computes the same, because LlamaConfig" in texts(page)
    assert "The MLP width 28 is no multiple of 32" in texts(page)
    assert "`--multiple-of 32` (32 channels)" in texts(page)


def test_the_export_page_says_nothing_of_a_llama(open_page):
    open_page("compress", mha="50", mlp="0")
    page = open_page("export")
    assert not page.exception
    assert "Saved as a stock" not in texts(page)
    assert "no multiple of 32" not in texts(page)


@pytest.mark.parametrize(
    ("counts", "words"),
    [
        ([3, 6], "Possible here: 3, 6."),
        (list(range(1, 33)), "Possible here: any number up to 32."),
        (list(range(4, 65, 4)), "Possible here: every multiple of 4 up to 64."),
    ],
)
def test_many_counts_are_described(counts, words):
    assert _possible_heads(counts) == words
